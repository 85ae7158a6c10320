"""GGUF files of ours, read by llama.cpp's own reader and by ours."""

import dataclasses

import families
import jax
import numpy as np
import pytest
import tokenizers
import transformers

from okd_jax import models
from okd_jax.data import Record, make_tokenizer
from okd_jax.errors import UserError
from okd_jax.models import Decoder, LayerKind, RopeScaling, preset
from okd_jax.models.formats import gguf_tokenizer
from okd_jax.text import rollout
from okd_jax.text.source import decoder_source

gguf = pytest.importorskip("gguf")

SIZES = {
  "vocab_size": 320,
  "hidden_size": 64,
  "num_layers": 2,
  "num_heads": 4,
  "num_kv_heads": 2,
  "mlp_size": 96,
}
CONFIGS = {
  "gpt2": preset("gpt2", **SIZES | {"num_kv_heads": 0}),
  "llama": preset("llama", **SIZES, tie_embeddings=False, rope_theta=5e4),
  "llama3": preset("llama", **SIZES, rope_scaling=RopeScaling("llama3", 8.0)),
  "mistral": preset("mistral", **SIZES, rope_scaling=RopeScaling("linear", 2.0)),
  "qwen2": preset("qwen2", **SIZES),
  "qwen3": preset("qwen3", **SIZES, head_dim=32),
}
TEXT = "Hello, world! It's 12345 naïve\n\n café 🙂  two  spaces\tDON'T"


@pytest.mark.parametrize("name", CONFIGS)
def test_reads_back_what_was_written(name, tmp_path):
  config = CONFIGS[name]
  params = families.params(config)
  models.save_gguf(tmp_path / "model.f32.gguf", params, config, None)
  back = models.load(tmp_path / "model.f32.gguf")
  own = dataclasses.asdict(dataclasses.replace(config, family=back.config.family))
  assert dataclasses.asdict(back.config) == own
  jax.tree.map(np.testing.assert_array_equal, back.params, params)
  assert [p.name for p in tmp_path.iterdir()] == ["model.f32.gguf"]


@pytest.mark.parametrize("kind, steps", [("f16", 1024), ("q8_0", 2 * 127)])
def test_half_precision_and_eight_bits(kind, steps, tmp_path):
  config = CONFIGS["llama"]
  params = families.params(config)
  models.save_gguf(tmp_path / f"model.{kind}.gguf", params, config, None)
  back = models.load(tmp_path / f"model.{kind}.gguf").params

  def close(path, got, want):
    if path[-1].key == "scale":
      np.testing.assert_array_equal(got, want)
    else:
      error = np.abs(got - want).max()
      # The scale of a block is itself float16.
      assert 0 < error < 1.15 * np.abs(want).max() / steps

  jax.tree_util.tree_map_with_path(close, back, params)


def test_matrices_are_kept_as_the_name_says(tmp_path):
  config = dataclasses.replace(CONFIGS["llama"], mlp_size=40)  # no block of 32 fits
  kinds = {}
  for name in ("a", "a.f16", "a.q8_0"):
    models.save_gguf(tmp_path / f"{name}.gguf", families.params(config), config, None)
    reader = gguf.GGUFReader(tmp_path / f"{name}.gguf")
    kinds[name] = {t.name: t.tensor_type.name for t in reader.tensors}
  assert kinds["a"] == kinds["a.f16"]
  assert kinds["a"]["blk.0.attn_q.weight"] == "F16"
  assert kinds["a"]["blk.0.attn_norm.weight"] == "F32"
  assert kinds["a.q8_0"]["blk.0.attn_q.weight"] == "Q8_0"
  assert kinds["a.q8_0"]["blk.0.ffn_down.weight"] == "F16"


def round_trip(tokenizer, size):
  fields = gguf_tokenizer.describe(tokenizer, size, "x.gguf")
  return gguf_tokenizer.build(fields, 512, "x.gguf"), fields


def assert_same_tokens(tokenizer, again):
  for text in (TEXT, "", " a", "a" * 40):
    ids = tokenizer(text)["input_ids"]
    assert again(text)["input_ids"] == ids
    skip = {"skip_special_tokens": True}
    assert again.decode(ids, **skip) == tokenizer.decode(ids, **skip)
  for name in ("bos_token", "eos_token", "pad_token", "chat_template"):
    assert getattr(again, name) == getattr(tokenizer, name)


def test_the_tokenizer_of_gpt2(shared):
  folder = shared / "tokenizers" / "gpt2"
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
  tokenizer.chat_template = "{{ messages[0]['content'] }}!"
  again, fields = round_trip(tokenizer, 50264)
  assert_same_tokens(tokenizer, again)
  assert fields["tokenizer.ggml.pre"] == "gpt-2"
  assert fields["tokenizer.ggml.token_type"][50256:] == [3] + [5] * 7


def test_the_tokenizer_of_a_sentencepiece_model(shared):
  tokenizer = models.load(shared / "models" / "stories260K", params=False).tokenizer
  again, fields = round_trip(tokenizer, 512)
  assert_same_tokens(tokenizer, again)
  types = fields["tokenizer.ggml.token_type"]
  assert types[:4] == [2, 3, 3, 6] and types.count(6) == 256


@pytest.mark.parametrize("name", ["smollm", "qwen2", "llama-bpe"])
def test_ways_to_split_text_have_names(name, shared):
  folder = shared / "tokenizers" / "gpt2"
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
  fields = gguf_tokenizer.describe(tokenizer, 50257, "x.gguf")
  fields["tokenizer.ggml.pre"] = name
  own = gguf_tokenizer.build(fields, 512, "x.gguf")
  again, fields = round_trip(own, 50257)
  assert fields["tokenizer.ggml.pre"] == name
  assert_same_tokens(own, again)


def test_a_tokenizer_of_ours():
  records = [Record("text", "x:1", text=TEXT * 20)]
  tokenizer = make_tokenizer("bpe:300", records)
  assert_same_tokens(tokenizer, round_trip(tokenizer, 300)[0])


def test_other_tokenizers_are_refused():
  backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
  words = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
  with pytest.raises(UserError, match="a WordLevel tokenizer cannot be written"):
    gguf_tokenizer.describe(words, 1, "x.gguf")
  with pytest.raises(UserError, match="no tokenizer without merges, as 'bytes' is"):
    gguf_tokenizer.describe(make_tokenizer("bytes", []), 258, "x.gguf")
  vocab = {"a": 0, "b": 1, "ab": 2}
  backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [("a", "b")]))
  backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  spaces = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
  with pytest.raises(UserError, match="splits text in a way that has no name"):
    gguf_tokenizer.describe(spaces, 3, "x.gguf")
  with pytest.raises(UserError, match="the tokenizer has id 2, the model 2 ids"):
    gguf_tokenizer.describe(spaces, 2, "x.gguf")


@pytest.mark.parametrize(
  "name, changes, message",
  [
    ("gemma3", {}, "a gemma3_text cannot be written as GGUF, only gpt2, llama"),
    ("mistral_window", {}, "has silu and neither windows nor layers"),
    ("llama_gqa", {"activation": "relu"}, "has silu and neither windows"),
    ("llama_gqa", {"rope_scaling": RopeScaling("yarn", 2.0)}, "'yarn' cannot be"),
    ("ministral", {"layer_kinds": (LayerKind(3),) * 3}, "a ministral cannot be"),
  ],
)
def test_networks_that_it_has_no_words_for(name, changes, message, tmp_path):
  config = dataclasses.replace(families.CONFIGS[name], **changes)
  with pytest.raises(UserError, match=message):
    models.save_gguf(tmp_path / "x.gguf", families.params(config), config, None)
  assert not list(tmp_path.iterdir())


# In llama.cpp itself, where it is installed: pip install llama-cpp-python compiles for
# minutes, so no extra has it.

NEW = 40
TEXTS = ("Once upon a time, there was a", "Hello, world! It's 12345 naïve\n\n café")


def in_llama_cpp(path, tokenizer):
  """Asserts equal ids and greedy tokens; returns the largest difference of logits."""
  import llama_cpp

  theirs = llama_cpp.Llama(str(path), n_ctx=128, verbose=False, logits_all=True)
  model, differences = models.load(path), []
  source, variables = decoder_source(Decoder(model.config)), {"params": model.params}
  for text in TEXTS:
    ids = tokenizer(text)["input_ids"]
    assert theirs.tokenize(text.encode(), add_bos=ids[0] == theirs.token_bos()) == ids
    theirs.reset()
    theirs.eval(ids)
    said = np.array(theirs.scores[: len(ids)])
    ours = model.logits(model.params, np.array([ids], np.int32))[0]
    differences.append(np.abs(said - ours).max())
    theirs.reset()
    options = {"temp": 0.0, "repeat_penalty": 1.0}
    tokens = [x for x, _ in zip(theirs.generate(ids, **options), range(NEW))]  # noqa: B905
    [answer] = rollout.generate(
      source,
      variables,
      [ids],
      jax.random.key(0),
      max_new_tokens=NEW,
      sampling=rollout.Sampling(0.0),
    )
    assert tokens == answer.tokens.tolist()
  return max(differences)


@pytest.mark.parametrize("kind, close", [("f32", 0.02), ("f16", 0.04), ("q8_0", 0.4)])
def test_a_real_model_in_llama_cpp(kind, close, shared, tmp_path):
  """Its cache holds float16; beside 8-bit weights activations are rounded, too."""
  pytest.importorskip("llama_cpp")
  model = models.load(shared / "models" / "stories260K")
  path = tmp_path / f"stories.{kind}.gguf"
  models.save_gguf(path, model.params, model.config, model.tokenizer)
  assert in_llama_cpp(path, model.tokenizer) < close


@pytest.mark.parametrize("name", CONFIGS)
def test_every_architecture_in_llama_cpp(name, shared, tmp_path):
  pytest.importorskip("llama_cpp")
  folder = shared / "tokenizers" / "gpt2"
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
  shape = {k: v for k, v in vars(CONFIGS[name]).items() if k != "vocab_size"}
  config = type(CONFIGS[name])(**shape, vocab_size=50257)
  params = models.init(config, jax.random.key(0))
  params = jax.tree.map(lambda x: x * 4 if x.ndim > 2 else x, params)  # clear choices
  path = tmp_path / "model.f32.gguf"
  models.save_gguf(path, params, config, tokenizer)
  assert in_llama_cpp(path, tokenizer) < 0.02
