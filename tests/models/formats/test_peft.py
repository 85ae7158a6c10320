"""Online modules in PEFT's format; whatever needs peft itself is skipped without it."""

import dataclasses
import functools
import json
import math
import shutil

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from safetensors.numpy import load_file, save_file

from okd_jax import models
from okd_jax.errors import UserError
from okd_jax.models import Decoder
from okd_jax.models.adapters import Adapter, Lora, Prefix, Prompt, make, prompt_vectors
from okd_jax.run.export import _base_model

EVERYTHING = ("query", "key", "value", "out", "gate", "up", "down")
CASES = {
  "llama_gqa": [
    Lora(rank=4, scale=1.5),
    Lora(rank=3, scale=0.3, targets=EVERYTHING, layers=2),
  ],
  "mistral": [Lora(rank=1, targets=("out", "down"), layers=1)],
  "gpt2": [
    Lora(rank=4, scale=1.5),
    Lora(rank=2, scale=0.3, targets=("value",), layers=2),
    Lora(rank=3, targets=("key", "out", "up", "down"), layers=1),
  ],
  # Of one layer of theirs: parts that are not equally wide, and two of two.
  "phi3": [Lora(rank=2, scale=0.7, targets=("query", "value", "gate", "out"))],
}
PAIRS = [(name, config) for name, configs in CASES.items() for config in configs]
PREFIX, PROMPT = Prefix(length=5), Prompt(length=5)
VIRTUAL = [(name, c) for name in ("llama_gqa", "mistral") for c in (PREFIX, PROMPT)]


def _adapter(name: str, config: Adapter):
  """A random adapter: both matrices away from zero."""
  decoder = Decoder(families.CONFIGS[name], adapter=config)
  tokens = jnp.zeros((1, 1), jnp.int32)
  shapes = jax.eval_shape(decoder.init, jax.random.key(0), tokens)["adapter"]
  rng = np.random.default_rng(4)
  return jax.tree.map(lambda s: 0.3 * rng.standard_normal(s.shape, np.float32), shapes)


def _logits(name, adapter, config: Adapter | None, tokens):
  model_config = families.CONFIGS[name]
  params = families.params(model_config)
  variables = {"params": params, "adapter": adapter}
  hidden, _ = jax.jit(Decoder(model_config, adapter=config).apply)(variables, tokens)
  return models.unembed(hidden, models.head_kernel(params, model_config))


def _save(folder, name, config, adapter=None):
  adapter = _adapter(name, config) if adapter is None else adapter
  models.save_adapter(folder, adapter, config, families.CONFIGS[name], "org/base")
  return adapter


@pytest.mark.parametrize(("name", "config"), PAIRS)
def test_gives_back_the_same_adapter(name, config, tmp_path):
  adapter = _save(tmp_path / "adapter", name, config)
  tree, back = models.load_adapter(tmp_path / "adapter", families.CONFIGS[name])
  assert back == config
  jax.tree.map(np.testing.assert_array_equal, tree, adapter)


def test_writes_the_same_bytes_twice(tmp_path):
  for folder in ("first", "second"):
    _save(tmp_path / folder, *PAIRS[3])
  first, second = (
    {p.name: p.read_bytes() for p in (tmp_path / folder).iterdir()}
    for folder in ("first", "second")
  )
  assert first == second
  assert set(first) == {"adapter_config.json", "adapter_model.safetensors"}


def test_gpt2_pairs_are_one_block_pair_on_the_fused_layer(tmp_path):
  config = Lora(rank=4, scale=1.5)
  adapter = _save(tmp_path / "adapter", "gpt2", config)
  raw = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
  assert (raw["r"], raw["lora_alpha"], raw["fan_in_fan_out"]) == (8, 12, True)
  assert raw["target_modules"] == ["c_attn"] and not raw["rank_pattern"]
  tensors = load_file(tmp_path / "adapter/adapter_model.safetensors")
  key = "base_model.model.transformer.h.1.attn.c_attn.lora_"
  query, value = (adapter["layers"]["attention"][n] for n in ("query", "value"))
  a = np.concatenate([query["down"][1], value["down"][1]], 1).T
  np.testing.assert_array_equal(tensors[f"{key}A.weight"], a)
  b = np.zeros((90, 8), np.float32)
  b[:30, :4], b[60:, 4:] = query["up"][1].T, value["up"][1].T
  np.testing.assert_array_equal(tensors[f"{key}B.weight"], b)


def test_ranks_that_differ_go_to_patterns(tmp_path):
  config = Lora(rank=3, scale=2.0, targets=("query", "value", "down"))
  _save(tmp_path / "adapter", "gpt2", config)
  raw = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
  assert raw["target_modules"] == ["c_attn", "mlp.c_proj"]
  assert (raw["r"], raw["lora_alpha"]) == (3, 6)
  assert raw["rank_pattern"] == {"c_attn": 6}
  assert raw["alpha_pattern"] == {"c_attn": 12}


class TestVirtualTokens:
  """Prefixes and prompts: one tensor, and no more than PEFT's own file holds."""

  @pytest.mark.parametrize("name", ["llama_gqa", "gpt2"])
  @pytest.mark.parametrize("layers", [0, 2])
  def test_prefix_comes_back(self, name, layers, tmp_path):
    config = dataclasses.replace(PREFIX, layers=layers)
    adapter = _save(tmp_path / "adapter", name, config)
    tree, back = _load(tmp_path / "adapter", name)
    assert back == config
    atol = 1e-6 if (name, layers) == ("llama_gqa", 0) else 0  # turned and turned back
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=atol)
    jax.tree.map(close, tree, adapter)

  @pytest.mark.parametrize("name", ["llama_gqa", "gpt2"])
  def test_prompt_comes_back_without_its_mlp(self, name, tmp_path):
    adapter = _save(tmp_path / "first", name, PROMPT)
    tree, config = _load(tmp_path / "first", name)
    vectors = prompt_vectors(adapter["prompt"])
    assert config == PROMPT and vectors.shape == (5, 30)
    np.testing.assert_array_equal(tree["prompt"]["vectors"], vectors)
    _save(tmp_path / "second", name, config, tree)
    again, _ = _load(tmp_path / "second", name)
    np.testing.assert_array_equal(again["prompt"]["vectors"], vectors)

  def test_a_prompt_of_a_text_comes_back(self, tmp_path):
    config = Prompt(length=5, ids=(3, 1))
    adapter = _save(tmp_path / "adapter", "llama_gqa", config)
    tree, back = _load(tmp_path / "adapter")
    assert back == config and set(adapter["prompt"]) == {"vectors"}
    jax.tree.map(np.testing.assert_array_equal, tree, adapter)

  def test_layout(self, tmp_path):
    """A virtual token's row: key and value of layer 0, key and value of layer 1, …"""
    adapter = _save(tmp_path / "adapter", "gpt2", PREFIX)
    tensors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    pair = adapter["layers"]["attention"]
    key, value = (pair[f"prefix_{n}"].reshape(3, 5, 30) for n in ("key", "value"))
    row = np.concatenate([x[n, 2] for n in range(3) for x in (key, value)])
    np.testing.assert_array_equal(tensors["prompt_embeddings"][2], row)

  @pytest.mark.parametrize(
    ("name", "config", "reason"),
    [
      ("gpt2", PREFIX, "shifts the positions of the text"),
      ("gpt2", PROMPT, "shifts the positions of the text"),
      ("llama_gqa", dataclasses.replace(PREFIX, layers=1), "in all layers or none"),
      ("llama_gqa", PREFIX, ""),
      ("llama_gqa", PROMPT, ""),
    ],
  )
  def test_says_where_peft_would_differ(self, name, config, reason, tmp_path, caplog):
    _save(tmp_path / "adapter", name, config)
    path = tmp_path / "adapter/adapter_model.safetensors"
    with safetensors.safe_open(path, framework="np") as file:
      note = json.loads(file.metadata()["okd_jax"])
    assert reason in note.get("peft_differs_because", "")
    assert bool(reason) == ("peft_differs_because" in note) == bool(caplog.text)

  def test_reads_a_stranger_that_means_the_same(self, tmp_path):
    folder = tmp_path / "adapter"
    vectors = prompt_vectors(_save(folder, "llama_gqa", PROMPT)["prompt"])
    _edit(folder, peft_type="PROMPT_TUNING")
    tree, config = _load(folder)
    assert config == PROMPT
    np.testing.assert_array_equal(tree["prompt"]["vectors"], vectors)
    with pytest.raises(UserError, match=r"is \[5, 30\], the model needs \[5, 40\]"):
      _load(folder, "llama3")
    with pytest.raises(UserError, match="shifts the positions"):
      _load(folder, "gpt2")
    _edit(folder, lambda tensors: tensors.update(more=np.zeros(1, np.float32)))
    with pytest.raises(UserError, match="not prompt_embeddings alone"):
      _load(folder)


@pytest.mark.parametrize(
  ("config", "own"),
  [
    (Lora(rank=3, layers=2), {"kind": "lora", "rank": 3, "layers": 2}),
    (dataclasses.replace(PREFIX, layers=2), {"kind": "prefix", "layers": 2}),
    (PROMPT, {"kind": "prompt"}),
  ],
)
def test_reads_the_note_of_an_older_folder(config, own, tmp_path):
  """There one class had the fields of all kinds, and a note named every one."""
  folder = tmp_path / "adapter"
  adapter = _save(folder, "llama_gqa", config)
  old = {"kind": "lora", "rank": 32, "scale": 1.0, "targets": ["query", "value"]}
  old |= {"layers": 0, "length": 5, "blocks": []} | own
  path = folder / "adapter_model.safetensors"
  save_file(load_file(path), path, {"okd_jax": json.dumps(old, sort_keys=True)})
  tree, back = _load(folder)
  assert back == config
  if not isinstance(config, Prompt):
    jax.tree.map(np.testing.assert_array_equal, tree, adapter)


def test_a_note_of_another_kind_is_not_taken_for_ours(tmp_path):
  folder = tmp_path / "adapter"
  _save(folder, "llama_gqa", PREFIX)
  path = folder / "adapter_model.safetensors"
  save_file(load_file(path), path, {"okd_jax": json.dumps({"kind": "lora"})})
  assert _load(folder)[1] == PREFIX


@pytest.fixture
def folder(tmp_path):
  """An adapter on a LLaMA's query and value, without our note: a stranger's."""
  config = Lora(rank=4, scale=0.5)
  _save(tmp_path / "adapter", "llama_gqa", config)
  _edit(tmp_path / "adapter")
  return tmp_path / "adapter"


def _edit(folder, change=lambda tensors: None, **keys):
  """Rewrites an adapter as somebody else's program might have."""
  path = folder / "adapter_config.json"
  path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))
  path = folder / "adapter_model.safetensors"
  tensors = load_file(path)
  change(tensors)
  save_file(tensors, path, {"format": "pt"})


def _load(folder, name="llama_gqa"):
  return models.load_adapter(folder, families.CONFIGS[name])


def test_reads_a_stranger(folder):
  tree, config = _load(folder)
  assert config == Lora(rank=4, scale=0.5)
  expected = _adapter("llama_gqa", config)
  jax.tree.map(np.testing.assert_array_equal, tree, expected)


def test_reads_rank_stabilised_scaling(folder):
  """rsLoRA divides lora_alpha by the root of the rank."""
  _edit(folder, use_rslora=True, lora_alpha=6)
  assert _load(folder)[1].scale == pytest.approx(6 / math.sqrt(4))


@pytest.mark.parametrize(
  ("keys", "message"),
  [
    ({"bias": "all"}, "bias='all'"),
    ({"use_dora": True}, "use_dora=True"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save="),
    ({"peft_type": "IA3"}, "peft_type='IA3'"),
    ({"bias": "lora_only"}, "bias='lora_only'"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
  ],
)
def test_names_options_that_we_do_not_compute(folder, keys, message):
  _edit(folder, **keys)
  with pytest.raises(UserError, match=f"this adapter is not supported: {message}"):
    _load(folder)


def test_options_come_before_the_tensors_that_they_bring(folder):
  extra = "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"
  _edit(folder, lambda t: t.update({extra: np.ones(3, np.float32)}), use_dora=True)
  with pytest.raises(UserError, match="not supported: use_dora=True"):
    _load(folder)


def test_lora_alpha_has_pefts_default(folder):
  path = folder / "adapter_config.json"
  raw = json.loads(path.read_text())
  del raw["lora_alpha"]
  path.write_text(json.dumps(raw))
  assert _load(folder)[1].scale == 8 / 4


def test_empty_tensors_are_explained(folder):
  key = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
  _edit(folder, lambda t: t.update({key: np.zeros(0, np.float32)}))
  with pytest.raises(UserError, match=f"{key} is empty, as DeepSpeed's ZeRO stage 3"):
    _load(folder)


def test_layers_may_be_any(folder):
  """Those without a pair between or above get one of zeros."""

  def drop(tensors):
    for name in [name for name in tensors if ".layers.1." not in name]:
      del tensors[name]

  _edit(folder, drop)
  tree, config = _load(folder)
  assert config == Lora(rank=4, scale=0.5, layers=2)
  whole = _adapter("llama_gqa", Lora(rank=4, scale=0.5))
  jax.tree.map(
    lambda own, all: np.testing.assert_array_equal(own[0], all[1]), tree, whole
  )
  assert not any(np.any(leaf[1]) for leaf in jax.tree.leaves(tree))


def test_ranks_and_scales_may_differ(folder):
  """By layer and module, as rank_pattern and alpha_pattern say."""
  key = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"

  def cut(tensors):
    tensors[key.format("A")] = tensors[key.format("A")][:2].copy()
    tensors[key.format("B")] = tensors[key.format("B")][:, :2].copy()

  patterns = {"layers.0.self_attn.q_proj": 6}
  ranks = {"layers.0.self_attn.q_proj": 2}
  _edit(folder, cut, rank_pattern=ranks, alpha_pattern=patterns)
  tree, config = _load(folder)
  assert config == Lora(rank=4, scale=1.0)
  whole = _adapter("llama_gqa", Lora(rank=4, scale=0.5))
  for name, scale in (("query", 0.5), ("value", 0.5)):
    ours, theirs = (x["layers"]["attention"][name] for x in (tree, whole))
    want = scale * np.einsum("ndr,nrh->ndh", theirs["down"], theirs["up"])
    if name == "query":
      want[0] = 3 * theirs["down"][0, :, :2] @ theirs["up"][0, :2]
    got = np.einsum("ndr,nrh->ndh", ours["down"], ours["up"])
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_tensors_of_another_model_are_named(folder):
  extra = "base_model.model.model.embed_tokens.lora_embedding_A"

  def change(tensors):
    tensors[extra] = np.zeros((2, 2), np.float32)
    del tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"]

  _edit(folder, change)
  with pytest.raises(UserError) as error:
    _load(folder)
  assert f"tensors that no such model has: {extra}" in str(error.value)
  assert "only one of A and B: self_attn.q_proj of layer 0" in str(error.value)


def _halve_inputs(tensors):
  for name in tensors:
    if "lora_A" in name:
      tensors[name] = tensors[name][:, ::2].copy()


def test_an_adapter_of_another_size_does_not_fit(folder, tmp_path):
  with pytest.raises(UserError, match="adapts layer 2, but the model has 2"):
    _load(folder, "mistral")
  _edit(folder, _halve_inputs)
  with pytest.raises(UserError, match=r"query/down is \(3, 15, 4\), .* \(3, 30, 4\)"):
    _load(folder)
  _save(tmp_path / "own", "llama_gqa", Lora(rank=2))
  with pytest.raises(UserError, match="does not fit"):
    _load(tmp_path / "own", "llama3")
  with pytest.raises(UserError, match="tensors that no such model has"):
    _load(tmp_path / "own", "gpt2")


def test_pickles_and_damage_are_refused(folder):
  path = folder / "adapter_model.safetensors"
  path.write_bytes(path.read_bytes()[:-40])
  with pytest.raises(UserError, match="adapter_model.safetensors is no readable"):
    _load(folder)
  path.rename(folder / "adapter_model.bin")
  with pytest.raises(UserError, match="does not exist; pickled adapters are not read"):
    _load(folder)
  (folder / "adapter_config.json").unlink()
  with pytest.raises(UserError, match="adapter_config.json does not exist"):
    _load(folder)


def test_a_tree_that_is_not_the_configs_is_refused(tmp_path):
  adapter = _adapter("gpt2", Lora(rank=2))
  with pytest.raises(UserError, match=r"query/down is \(3, 30, 2\), .* \(3, 30, 3\)"):
    _save(tmp_path / "adapter", "gpt2", Lora(rank=3), adapter)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
  """Folders of the models that the adapters belong to, for peft to open."""
  pytest.importorskip("torch")
  pytest.importorskip("peft")
  root = tmp_path_factory.mktemp("bases")
  for name in CASES:
    families.save(name, root / name)
  return root


# peft 0.21 still uses two names that transformers 5 has changed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.filterwarnings("ignore:`past_key_values`:FutureWarning")
class TestPeft:
  @pytest.mark.parametrize(("name", "config"), PAIRS + VIRTUAL)
  def test_opens_ours(self, name, config, bases, tmp_path):
    import peft

    base = families.torch_model(bases / name)
    adapter = _save(tmp_path / "adapter", name, config)
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    tokens = families.tokens(families.CONFIGS[name])
    logits = _logits(name, adapter, config, tokens)
    # A prompt's own logits come first.
    expected = families.torch_logits(adapted, tokens)[:, -tokens.shape[1] :]
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    plain = _logits(name, {}, None, tokens)
    assert jnp.abs(logits - plain).max() > 0.1

  @pytest.mark.parametrize("kind", ["prefix", "prompt"])
  def test_ours_opens_its_virtual_tokens(self, kind, bases, tmp_path):
    """As peft trains and saves them, each with its own MLP."""
    import peft
    import torch

    torch.manual_seed(0)
    options = {
      "prefix": peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, prefix_projection=True
      ),
      "prompt": peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    }[kind]
    base = families.torch_model(bases / "llama_gqa")
    adapted = peft.get_peft_model(base, options).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    adapter, config = _load(tmp_path / "adapter")
    assert config == make(kind, length=4)
    tokens = families.tokens(families.CONFIGS["llama_gqa"])
    expected = families.torch_logits(adapted, tokens)[:, -tokens.shape[1] :]
    logits = _logits("llama_gqa", adapter, config, tokens)
    np.testing.assert_allclose(logits, expected, atol=1e-4)

  @pytest.mark.parametrize(
    ("name", "modules", "targets"),
    [
      ("llama_gqa", ["q_proj", "v_proj"], ("query", "value")),
      ("gpt2", ["c_attn"], ("query", "key", "value")),
    ],
  )
  def test_ours_opens_its(self, name, modules, targets, bases, tmp_path):
    """GPT-2's one pair on c_attn becomes three with the same first matrix."""
    import peft
    import torch

    base = families.torch_model(bases / name)
    options = peft.LoraConfig(
      r=3,
      lora_alpha=7,
      target_modules=modules,
      fan_in_fan_out=name == "gpt2",
      layers_to_transform=[1, 2],
      layers_pattern={"gpt2": "h", "llama_gqa": "layers"}[name],
    )
    adapted = peft.get_peft_model(base, options).eval()
    torch.manual_seed(0)
    with torch.no_grad():
      for key, weight in adapted.named_parameters():
        if "lora_" in key:
          weight.copy_(0.3 * torch.randn_like(weight))
    adapted.save_pretrained(tmp_path / "adapter")
    adapter, config = models.load_adapter(tmp_path / "adapter", families.CONFIGS[name])
    assert config == Lora(rank=3, scale=7 / 3, targets=targets, layers=2)
    tokens = families.tokens(families.CONFIGS[name])
    np.testing.assert_allclose(
      _logits(name, adapter, config, tokens),
      families.torch_logits(adapted, tokens),
      atol=1e-4,
    )
    shutil.rmtree(tmp_path / "adapter")
    _save(tmp_path / "adapter", name, config, adapter)
    again = peft.PeftModel.from_pretrained(
      families.torch_model(bases / name), tmp_path / "adapter"
    )
    np.testing.assert_allclose(
      families.torch_logits(again.eval(), tokens),
      families.torch_logits(adapted, tokens),
      atol=1e-4,
    )

  @pytest.mark.parametrize(
    "options",
    [
      {
        "rank_pattern": {"q_proj": 5},
        "alpha_pattern": {"layers.1.self_attn.v_proj": 9},
      },
      {"use_rslora": True, "rank_pattern": {"layers.0.self_attn.q_proj": 1}},
      {"layers_to_transform": [0], "layers_pattern": "layers"},
      {"layers_to_transform": [0, 2], "layers_pattern": "layers", "lora_alpha": 3},
    ],
  )
  def test_reads_what_peft_writes_with_patterns(self, options, bases, tmp_path):
    import peft
    import torch

    torch.manual_seed(0)
    own = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]} | options
    base = families.torch_model(bases / "llama_gqa")
    adapted = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **own))
    with torch.no_grad():
      for name, weight in adapted.named_parameters():
        if "lora_" in name:
          weight.copy_(0.3 * torch.randn_like(weight))
    adapted.save_pretrained(tmp_path / "adapter")
    adapter, config = _load(tmp_path / "adapter")
    tokens = families.tokens(families.CONFIGS["llama_gqa"])
    np.testing.assert_allclose(
      _logits("llama_gqa", adapter, config, tokens),
      families.torch_logits(adapted.eval(), tokens),
      atol=1e-4,
    )

  def test_the_folder_names_a_base_that_peft_finds_from_anywhere(
    self, bases, tmp_path, monkeypatch
  ):
    import peft

    config = Lora(rank=2)
    adapter, model = _adapter("llama_gqa", config), families.CONFIGS["llama_gqa"]
    base = _base_model(str(bases / "llama_gqa"))
    models.save_adapter(tmp_path / "adapter", adapter, config, model, base)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    adapted = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    tokens = families.tokens(model)
    np.testing.assert_allclose(
      _logits("llama_gqa", adapter, config, tokens),
      families.torch_logits(adapted.float().eval(), tokens),
      atol=1e-4,
    )
