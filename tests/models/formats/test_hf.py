"""Hugging Face folders both ways; the parity tests need torch, the others do not."""

import dataclasses
import json
import shutil
from pathlib import Path

import families
import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from safetensors.numpy import load_file, save_file

from okd_jax import models
from okd_jax.errors import UserError
from okd_jax.models import Model
from okd_jax.models.formats import hf

NAMES = sorted(families.CONFIGS)
# The golden logits are transformers' of the same folders: here some are enough.
QUICK = ("gpt2", "llama3", "mistral", "qwen3", "gemma2")
WITH_TORCH = [
  name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
  for name in NAMES
]


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> Path:
  """One folder a tiny model, named after it; do not write to them."""
  root = tmp_path_factory.mktemp("models")
  for name in NAMES:
    families.save(name, root / name)
  return root


@pytest.fixture
def folder(folders, tmp_path) -> Path:
  """A copy of the tiny LLaMA's folder to break."""
  return shutil.copytree(folders / "llama_gqa", tmp_path / "model")


def _edit(path: Path, **changes):
  """Changes keys of a JSON file; a key set to ... goes away."""
  raw = {**json.loads(path.read_text()), **changes}
  path.write_text(json.dumps({k: v for k, v in raw.items() if v is not ...}))


def _edit_tensors(folder: Path, change):
  path = folder / "model.safetensors"
  tensors = load_file(path)
  change(tensors)
  save_file(tensors, path, {"format": "pt"})


def _logits(model: Model, tokens, segment_ids=None):
  return np.asarray(jax.jit(model.logits)(model.params, tokens, segment_ids))


def _assert_same(tree, other):
  jax.tree.map(np.testing.assert_array_equal, tree, other)


class TestRoundTrip:
  @pytest.mark.parametrize("name", NAMES)
  def test_gives_back_parameters_and_config(self, name, folders):
    model = models.load(folders / name)
    _assert_same(model.params, families.params(families.CONFIGS[name]))
    assert model.config == families.CONFIGS[name]
    assert model.tokenizer is None

  def test_writes_the_same_bytes_twice(self, tmp_path, shared):
    model = models.load(shared / "models" / "stories260K")
    rows = {"Teacher": str(shared / "teacher"), "Method": "okd", "Data": "org/data"}
    card = models.Card(rows)
    for name in ("first", "second"):
      models.save(tmp_path / name / "student", *_parts(model), card=card)
    first, second = (
      {p.name: p.read_bytes() for p in (tmp_path / name / "student").iterdir()}
      for name in ("first", "second")
    )
    assert first == second
    assert (
      "| Teacher | teacher |\n| Method | okd |\n| Data | org/data |"
      in first["README.md"].decode()
    )
    assert not any(str(tmp_path).encode() in content for content in first.values())
    assert not any(str(shared).encode() in content for content in first.values())

  def test_reads_what_a_real_folder_holds(self, tmp_path, shared):
    source = shared / "models" / "stories260K"
    model = models.load(source)
    models.save(tmp_path / "copy", *_parts(model))
    copy = models.load(tmp_path / "copy")
    text = "Once upon a time, 12 naïve girls\n\tsaid: “hello”!"
    assert copy.tokenizer(text)["input_ids"] == model.tokenizer(text)["input_ids"]
    assert copy.tokenizer.eos_token == model.tokenizer.eos_token
    assert copy.config == model.config
    original = load_file(source / "model.safetensors")
    written = load_file(tmp_path / "copy" / "model.safetensors")
    for name in written:
      np.testing.assert_array_equal(written[name], original[name])

  @pytest.mark.parametrize("name", ["gpt2", "llama_gqa"])
  def test_shards(self, name, tmp_path):
    tree, config = families.save(name, tmp_path / "model", max_shard_bytes=20_000)
    files = sorted(p.name for p in (tmp_path / "model").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "model/model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == files
    assert index["metadata"]["total_size"] == sum(
      x.nbytes for x in jax.tree.leaves(tree)
    )
    _assert_same(models.load(tmp_path / "model").params, tree)

  @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
  def test_stores_half_precision(self, dtype, tmp_path):
    tree, _ = families.save("gpt2", tmp_path / "model", dtype=dtype)
    rounded = jax.tree.map(lambda x: x.astype(dtype), tree)
    with safetensors.safe_open(tmp_path / "model/model.safetensors", "np") as file:
      kinds = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    assert kinds == {"BF16" if dtype == jnp.bfloat16 else "F16"}
    raw = json.loads((tmp_path / "model/config.json").read_text())
    assert raw["dtype"] == raw["torch_dtype"] == np.dtype(dtype).name
    _assert_same(models.load(tmp_path / "model", dtype=dtype).params, rounded)
    wide = models.load(tmp_path / "model").params
    assert {x.dtype for x in jax.tree.leaves(wide)} == {np.dtype(np.float32)}
    _assert_same(wide, jax.tree.map(lambda x: x.astype(np.float32), rounded))

  def test_replaces_a_model_but_nothing_else(self, tmp_path):
    families.save("gpt2", tmp_path / "model", max_shard_bytes=20_000)
    tree, _ = families.save("llama_gqa", tmp_path / "model")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]
    assert not list((tmp_path / "model").glob("model-*"))
    _assert_same(models.load(tmp_path / "model").params, tree)
    (tmp_path / "model" / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"holds other files \(thesis.tex\)"):
      families.save("llama_gqa", tmp_path / "model")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
      families.save("llama_gqa", tmp_path / "file")

  def test_leaves_nothing_half_written(self, tmp_path, monkeypatch):
    tree, _ = families.save("llama_gqa", tmp_path / "model")

    def fail(*_):
      raise OSError("disk full")

    with monkeypatch.context() as patch:
      patch.setattr(hf, "save_file", fail)
      with pytest.raises(OSError, match="disk full"):
        families.save("gpt2", tmp_path / "model")
      with pytest.raises(OSError, match="disk full"):
        families.save("gpt2", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    _assert_same(models.load(tmp_path / "model").params, tree)
    families.save("gpt2", tmp_path / "new")  # what the failure left is no obstacle
    assert models.load(tmp_path / "new").config.family == "gpt2"


def _parts(model: Model):
  return model.params, model.config, model.tokenizer


class TestConfig:
  @pytest.mark.parametrize("name", ["llama3", "llama_biases", "mistral"])
  @pytest.mark.parametrize("spelling", ["old", "new"])
  def test_reads_both_spellings_of_rope(self, folders, tmp_path, name, spelling):
    folder = shutil.copytree(folders / name, tmp_path / "model")
    drop = {
      "old": {"rope_parameters": ..., "dtype": ...},
      "new": {"rope_theta": ..., "rope_scaling": ..., "torch_dtype": ...},
    }[spelling]
    _edit(folder / "config.json", **drop)
    assert models.load(folder, params=False).config == families.CONFIGS[name]

  def test_reads_the_oldest_spelling_of_linear_scaling(self, folder):
    old = {"rope_parameters": ..., "rope_scaling": {"type": "linear", "factor": 4.0}}
    _edit(folder / "config.json", **old)
    scaling = models.load(folder, params=False).config.rope_scaling
    assert scaling == models.RopeScaling("linear", 4.0)

  def test_token_ids_come_from_both_configs(self, folder):
    _edit(folder / "config.json", eos_token_id=5, bos_token_id=1, pad_token_id=None)
    generation = {"eos_token_id": [9, 5, 8], "bos_token_id": None, "pad_token_id": 3}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    config = models.load(folder, params=False).config
    assert (config.bos_id, config.eos_ids, config.pad_id) == (1, (9, 5, 8), 3)

  def test_token_ids_come_from_the_tokenizer_at_last(self, folder, shared):
    for name in ("tokenizer.json", "tokenizer_config.json"):
      shutil.copy(shared / "models" / "stories260K" / name, folder)
    _edit(folder / "config.json", eos_token_id=None, bos_token_id=..., pad_token_id=7)
    (folder / "generation_config.json").unlink()
    config = models.load(folder, params=False).config
    assert (config.bos_id, config.eos_ids, config.pad_id) == (1, (2,), 7)

  @pytest.mark.parametrize("window", [None, 64, 4096])
  def test_a_sliding_window_is_of_all_layers(self, folders, tmp_path, window):
    folder = shutil.copytree(folders / "mistral", tmp_path / "model")
    _edit(folder / "config.json", sliding_window=window)
    config = models.load(folder, params=False).config
    assert [kind.window for kind in config.kinds] == [window or 0]
    assert config.window(keys=60) == 0
    assert config.window(keys=100) == (64 if window == 64 else 0)

  @pytest.mark.parametrize(
    ("changes", "message"),
    [
      (
        {"model_type": "qwen9"},
        "model_type 'qwen9' is not supported, only gemma, .*llama",
      ),
      ({"model_type": ...}, "model_type None is not supported"),
      ({"hidden_size": ...}, "the key 'hidden_size' is missing"),
      ({"hidden_act": "swishy"}, "activation 'swishy' is not supported"),
      ({"rope_parameters": {"rope_type": "xrope"}}, "rope scaling 'xrope' is not supp"),
      ({"rope_parameters": {"rope_type": "dynamic"}}, "the key 'factor' is missing"),
      ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
      ({"quantization_config": {"bits": 4}}, "quantised weights are not supported"),
      ({"num_key_value_heads": 2}, "num_heads=3 is no multiple of num_kv_heads=2"),
    ],
  )
  def test_names_what_is_wrong(self, folder, changes, message):
    _edit(folder / "config.json", **changes)
    with pytest.raises(UserError, match=message) as error:
      models.load(folder)
    assert str(folder / "config.json") in str(error.value)

  @pytest.mark.parametrize("option", ["scale_attn_weights", "add_cross_attention"])
  def test_refuses_gpt2_options_that_change_the_result(self, folders, tmp_path, option):
    folder = shutil.copytree(folders / "gpt2", tmp_path / "model")
    raw = json.loads((folder / "config.json").read_text())
    _edit(folder / "config.json", **{option: not raw[option]})
    with pytest.raises(UserError, match=f"{option}=.* is not supported"):
      models.load(folder)

  @pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
      ("gpt2", {"position": "rope"}, "position='rope' where it needs 'learned'"),
      ("gpt2", {"mlp_bias": False}, "mlp_bias=False where it needs True"),
      ("llama3", {"qkv_bias": True}, "out_bias=False where it needs True"),
      (
        "llama3",
        {"num_heads": 3, "num_kv_heads": 3},
        "hidden_size=40 where it needs 39",
      ),
      ("mistral", {"mlp_bias": True}, "mlp_bias=True where it needs False"),
    ],
  )
  def test_what_no_folder_can_say_is_refused(self, name, changes, message):
    config = dataclasses.replace(families.CONFIGS[name], **changes)
    with pytest.raises(UserError, match=message):
      hf.hf_config(config)


class TestWeights:
  def test_every_problem_is_in_one_error(self, folder):
    def change(tensors):
      del tensors["model.norm.weight"]
      del tensors["model.layers.1.mlp.up_proj.weight"]
      tensors["model.layers.7.extra"] = np.zeros(2, np.float32)
      tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1].copy()

    _edit_tensors(folder, change)
    with pytest.raises(UserError) as error:
      models.load(folder)
    for part in (
      str(folder),
      "missing: model.norm.weight, model.layers.1.mlp.up_proj.weight;",
      "unexpected: model.layers.7.extra;",
      "misshapen: lm_head.weight [66, 30] instead of [67, 30]",
    ):
      assert part in str(error.value)

  def test_a_config_of_other_sizes_does_not_fit(self, folder):
    _edit(folder / "config.json", num_hidden_layers=2, intermediate_size=50)
    with pytest.raises(UserError) as error:
      models.load(folder)
    assert "unexpected: model.layers.2.input_layernorm.weight" in str(error.value)
    wrong = "model.layers.0.mlp.down_proj.weight [30, 52] instead of [30, 50]"
    assert wrong in str(error.value)

  def test_saving_a_tree_of_another_shape_is_refused(self, tmp_path):
    config = families.CONFIGS["gpt2"]
    tree = families.params(config)
    tree["head"] = tree.pop("position_embed")["embedding"]
    with pytest.raises(UserError) as error:
      models.save(tmp_path / "model", tree, config)
    assert "missing: position_embed/embedding; unexpected: head" in str(error.value)
    assert not (tmp_path / "model").exists()

  @pytest.mark.parametrize("name", ["gpt2", "llama_gqa"])
  def test_the_base_model_prefix_may_be_absent(self, name, folders, tmp_path):
    folder = shutil.copytree(folders / name, tmp_path / "model")
    prefix = {"gpt2": "transformer.", "llama_gqa": "model."}[name]

    def change(tensors):
      for key in list(tensors):
        tensors[key.removeprefix(prefix)] = tensors.pop(key)

    _edit_tensors(folder, change)
    _assert_same(models.load(folder).params, families.params(families.CONFIGS[name]))

  def test_buffers_of_old_versions_are_skipped(self, folders, tmp_path):
    gpt2 = shutil.copytree(folders / "gpt2", tmp_path / "gpt2")
    llama = shutil.copytree(folders / "llama3", tmp_path / "llama3")
    one = np.ones(1, np.float32)
    masks = {f"transformer.h.1.attn.{name}": one for name in ("bias", "masked_bias")}
    _edit_tensors(gpt2, lambda tensors: tensors.update(masks))
    inverse = {"model.layers.0.self_attn.rotary_emb.inv_freq": one}
    _edit_tensors(llama, lambda tensors: tensors.update(inverse))
    for folder in (gpt2, llama):
      models.load(folder)

  def test_a_tied_head_must_equal_the_embedding(self, folders, tmp_path):
    folder = shutil.copytree(folders / "gpt2", tmp_path / "model")

    def add(tensors):
      tensors["lm_head.weight"] = tensors["transformer.wte.weight"].copy()

    _edit_tensors(folder, add)
    models.load(folder)

    def move(tensors):
      tensors["lm_head.weight"][3, 4] += 1

    _edit_tensors(folder, move)
    message = "lm_head.weight differs from transformer.wte.weight"
    with pytest.raises(UserError, match=message):
      models.load(folder)

  def test_each_parameter_is_placed_by_itself(self, folders):
    seen = {}

    def where(path, shape):
      seen[path] = shape
      return jax.sharding.SingleDeviceSharding(jax.devices()[3])

    model = models.load(folders / "llama_gqa", dtype=jnp.bfloat16, where=where)
    wanted = models.parameter_shapes(model.config)
    assert seen == {path: spec.shape for path, spec in wanted.items()}
    assert {x.dtype for x in jax.tree.leaves(model.params)} == {jnp.dtype(jnp.bfloat16)}
    devices = [x.devices() for x in jax.tree.leaves(model.params)]
    assert all(found == {jax.devices()[3]} for found in devices)

  def test_may_be_left_unread(self, folder):
    (folder / "model.safetensors").unlink()
    assert models.load(folder, params=False).params is None

  def test_pickles_are_refused(self, folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"save_pretrained\(safe_serialization=True\)"):
      models.load(folder)

  def test_a_folder_without_weights(self, folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="there is no model.safetensors"):
      models.load(folder)

  @pytest.mark.parametrize("damage", ["truncated", "header", "empty"])
  def test_a_damaged_file_is_named(self, folder, damage):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    damaged = {
      "truncated": content[:-100],
      "header": content[:8] + b"x" * 50 + content[58:],
      "empty": b"",
    }
    path.write_bytes(damaged[damage])
    with pytest.raises(UserError, match="model.safetensors is no readable"):
      models.load(folder)

  def test_a_missing_shard_is_named(self, tmp_path):
    families.save("gpt2", tmp_path / "model", max_shard_bytes=20_000)
    shard = sorted((tmp_path / "model").glob("model-*"))[1]
    shard.unlink()
    with pytest.raises(UserError, match=f"not there: {shard.name}"):
      models.load(tmp_path / "model")

  def test_quantised_tensors_are_named(self, folder):
    def change(tensors):
      tensors["model.norm.weight"] = np.zeros(30, np.int8)

    _edit_tensors(folder, change)
    with pytest.raises(UserError, match="model.norm.weight is I8, not one of"):
      models.load(folder)


class TestPaths:
  def test_no_config(self, folder):
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match="config.json does not exist"):
      models.load(folder)

  @pytest.mark.parametrize("text", ["{", "[]", "\xff"])
  def test_an_unreadable_config(self, folder, text):
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match="config.json .*JSON"):
      models.load(folder)

  def test_an_unreadable_tokenizer(self, folder):
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="the tokenizer cannot be read"):
      models.load(folder)

  def test_a_workdir_stands_for_its_student(self, folders, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.json").write_text('{"train": {"steps": 3}}')
    with pytest.raises(UserError, match="has exported no model yet"):
      models.load(tmp_path)
    shutil.copytree(folders / "llama3", tmp_path / "student")
    assert models.load(tmp_path).config == families.CONFIGS["llama3"]

  def test_an_adapter_is_no_model(self, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="holds an adapter, not a model"):
      models.load(tmp_path)

  @pytest.mark.parametrize("path", ["/no/such/thing", "./nothing", "a/b/c", "x.bin y"])
  def test_a_path_that_is_not_there(self, path):
    with pytest.raises(UserError, match="no such file or folder"):
      models.load(path)

  def test_a_file_of_another_kind(self, folder):
    with pytest.raises(UserError, match="is a file, but no .gguf"):
      models.load(folder / "config.json")

  def test_a_hub_id_is_fetched(self, folders, monkeypatch):
    calls = []

    def fetch(name, **kwargs):
      calls.append((name, kwargs))
      return str(folders / "mistral")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert models.load("org/tiny-mistral").config == families.CONFIGS["mistral"]
    ((name, kwargs),) = calls
    assert name == "org/tiny-mistral"
    patterns = kwargs["allow_patterns"]
    assert {"*.json", "*.safetensors"} <= set(patterns)
    assert not any("bin" in pattern or ".py" in pattern for pattern in patterns)

  def test_a_hub_that_fails_gives_one_sentence(self, monkeypatch):
    def fail(*_, **__):
      raise ConnectionError("no route to host\nand much more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError) as error:
      models.load("gpt2-xxl")
    assert str(error.value) == (
      "gpt2-xxl is no local file or folder and cannot be fetched from the hub: "
      "no route to host"
    )


class TestParity:
  """Against transformers' torch models, over 200 tokens or the model's limit."""

  @pytest.fixture(autouse=True)
  def torch(self):
    return pytest.importorskip("torch")

  @pytest.mark.parametrize("name", WITH_TORCH)
  def test_our_folder_in_transformers(self, name, folders):
    reference = families.torch_model(folders / name)
    config = families.CONFIGS[name]
    tokens = families.tokens(config, seed=5)
    model = models.load(folders / name)
    np.testing.assert_allclose(
      _logits(model, tokens), families.torch_logits(reference, tokens), atol=1e-4
    )
    generation = reference.generation_config
    eos = generation.eos_token_id
    eos = eos if isinstance(eos, list) else [] if eos is None else [eos]
    assert tuple(eos) == config.eos_ids
    assert generation.bos_token_id == config.bos_id

  @pytest.mark.parametrize("name", WITH_TORCH)
  def test_their_folder_here_and_back(self, name, folders, tmp_path, torch):
    reference = families.torch_model(folders / name)
    torch.manual_seed(1)
    with torch.no_grad():
      for weight in reference.parameters():
        weight += 0.1 * torch.randn_like(weight)
    reference.save_pretrained(tmp_path / "theirs")
    model = models.load(tmp_path / "theirs")
    tokens = families.tokens(model.config, seed=6)
    expected = families.torch_logits(reference, tokens)
    np.testing.assert_allclose(_logits(model, tokens), expected, atol=1e-4)
    models.save(tmp_path / "ours", model.params, model.config)
    back = families.torch_model(tmp_path / "ours")
    np.testing.assert_array_equal(families.torch_logits(back, tokens), expected)

  @pytest.mark.parametrize("name", WITH_TORCH)
  def test_padded_batches(self, name, folders):
    reference = families.torch_model(folders / name)
    model = models.load(folders / name)
    tokens = families.tokens(model.config, batch=4)
    segments = np.ones_like(tokens)
    segments[0, :9] = segments[1, -13:] = segments[2, :70] = 0
    expected = families.torch_logits(reference, tokens, segments)
    logits = _logits(model, tokens, segments)
    real = segments.astype(bool)
    np.testing.assert_allclose(logits[real], expected[real], atol=1e-4)

  @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
  def test_half_precision_and_shards(self, dtype, tmp_path):
    families.save("llama3", tmp_path / "m", dtype=dtype, max_shard_bytes=10_000)
    reference = families.torch_model(tmp_path / "m")
    model = models.load(tmp_path / "m")
    tokens = families.tokens(model.config)
    expected = families.torch_logits(reference, tokens)
    np.testing.assert_allclose(_logits(model, tokens), expected, atol=1e-4)

  def test_a_real_model(self, shared, tmp_path, torch):
    """TinyStories: logits, export, tokenizer and greedy text agree."""
    import transformers

    model = models.load(shared / "models" / "stories260K")
    models.save(tmp_path / "copy", *_parts(model))
    reference = families.torch_model(tmp_path / "copy")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "copy")
    prompt = "Once upon a time, there was a little girl named Lily. She liked to"
    ids = [1, *tokenizer(prompt)["input_ids"]]
    assert ids[1:] == model.tokenizer(prompt)["input_ids"]
    with torch.no_grad():
      theirs = reference.generate(
        torch.tensor([ids]), max_new_tokens=96 - len(ids), do_sample=False
      )[0].tolist()
    expected = families.torch_logits(reference, [theirs])
    logits = _logits(model, np.asarray([theirs], np.int32))
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    chosen = logits[0, len(ids) - 1 : -1].argmax(-1).tolist()
    assert chosen == theirs[len(ids) :] and len(chosen) > 60
