"""What every family must do, beside having transformers' logits (test_transformer)."""

import dataclasses
import functools
import json
import math

import families
import jax
import jax.numpy as jnp
import numpy as np
import optax
import plain_decoder
import pytest
from transformers import CONFIG_MAPPING

from okd_jax import models
from okd_jax.errors import UserError
from okd_jax.models import Decoder, LayerKind, ModelConfig, RopeScaling, experts
from okd_jax.models.adapters import Lora
from okd_jax.models.formats.families import FAMILIES
from okd_jax.models.formats.families.family import REQUIRED
from okd_jax.models.formats.hf import hf_config
from okd_jax.runtime import sharding

# One of each family, with the most that it can have; the others take minutes.
NEW = (
  "gemma2",
  "gemma3",
  "granite",
  "olmo3",
  "opt_350m",
  "phi3_long",
  "qwen2_window",
  "qwen3_moe",
  "smollm3_window",
)
QUICK = ("gemma3", "qwen3_moe", "opt_350m")


def some(names, quick):
  return [n if n in quick else pytest.param(n, marks=pytest.mark.slow) for n in names]


# Every field that a family brought, and what it is without.
FIELDS = [
  ("qwen3", "qk_norm", ""),
  ("olmo2", "qk_norm", ""),
  ("olmo2", "norm_place", "before"),
  ("gemma2", "norm_place", "on_output"),
  ("gemma2", "norm_from_one", False),
  ("gemma2", "embed_scale", 1.0),
  ("gemma2", "attention_scale", 0.0),
  ("gemma2", "attention_cap", 0.0),
  ("gemma2", "logit_cap", 0.0),
  ("gemma3", "layer_kinds", (LayerKind(11), LayerKind(), LayerKind(11))),  # the bases
  ("gemma3", "rope_scaling", None),
  ("mistral_window", "layer_kinds", ()),
  ("ministral", "layer_kinds", (LayerKind(9),) * 3),
  ("smollm3", "layer_kinds", ()),
  ("olmo3", "rope_scaling", None),
  ("phi3", "rotary_share", 1.0),
  ("phi3_long", "rope_scaling", None),
  ("granite", "residual_scale", 1.0),
  ("granite", "logit_divisor", 1.0),
  ("granite", "attention_scale", 0.0),
  ("opt", "position", "none"),
  ("opt_350m", "norm_place", "before"),
  ("qwen3_moe", "normalize_experts", False),
  ("qwen3_moe", "experts_per_token", 1),
]


@pytest.mark.parametrize("name, field, without", FIELDS)
def test_the_golden_logits_need_every_field(name, field, without):
  """So that a decoder that forgot it would fail test_transformer."""
  config = families.CONFIGS[name]
  tokens = families.tokens(config, 1)[0]
  changed = dataclasses.replace(config, **{field: without})
  params = families.params(config)
  if field == "norm_place":  # the norms are there under other names
    layers = params["layers"]
    for part in ("attention", "mlp"):
      norms = [
        v for k, v in layers.items() if k in (f"{part}_norm", f"{part}_out_norm")
      ]
      layers |= {f"{part}_norm": norms[0], f"{part}_out_norm": norms[-1]}
  other = plain_decoder.logits(changed, params, tokens)[7::16]
  assert np.abs(other - np.load(families.GOLDEN)[name]).max() > 1e-2


@pytest.mark.parametrize("name", some(NEW, QUICK))
def test_a_cache_changes_nothing(name):
  """A prompt longer than the windows, then token by token, one row padded."""
  config = families.CONFIGS[name]
  decoder = Decoder(config)
  variables = {"params": families.params(config)}
  tokens = jnp.asarray(families.tokens(config, 2, 52, seed=2))
  segments = jnp.ones((2, 52), jnp.int32).at[0, :9].set(0)
  positions = models.positions_from_segments(segments)
  step = jax.jit(decoder.apply)
  whole, _ = step(variables, tokens, segments)
  cache = models.init_cache(config, 2, 60)
  pieces = []
  for start, stop in [(0, 40), *((i, i + 1) for i in range(40, 52))]:
    part = (x[:, start:stop] for x in (tokens, segments, positions))
    hidden, cache = step(variables, *part, cache)
    pieces.append(hidden)
  real = segments[..., None]
  np.testing.assert_allclose(jnp.concatenate(pieces, 1) * real, whole * real, atol=2e-4)


@pytest.mark.parametrize("name", some(NEW, QUICK))
def test_texts_in_one_row_do_not_see_each_other(name):
  config = families.CONFIGS[name]
  lengths = (17, 30, 17)
  parts = [families.tokens(config, 1, n, seed=n) for n in lengths]
  segments = np.concatenate([np.full((1, n), i + 1) for i, n in enumerate(lengths)], 1)
  run = jax.jit(Decoder(config).apply)
  variables = {"params": families.params(config)}
  packed, _ = run(variables, np.concatenate(parts, 1), segments)
  alone = np.concatenate([run(variables, part)[0] for part in parts], 1)
  np.testing.assert_allclose(packed, alone, atol=1e-4)


def test_longrope_goes_by_the_length_of_each_text():
  """Not by that of its row or batch, as transformers does."""
  config = families.CONFIGS["phi3_long"]  # another set beyond 64 tokens
  long, short = (families.tokens(config, 1, n, seed=n) for n in (70, 20))
  segments = np.array([[1] * 70 + [2] * 20])
  run = jax.jit(Decoder(config).apply)
  variables = {"params": families.params(config)}
  both, _ = run(variables, np.concatenate([long, short], 1), segments)
  for part, place in ((long, slice(70)), (short, slice(70, None))):
    np.testing.assert_allclose(run(variables, part)[0], both[:, place], atol=1e-4)


@pytest.mark.parametrize("name", some(NEW, ("qwen3_moe",)))
def test_five_steps_of_training(name):
  """All parameters, and modules in the layers, move and lower the loss."""
  config = families.CONFIGS[name]
  decoder = Decoder(config, Lora(rank=2))
  tokens = families.tokens(config, 2, 24)
  variables = jax.jit(decoder.init)(jax.random.key(0), tokens)
  params = jax.tree.map(jnp.asarray, families.params(config))
  state = {"params": params, "adapter": variables["adapter"]}
  optimizer = optax.adam(3e-3)

  @jax.jit
  def step(state, moments):
    def loss(state):
      hidden, _ = decoder.apply(state, tokens[:, :-1])
      logits = models.logits(hidden, state["params"], config)
      labels = tokens[:, 1:]
      return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    value, grads = jax.value_and_grad(loss)(state)
    updates, moments = optimizer.update(grads, moments)
    return optax.apply_updates(state, updates), moments, value, grads

  losses, moments = [], optimizer.init(state)
  for _ in range(5):
    state, moments, value, grads = step(state, moments)
    losses.append(float(value))
  assert all(b < a for a, b in zip(losses, losses[1:], strict=False))
  still = [
    jax.tree_util.keystr(path)
    for path, grad in jax.tree_util.tree_leaves_with_path(grads)
    if not jnp.isfinite(grad).all() or not jnp.abs(grad).max() > 0
  ]
  # A bias of all keys alike moves all scores alike, which no softmax sees.
  assert [path for path in still if "'key']['bias']" not in path] == []


@pytest.mark.parametrize("name", ["gemma3", "olmo3"])
def test_depth_costs_no_program(name):
  """Layers of several kinds are one scan, however many there are."""
  config = families.CONFIGS[name]

  def equations(times):
    deep = config.of_layers([*range(config.num_layers)] * times)
    tokens = jnp.zeros((1, 40), jnp.int32)
    params = jax.eval_shape(Decoder(deep).init, jax.random.key(0), tokens)
    return str(jax.make_jaxpr(Decoder(deep).apply)(params, tokens)).count("\n")

  assert equations(1) == equations(4)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_random_model_of_any_family_can_be_exported(family):
  config = models.preset(family, hidden_size=24, num_layers=3, num_heads=3)
  assert hf_config(config)["model_type"] == family
  assert hf_config(config.of_layers([0, 2]))["model_type"] == family


@pytest.mark.parametrize(
  "name, changes, message",
  [
    ("qwen3", {"attention_cap": 5.0}, "attention_cap=5.0 where it needs 0.0"),
    ("llama3", {"experts": 4}, "experts=4 where it needs 0"),
    ("llama3", {"embed_scale": 2.0}, "embed_scale=2.0 where it needs 1.0"),
    ("gemma2", {"embed_scale": 2.0}, "embed_scale=2.0 where it needs 6.0"),
    ("olmo2", {"head_dim": 8}, "head_dim=8 where it needs 6"),
    (
      "qwen2",
      {"layer_kinds": (LayerKind(3), LayerKind(4), LayerKind())},
      "it has windows of 3, 4 tokens",
    ),
    (
      "mistral",
      {"layer_kinds": (LayerKind(3), LayerKind())},
      "the mistral layout cannot hold this model: layer_kinds",
    ),
    (
      "gemma3",
      {"layer_kinds": (LayerKind(3, rope_theta=5.0), LayerKind(3), LayerKind())},
      "the gemma3_text layout cannot hold this model: layer_kinds",
    ),
    ("phi3", {"rope_scaling": RopeScaling("linear", 2.0)}, "needs 'longrope' or none"),
  ],
)
def test_what_a_family_cannot_say_is_refused(name, changes, message):
  config = dataclasses.replace(families.CONFIGS[name], **changes)
  with pytest.raises(UserError, match=message):
    hf_config(config)


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"experts": 2, "experts_per_token": 3}, "experts_per_token=3 must lie between"),
    ({"layer_kinds": (LayerKind(3),)}, "layer_kinds has 1 of them for num_layers=2"),
    ({"rotary_share": 0.0}, "rotary_share=0.0 must be above 0"),
    ({"rotary_share": 0.2}, "head_dim=16 times 0.2 must be even"),
    ({"rope_scaling": RopeScaling("longrope")}, "has 0 short_factors for 8 pairs"),
    ({"norm_place": "after"}, "norm_place='after' is none of before, on_output"),
  ],
)
def test_a_config_that_no_decoder_has(fields, message):
  with pytest.raises(UserError, match=message):
    ModelConfig(**fields)


def test_experts_take_no_modules():
  config = families.CONFIGS["qwen3_moe"]
  with pytest.raises(UserError, match="names 'down', 'up', but the model's MLPs are"):
    Lora(targets=("query", "up", "down")).check(config)
  Lora().check(config)


class TestExperts:
  """The grouped products against every expert on every token."""

  COUNT, D, F, E = 2, 6, 10, 5

  @pytest.fixture
  def weights(self):
    shapes = {
      "router": (self.D, self.E),
      "experts_gate": (self.E, self.D, self.F),
      "experts_up": (self.E, self.D, self.F),
      "experts_down": (self.E, self.F, self.D),
    }
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return {
      name: jax.random.normal(key, shape)
      for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }

  def dense(self, x, weights):
    shares = jax.nn.softmax(x @ weights["router"])
    best, chosen = jax.lax.top_k(shares, self.COUNT)
    best /= best.sum(-1, keepdims=True)
    gate = jnp.einsum("bld,edf->blef", x, weights["experts_gate"])
    up = jnp.einsum("bld,edf->blef", x, weights["experts_up"])
    out = jnp.einsum("blef,efd->bled", jax.nn.silu(gate) * up, weights["experts_down"])
    used = jnp.einsum("blk,blke->ble", best, jax.nn.one_hot(chosen, self.E))
    return jnp.einsum("ble,bled->bld", used, out)

  def sparse(self, x, weights):
    plain = {name: (weight, None) for name, weight in weights.items()}
    return experts.mixture(x, plain, (self.COUNT, True, jax.nn.silu))

  def test_outputs_and_gradients(self, weights):
    x = jax.random.normal(jax.random.key(1), (2, 7, self.D))

    def total(function, x, weights):
      return jnp.sum(jnp.sin(function(x, weights)))

    for function in (
      lambda f: f,
      lambda f: jax.grad(functools.partial(total, f), (0, 1)),
    ):
      ours, theirs = (
        jax.jit(function(f))(x, weights) for f in (self.sparse, self.dense)
      )
      jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-4),
        ours,
        theirs,
      )

  def test_an_expert_that_nobody_chooses(self, weights):
    weights["router"] = weights["router"].at[:, 0].set(-100.0)
    x = jnp.abs(jax.random.normal(jax.random.key(1), (1, 5, self.D)))
    grads = jax.jit(jax.grad(lambda w: self.sparse(x, w).sum()))(weights)
    assert not grads["experts_up"][0].any() and grads["experts_up"][1:].any()
    assert all(jnp.isfinite(grad).all() for grad in grads.values())

  def test_on_a_mesh(self, weights):
    config = families.CONFIGS["qwen3_moe"]
    params, tokens = families.params(config), families.tokens(config, 4, 16)
    want = jax.jit(Decoder(config).apply)({"params": params}, tokens)[0]
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    with jax.set_mesh(mesh):
      placed = jax.device_put(params, sharding.shardings(params, mesh))
      kernel = placed["layers"]["mlp"]["experts_up"]["kernel"]
      assert kernel.sharding.spec[2:] == ("fsdp", "tensor")
      rows = jax.device_put(tokens, sharding.batch_sharding(mesh))
      got = jax.jit(Decoder(config).apply)({"params": placed}, rows)[0]
    np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_defaults_are_those_of_transformers(family):
  """What a config.json leaves out: as their class fills it in."""
  theirs = CONFIG_MAPPING[family]()
  own = FAMILIES[family]
  for key in own.keys:
    default = own.defaults.get(key.theirs, key.default)
    if key.default is REQUIRED and key.theirs not in own.defaults:
      continue  # without it a folder is refused
    wanted = getattr(theirs, key.theirs, None)
    if key.ours == "num_kv_heads" and not default:
      wanted = 0 if wanted in (None, theirs.num_attention_heads) else wanted
    if key.ours == "embed_size":
      wanted = 0 if wanted == theirs.hidden_size else wanted
    if key.ours == "head_dim" and not default:
      continue  # width over heads, which they fill in later
    assert default == wanted or (default, wanted) == (0, None), key.theirs


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "olmo3", "ministral"])
def test_a_student_of_layers_without_windows(name, tmp_path):
  """transformers makes the mask of a window even where no layer has one."""
  pytest.importorskip("torch")
  config = families.CONFIGS[name]
  full = [i for i, kind in enumerate(config.layer_kinds) if not kind.window]
  params = jax.tree.map(jnp.asarray, families.params(config))
  taken, short = models.take_layers(params, config, full)
  models.save(tmp_path / "model", taken, short)
  tokens = families.tokens(short, 1, 30)
  want = families.torch_logits(families.torch_model(tmp_path / "model"), tokens)
  got = jax.jit(models.load(tmp_path / "model").logits)(taken, tokens)
  np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.parametrize("name", ["mistral", "qwen2", "qwen3", "phi3", "gemma3"])
@pytest.mark.parametrize(
  "kind", [LayerKind(rotary=False), LayerKind(3, rope_theta=5.0)]
)
def test_kinds_that_a_layout_has_no_words_for(name, kind):
  if name == "gemma3" and kind.window:
    return  # which has: see `test_what_a_family_cannot_say_is_refused`
  config = families.CONFIGS[name]
  config = dataclasses.replace(config, layer_kinds=(kind,) * config.num_layers)
  with pytest.raises(UserError, match="layout cannot hold this model: "):
    hf_config(config)


@pytest.mark.parametrize(
  "name, changes, message",
  [
    ("ministral", {"layer_types": ["chunked_attention"] * 3}, "'chunked_attention' is"),
    ("qwen2", {"layer_types": ["full_attention"] * 9}, "has 9 of them for 3 layers"),
    ("smollm3", {"no_rope_layers": [1, 0]}, "has 2 of them for 4 layers"),
    ("qwen2", {"max_window_layers": None, "layer_types": None}, "of the wrong type"),
    ("gemma2", {"query_pre_attn_scalar": 0}, "_scalar=0 must be a number from 0.001"),
    ("llama3", {"rope_scaling": "linear"}, "rope_scaling='linear' must be an object"),
    (
      "llama3",
      {"rope_scaling": {"type": "linear", "factor": "2"}},
      "rope_scaling.factor='2' must be a number",
    ),
    ("llama3", {"hidden_size": "64"}, "hidden_size='64' must be a whole number"),
    ("llama3", {"num_hidden_layers": 10**12}, "a whole number from 0 to 4,096"),
    ("gemma2", {"num_hidden_layers": 10**12}, "a whole number from 0 to 4,096"),
    ("llama3", {"num_hidden_layers": 4000}, "tensors, and it holds|missing"),
    ("qwen3_moe", {"num_experts": 9999}, "describes 90,021 tensors, and it holds"),
    ("llama3", {"vocab_size": 10**12}, "vocab_size=10.* must be a whole number"),
    ("llama3", {"num_hidden_layers": 2.0}, "num_hidden_layers=2.0 must be a whole"),
    ("llama3", {"num_hidden_layers": True}, "num_hidden_layers=True must be a whole"),
    ("llama3", {"rms_norm_eps": math.nan}, "rms_norm_eps=nan must be a number"),
    ("llama3", {"rms_norm_eps": [1]}, "rms_norm_eps=.1. must be a number"),
    ("llama3", {"rope_theta": math.inf}, "rope_theta=inf must be a number"),
    ("llama3", {"attention_bias": "no"}, "attention_bias='no' must be true or false"),
    ("llama3", {"eos_token_id": {"a": 1}}, "eos_token_id=.* must be a whole number"),
    ("llama3", {"bos_token_id": 2**40}, "bos_token_id=1099511627776 must be"),
    ("mistral", {"sliding_window": "all"}, "sliding_window='all' must be a whole"),
    ("smollm3", {"no_rope_layer_interval": 0}, "interval=0 must be a whole number"),
    ("olmo3", {"layer_types": [1, 2]}, "layer_types=.* must be a list, each text"),
    ("llama3", {"hidden_size": 10**4000}, "hidden_size=a very large number must be"),
    ("llama3", {"model_type": ["llama"]}, "model_type ..llama.. is not supported"),
    (
      "gemma",
      {"model_type": "paligemma", "text_config": {"model_type": "gemma"}},
      "model_type 'paligemma' is not supported",
    ),
  ],
)
def test_a_config_of_wrong_values(name, changes, message, tmp_path):
  families.save(name, tmp_path / "model")
  path = tmp_path / "model" / "config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))
  with pytest.raises(UserError, match=message):
    models.load(tmp_path / "model")
