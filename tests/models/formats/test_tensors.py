"""Weights as they lie about: other names, other parts, other hands."""

import ast
import io
import json
import sys
from pathlib import Path

import families
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from okd_jax import models
from okd_jax.errors import UserError
from okd_jax.models import RopeScaling


@pytest.fixture
def saved(tmp_path):
  """A function that saves a tiny model, its tensors and config.json changed."""

  def save(name, change=lambda tensors: tensors, **config):
    folder = tmp_path / "model"
    families.save(name, folder)
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors) or tensors, folder / "model.safetensors")
    edit(folder / "config.json", **config)
    return folder

  return save


def edit(path, **changes):
  raw = {**json.loads(path.read_text()), **changes}
  path.write_text(json.dumps({k: v for k, v in raw.items() if v is not ...}))


def assert_loads(folder, name):
  params = models.load(folder).params
  jax.tree.map(
    np.testing.assert_array_equal, params, families.params(families.CONFIGS[name])
  )


@pytest.mark.parametrize("kind", [np.uint8, np.bool_])
def test_masks_of_bytes_in_old_gpt2_folders(saved, kind):
  masks = {
    f"transformer.h.{i}.attn.{name}": np.ones((1, 1, 8, 8), kind)
    for i in range(3)
    for name in ("bias", "masked_bias")
  }
  assert_loads(saved("gpt2", lambda tensors: tensors | masks), "gpt2")


def test_a_quantisation_that_is_null_is_none(saved):
  assert_loads(saved("llama_gqa", quantization_config=None), "llama_gqa")


@pytest.mark.parametrize(
  "name, embedding",
  [
    ("llama3", "model.embed_tokens.weight"),
    ("opt", "model.decoder.embed_tokens.weight"),
  ],
)
def test_a_tied_model_that_stores_the_head_alone(saved, name, embedding):
  def change(tensors):
    tensors["lm_head.weight"] = tensors.pop(embedding)

  assert_loads(saved(name, change), name)


@pytest.mark.parametrize(
  "name, rename",
  [
    ("gpt2", lambda n: f"_orig_mod.{n}"),
    ("llama_gqa", lambda n: f"_orig_mod.{n}"),
    ("llama_gqa", lambda n: f"model.{n}"),
    ("llama_gqa", lambda n: f"module.{n}"),
    ("llama_gqa", lambda n: n.replace("layers.1.", "layers.1._orig_mod.")),
    ("llama_gqa", lambda n: f"module._orig_mod.{n}"),
    ("gpt2", lambda n: f"model.{n}"),
    ("opt_350m", lambda n: n.removeprefix("model.")),
    ("opt_350m", lambda n: n.removeprefix("model.decoder.")),
  ],
)
def test_wrappers_around_the_model(saved, name, rename):
  def change(tensors):
    return {rename(key): tensor for key, tensor in tensors.items()}

  assert_loads(saved(name, change), name)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_text_part_of_a_larger_model(saved, prefix):
  """As Gemma 3 from 4B on: beside a tower for pictures, which is left alone."""

  def change(tensors):
    tensors = {n.replace("model.", prefix, 1): x for n, x in tensors.items()}
    return tensors | {"vision_tower.layers.0.weight": np.ones(3, np.int8)}

  folder = saved("gemma3", change)
  path = folder / "config.json"
  text = json.loads(path.read_text())
  whole = {"model_type": "gemma3", "vision_config": {}, "eos_token_id": [2, 9]}
  path.write_text(json.dumps(whole | {"text_config": text}))
  (folder / "generation_config.json").unlink()
  assert_loads(folder, "gemma3")
  assert models.load(folder, params=False).config.family == "gemma3_text"


def test_a_gemma_3_says_only_what_differs(saved):
  said = {"model_type": "gemma3_text", "num_hidden_layers": 7, "hidden_size": 2560}
  folder = saved("gemma3")
  (folder / "config.json").write_text(json.dumps(said))
  config = models.load(folder, params=False).config
  assert config.num_heads == 8 and config.num_kv_heads == 4 and config.head_dim == 256
  assert config.vocab_size == 262208 and config.embed_scale == 2560**0.5
  assert [kind.window for kind in config.layer_kinds] == [4096] * 5 + [0, 4096]
  assert config.rope_theta == 1e6 and config.layer_kinds[0].rope_theta == 1e4


def test_rope_scaling_comes_before_rope_parameters(saved):
  """In transformers' order."""
  folder = saved(
    "llama_gqa",
    rope_scaling={"rope_type": "linear", "factor": 4.0},
    rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5.0},
    rope_theta=7.0,
  )
  config = models.load(folder, params=False).config
  assert config.rope_scaling == RopeScaling("linear", 4.0) and config.rope_theta == 7.0


def test_the_configuration_is_read_before_the_tokenizer(saved):
  folder = saved("llama_gqa", model_type="qwen9")
  (folder / "tokenizer.json").write_text("{}")
  with pytest.raises(UserError, match="model_type 'qwen9' is not supported"):
    models.load(folder)


def test_no_call_of_transformers_trusts_a_folder():
  """Guards I: each says so itself, whatever the library's default becomes."""
  calls = [
    call
    for path in Path(models.__file__).parents[1].rglob("*.py")
    for call in ast.walk(ast.parse(path.read_text()))
    if isinstance(call, ast.Call) and "from_pretrained" in ast.dump(call.func)
  ]
  assert calls
  for call in calls:
    said = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    assert said["trust_remote_code"] == "False", ast.unparse(call)


@pytest.mark.parametrize(
  "remote",
  [
    {"AutoTokenizer": ["code.Own", None]},
    {"AutoConfig": "code.Own", "AutoTokenizer": "code.Own"},
  ],
)
def test_nothing_is_run_from_a_folder(saved, remote, tmp_path, monkeypatch, shared):
  """Guards I: no question on stdin, no code, whatever a folder asks for."""
  folder = saved("llama_gqa", auto_map=remote)
  mark = tmp_path / "ran"
  (folder / "code.py").write_text(f"open({str(mark)!r}, 'w')\nclass Own: pass\n")
  for part in ("tokenizer.json", "tokenizer_config.json"):
    (folder / part).write_text((shared / "models/stories260K" / part).read_text())
  edit(folder / "tokenizer_config.json", auto_map=remote, tokenizer_class="Own")
  monkeypatch.setattr(sys, "stdin", None)  # to ask would be an error
  try:
    assert models.load(folder).tokenizer is not None
  except UserError as error:
    assert "the tokenizer cannot be read" in str(error)
  assert not mark.exists()


@pytest.mark.parametrize(
  "weight_map, message",
  [
    (
      {"a": "../other/model.safetensors"},
      "names '../other/model.safetensors', which is",
    ),
    ({"a": "/etc/passwd"}, "names '/etc/passwd', which is no file of its own folder"),
    ({"a": "sub/model.safetensors"}, "which is no file of its own folder"),
    ({"a": 3}, "names 3, which is no file"),
    ({"a": None}, "names None, which is no file"),
    ({}, "names no files"),
    ([], "names no files"),
    ("x", "names no files"),
    (None, "names no files"),
  ],
)
def test_a_weight_map_stays_in_its_folder(saved, weight_map, message):
  folder = saved("llama_gqa")
  (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
  index = folder / "model.safetensors.index.json"
  index.write_text(json.dumps({"weight_map": weight_map}))
  with pytest.raises(UserError, match=message):
    models.load(folder)


def test_sentencepiece_is_named_where_it_is_needed(saved, monkeypatch):
  folder = saved("llama_gqa")
  (folder / "tokenizer.model").write_bytes(b"")
  monkeypatch.setitem(sys.modules, "sentencepiece", None)
  with pytest.raises(UserError, match="pip install okd-jax.sentencepiece."):
    models.load(folder)


def test_a_sentencepiece_model_alone(saved, shared):
  sentencepiece = pytest.importorskip("sentencepiece")
  lines = (shared / "data/text/tinyshakespeare.txt").read_text().splitlines()[:2000]
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(lines),
    model_writer=model,
    vocab_size=330,
    model_type="bpe",
    byte_fallback=True,
    minloglevel=2,
  )
  folder = saved("llama_gqa")
  (folder / "tokenizer.model").write_bytes(model.getvalue())
  tokenizer = models.load(folder, params=False).tokenizer
  own = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
  for text in ("Hello  world, naïve 123\n\tx", "To be, or not to be"):
    assert tokenizer(text)["input_ids"] == own.encode(text)


def test_two_tensors_of_one_name_are_told(saved):
  def change(tensors):
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[f"_orig_mod.{name}"] = tensors[name] + 1

  with pytest.raises(UserError, match="are both model.layers.0.mlp.up_proj.weight"):
    models.load(saved("llama_gqa", change))


def test_another_embedding_is_no_models(saved):
  def change(tensors):
    tensors = {f"language_model.{name}": x for name, x in tensors.items()}
    return tensors | {"a.embed_tokens.weight": np.ones((3, 2), np.float32)}

  with pytest.raises(UserError, match="unexpected: a.embed_tokens.weight$"):
    models.load(saved("llama_gqa", change))
