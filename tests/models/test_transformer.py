"""The decoder against golden logits, a float64 oracle, and its own invariants."""

import dataclasses
import functools

import families
import jax
import jax.numpy as jnp
import numpy as np
import plain_decoder
import pytest
from trial import kept_by_layers

from okd_jax import models
from okd_jax.errors import UserError
from okd_jax.models import Decoder, LayerKind, Model, ModelConfig
from okd_jax.models.adapters import Lora
from okd_jax.models.rope import rope_frequencies


@functools.cache
def _model(name):
  config = families.CONFIGS[name]
  return Model(config, jax.tree.map(jnp.asarray, families.params(config)))


@functools.cache
def _logits_of(name):
  return jax.jit(_model(name).logits)  # cached: one compilation a shape


@pytest.fixture(params=["gpt2", "llama_gqa"])
def name(request):
  return request.param


@pytest.fixture
def model(name):
  return _model(name)


@pytest.fixture
def logits(name):
  return _logits_of(name)


@pytest.mark.parametrize("name", sorted(families.CONFIGS))
def test_logits_are_those_of_transformers(name):
  """Guards H4."""
  tokens = families.tokens(families.CONFIGS[name], 1)
  logits = _logits_of(name)(_model(name).params, tokens)[0]
  golden = np.load(families.GOLDEN)[name]
  np.testing.assert_allclose(logits[7::16], golden, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", sorted(families.CONFIGS))
def test_logits_are_those_of_a_plain_float64_loop(name):
  config = families.CONFIGS[name]
  tokens = families.tokens(config, 1, seed=3)
  logits = _logits_of(name)(_model(name).params, tokens)[0]
  oracle = plain_decoder.logits(config, families.params(config), tokens[0])
  np.testing.assert_allclose(logits, oracle, atol=1e-4, rtol=0)


def test_jit_changes_nothing(model, logits):
  tokens = families.tokens(model.config, 1)
  np.testing.assert_allclose(
    logits(model.params, tokens), model.logits(model.params, tokens), atol=1e-5
  )


def test_logits_are_float32_in_bfloat16_too(model, logits):
  low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.params)
  tokens = families.tokens(model.config, 1)
  rounded = logits(low, tokens)
  assert rounded.dtype == jnp.float32
  full = logits(jax.tree.map(lambda x: x.astype(jnp.float32), low), tokens)
  assert jnp.abs(rounded - full).mean() < 0.05 * jnp.abs(full).mean()


def test_no_token_sees_a_later_one(model):
  """The gradient of position t reaches the embeddings of 0 … t and nothing else."""
  config = model.config
  length, at = 24, 13
  tokens = jnp.arange(length)[None]  # each id once: its embedding row is its position
  config = dataclasses.replace(config, tie_embeddings=False)  # the head sees all rows
  weights = dict(model.params)
  weights.setdefault("head", jnp.copy(weights["embed"]["embedding"]))

  def logit(embedding):
    params = {**weights, "embed": {"embedding": embedding}}
    return Model(config, params).logits(params, tokens)[0, at].std()

  gradient = jax.jit(jax.grad(logit))(weights["embed"]["embedding"])
  reached = np.abs(np.asarray(gradient)).sum(-1)
  assert (reached[: at + 1] > 0).all()
  assert (reached[at + 1 :] == 0).all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(model, logits, side):
  length, pad = 61, 11
  tokens = families.tokens(model.config, 2, length, seed=1)
  segments = np.ones((2, length + pad), np.int32)
  real = slice(pad, None) if side == "left" else slice(0, length)
  segments[:, :pad] = side == "right"
  segments[:, length:] = segments[:, length:] if side == "left" else 0
  padded = [np.full(segments.shape, fill, np.int32) for fill in (0, 7)]
  for row in padded:
    row[:, real] = tokens
  first, second = (logits(model.params, row, segments)[:, real] for row in padded)
  np.testing.assert_array_equal(first, second)
  plain = logits(model.params, tokens)
  np.testing.assert_allclose(first, plain, atol=2e-5)


@pytest.mark.parametrize("name", ["gpt2"])
def test_padding_has_a_finite_gradient(model, logits):
  segments = jnp.array([[0, 0, 0, 1, 1], [0] * 5, [1, 1, 0, 0, 0]])
  tokens = families.tokens(model.config, 3, 5)

  def loss(params):
    return jnp.where(segments, logits(params, tokens, segments).std(-1), 0).sum()

  gradients = jax.tree.leaves(jax.jit(jax.grad(loss))(model.params))
  assert all(jnp.isfinite(g).all() for g in gradients)


def test_packed_documents_do_not_see_each_other(model, logits):
  """Guards B6: maxtext attended across documents."""
  lengths = (17, 30, 17)
  parts = [families.tokens(model.config, 1, n, seed=n) for n in lengths]
  segments = np.concatenate([np.full((1, n), i + 1) for i, n in enumerate(lengths)], 1)
  packed = logits(model.params, np.concatenate(parts, 1), segments)
  alone = [logits(model.params, part) for part in parts]
  np.testing.assert_allclose(packed, np.concatenate(alone, 1), atol=2e-5)


def test_decoding_with_a_cache_gives_the_same_hidden_states(model):
  """70 tokens, one row padded on the left: a prompt at once, the rest one by one."""
  decoder, variables = Decoder(model.config), {"params": model.params}
  tokens = jnp.asarray(families.tokens(model.config, 2, 70, seed=2))
  segments = jnp.ones((2, 70), jnp.int32).at[0, :9].set(0)
  positions = models.positions_from_segments(segments)
  step = jax.jit(decoder.apply)
  whole, _ = step(variables, tokens, segments)
  cache = models.init_cache(model.config, 2, 75)
  pieces = []
  for start, stop in [(0, 20), *((i, i + 1) for i in range(20, 70))]:
    part = (x[:, start:stop] for x in (tokens, segments, positions))
    hidden, cache = step(variables, *part, cache)
    pieces.append(hidden)
  cached = jnp.concatenate(pieces, 1)
  real = segments[..., None]
  np.testing.assert_allclose(cached * real, whole * real, atol=1e-4)
  assert int(cache.length) == 70


@pytest.mark.parametrize("name", ["llama_gqa"])
def test_rematerialisation_changes_no_gradient(model):
  tokens = families.tokens(model.config, 2, 16)

  def loss(remat, params):
    hidden, _ = Decoder(model.config, remat=remat).apply({"params": params}, tokens)
    return jnp.square(hidden).mean()

  gradients = []
  for remat in (False, True):
    kept = sum(kept_by_layers(functools.partial(loss, remat), model.params))
    # The two models really differ: the one keeps what enters a layer, no more.
    inputs = tokens.size * model.config.hidden_size * model.config.num_layers
    assert (kept == inputs) == remat
    gradients.append(jax.jit(jax.grad(functools.partial(loss, remat)))(model.params))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *gradients)


@pytest.mark.parametrize("layers", [0, 1])
@pytest.mark.parametrize("name", ["gpt2", "llama3"])
def test_the_backward_pass_keeps_products_alone(name, layers):
  """And what enters a layer or a product, for as many layers as hold modules.

  Norms, activations and attention are computed again: three to four times less memory
  than what JAX would keep, and less time on a CPU, which writing it took.
  """
  config, adapter = families.CONFIGS[name], Lora(rank=2, layers=layers)
  tokens = families.tokens(config, 2, 16)
  variables = jax.eval_shape(Decoder(config, adapter).init, jax.random.key(0), tokens)

  def loss(adapter_params, params):
    variables = {"params": params, "adapter": adapter_params}
    return jnp.square(Decoder(config, adapter).apply(variables, tokens)[0]).mean()

  kept = kept_by_layers(loss, variables["adapter"], variables["params"])
  heads = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
  mlp = (1 + config.gated_mlp) * config.mlp_size
  # The layer's input, the modules' input and their 2 x 2 channels; keys, queries and
  # values; the MLP's input before its norm, and what goes into its activation.
  each = 2 * config.hidden_size + 2 * 2 + heads + config.hidden_size + mlp
  adapted = layers or config.num_layers
  assert kept == [0] * (adapted < config.num_layers) + [tokens.size * each * adapted]


def test_dropout_follows_its_key_and_is_off_by_default():
  config = families.CONFIGS["llama3"]
  variables = {"params": families.params(config)}
  tokens = families.tokens(config, 2, 16)

  @functools.partial(jax.jit, static_argnums=0)
  def run(rate, seed):
    rngs = {"dropout": jax.random.key(seed)}
    return Decoder(config, dropout=rate).apply(variables, tokens, rngs=rngs)[0]

  np.testing.assert_array_equal(run(0.3, 0), run(0.3, 0))
  assert jnp.abs(run(0.3, 0) - run(0.3, 1)).max() > 0.1
  plain, _ = jax.jit(Decoder(config).apply)(variables, tokens)
  np.testing.assert_array_equal(run(0.0, 0), plain)


class TestAdapter:
  CONFIG = ModelConfig(num_layers=5, hidden_size=24, num_heads=3, vocab_size=40)

  @functools.partial(jax.jit, static_argnums=(0, 1))
  def _run(self, adapter_config, adapter, params, cache=None):
    tokens = families.tokens(self.CONFIG, 2, 12)
    decoder = Decoder(self.CONFIG, adapter=adapter_config)
    return decoder.apply({"params": params, "adapter": adapter}, tokens, cache=cache)

  def _shapes(self, adapter_config):
    decoder = Decoder(self.CONFIG, adapter=adapter_config)
    tokens = jnp.zeros((1, 1), jnp.int32)
    return jax.eval_shape(decoder.init, jax.random.key(1), tokens)["adapter"]

  def _moved(self, adapter_config):
    """An adapter whose `up` has left zero."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
      lambda x: 0.2 * rng.standard_normal(x.shape, np.float32),
      self._shapes(adapter_config),
    )

  def _params(self):
    return families.params(self.CONFIG)

  def test_tree(self):
    config = Lora(rank=3, targets=("query", "down"), layers=2)
    assert jax.tree.map(jnp.shape, self._shapes(config)) == {
      "layers": {
        "attention": {"query": {"down": (2, 24, 3), "up": (2, 3, 24)}},
        "mlp": {"down": {"down": (2, 96, 3), "up": (2, 3, 24)}},
      }
    }

  def test_is_the_plain_model_exactly_at_the_start(self):
    config = Lora(rank=3, layers=2)
    decoder = Decoder(self.CONFIG, adapter=config)
    tokens = jnp.zeros((1, 1), jnp.int32)
    adapter = jax.jit(decoder.init)(jax.random.key(1), tokens)["adapter"]
    assert jnp.abs(adapter["layers"]["attention"]["query"]["down"]).min() > 0
    hidden, _ = self._run(config, adapter, self._params())
    plain, _ = self._run(None, {}, self._params())
    np.testing.assert_array_equal(hidden, plain)

  def test_adds_its_product_to_the_kernel(self):
    config = Lora(rank=3, scale=0.7, targets=("query", "gate"), layers=2)
    adapter = self._moved(config)
    params = self._params()
    plain = self._params()
    for part, name in (("attention", "query"), ("mlp", "gate")):
      pair = adapter["layers"][part][name]
      delta = 0.7 * np.einsum("nir,nro->nio", pair["down"], pair["up"])
      params["layers"][part][name]["kernel"][-2:] += delta
    merged, _ = self._run(None, {}, params)
    hidden, _ = self._run(config, adapter, plain)
    np.testing.assert_allclose(hidden, merged, atol=1e-4)

  def test_leaves_the_layers_below_the_top_alone(self):
    """Keys and values of the lower layers keep every bit; those above do not."""
    config = Lora(rank=3, targets=("value",), layers=2)
    adapter = self._moved(config)
    cache = models.init_cache(self.CONFIG, 2, 12)
    _, plain = self._run(None, {}, self._params(), cache)
    _, adapted = self._run(config, adapter, self._params(), cache)
    np.testing.assert_array_equal(plain.key[:4], adapted.key[:4])
    np.testing.assert_array_equal(plain.value[:3], adapted.value[:3])
    assert (jnp.abs(plain.value[3:] - adapted.value[3:]).max((1, 2, 3, 4)) > 1e-3).all()

  def test_gets_a_gradient_everywhere_once_it_has_moved(self):
    config = Lora(rank=3, layers=2)
    adapter = self._moved(config)

    def loss(adapter):
      return jnp.square(self._run(config, adapter, self._params())[0]).std()

    for leaf in jax.tree.leaves(jax.grad(loss)(adapter)):
      assert (jnp.abs(leaf).max((1, 2)) > 0).all()

  def test_costs_no_backward_pass_below_its_layers(self):
    """The lower layers' scan appears once in the gradient: forward only."""
    config = Lora(rank=3, layers=2)
    decoder = Decoder(self.CONFIG, adapter=config)
    tokens = families.tokens(self.CONFIG, 2, 12)

    def loss(adapter):
      variables = {"params": self._params(), "adapter": adapter}
      return jnp.square(decoder.apply(variables, tokens)[0]).sum()

    jaxpr = jax.make_jaxpr(jax.grad(loss))(self._moved(config))
    scans = [e.params["length"] for e in jaxpr.eqns if e.primitive.name == "scan"]
    assert sorted(scans) == [2, 2, 3]


def test_rope_frequencies_of_llama_3():
  """Hand-made: kept below a wavelength of 16, divided above 64, blended between."""
  config = families.CONFIGS["llama3"]
  plain = rope_frequencies(dataclasses.replace(config, rope_scaling=None))
  np.testing.assert_allclose(plain, [1, 10**-0.75, 10**-1.5, 10**-2.25], rtol=1e-6)
  keep = (64 * 10**-0.75 / (2 * np.pi) - 1) / 3
  blended = (keep + (1 - keep) / 8) * 10**-0.75
  expected = [1, blended, 10**-1.5 / 8, 10**-2.25 / 8]
  np.testing.assert_allclose(rope_frequencies(config), expected, rtol=1e-6)


def test_config_names_every_problem_at_once():
  with pytest.raises(UserError) as error:
    ModelConfig(vocab_size=0, num_heads=4, num_kv_heads=3, norm="batch", head_dim=5)
  for part in ("vocab_size=0", "num_kv_heads=3", "head_dim=5", "norm='batch'"):
    assert part in str(error.value)


class TestInit:
  def test_follows_the_key_and_the_config(self):
    config = families.CONFIGS["llama_gqa"]
    init = jax.jit(functools.partial(models.init, config))
    first, again, other = (init(jax.random.key(i)) for i in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    kernels = [t["layers"]["attention"]["query"]["kernel"] for t in (first, other)]
    assert jnp.abs(kernels[0] - kernels[1]).max() > 0.01
    assert kernels[0].std() == pytest.approx(config.init_std, rel=0.1)
    assert jnp.abs(kernels[0][0] - kernels[0][1]).max() > 0.01

  def test_refuses_what_could_not_be_exported(self):
    config = dataclasses.replace(families.CONFIGS["gpt2"], num_kv_heads=1)
    with pytest.raises(UserError, match="num_kv_heads=1 where it needs 3"):
      models.init(config, jax.random.key(0))


class TestTakeLayers:
  @pytest.mark.parametrize(
    ("n", "kept"), [(1, [0]), (2, [0, 6]), (3, [0, 3, 6]), (7, list(range(7)))]
  )
  def test_keeps_evenly_spaced_layers(self, n, kept):
    config = ModelConfig(num_layers=7)
    params = {"norm": jnp.ones(3), "layers": {"w": jnp.arange(7.0)}}
    taken, shallow = models.take_layers(params, config, n)
    np.testing.assert_array_equal(taken["layers"]["w"], kept)
    assert shallow == dataclasses.replace(config, num_layers=n)

  def test_keeps_the_layers_that_are_named(self):
    kinds = tuple(LayerKind(i) for i in range(1, 8))
    config = ModelConfig(num_layers=7, layer_kinds=kinds)
    params = {"layers": {"w": jnp.arange(7.0)}}
    taken, shallow = models.take_layers(params, config, [1, 6])
    np.testing.assert_array_equal(taken["layers"]["w"], [1, 6])
    assert shallow.num_layers == 2 and shallow.layer_kinds == (kinds[1], kinds[6])

  def test_copies(self):
    """Donating the student's buffers must leave the teacher's alive."""
    config = families.CONFIGS["llama_gqa"]
    params = jax.tree.map(jnp.asarray, families.params(config))
    taken, _ = models.take_layers(params, config, 3)
    jax.tree.map(lambda x: x.delete(), taken)
    assert not any(x.is_deleted() for x in jax.tree.leaves(params))

  @pytest.mark.parametrize("n", [0, 8])
  def test_refuses_more_layers_than_there_are(self, n):
    with pytest.raises(UserError, match=f"{n} layers .* has 7"):
      models.take_layers({}, ModelConfig(num_layers=7), n)
