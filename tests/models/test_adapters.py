"""Virtual tokens, parts of a pass and mixed embeddings; LoRA is in test_transformer.

Small models of both kinds of position, whose modules have left where they start.
"""

import functools

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from okd_jax import models
from okd_jax.data.batch import Batch
from okd_jax.errors import UserError
from okd_jax.models import Decoder, Mix, ModelConfig
from okd_jax.models.adapters import (
  KINDS,
  Adapter,
  Blocks,
  Lora,
  Prefix,
  Prompt,
  make,
  prompt_vectors,
)
from okd_jax.runtime import sharding

SIZES = dict(vocab_size=40, hidden_size=16, num_layers=3, num_heads=4, mlp_size=20)
ROPE = ModelConfig(**SIZES, num_kv_heads=2, head_dim=6)
LEARNED = models.preset("gpt2", **SIZES, max_length=96)
PREFIX = Prefix(length=5)
TOP_PREFIX = Prefix(length=5, layers=2)
PROMPT = Prompt(length=5)
CASES = {
  "prefix_rope": (ROPE, TOP_PREFIX),
  "prefix_learned": (LEARNED, PREFIX),
  "prompt_rope": (ROPE, PROMPT),
  "prompt_learned": (LEARNED, PROMPT),
}
KEY = jax.random.key(0)
ONE = jax.ShapeDtypeStruct((1, 1), jnp.int32)


@functools.cache
def _apply(config, adapter=None, **options):
  return jax.jit(
    Decoder(config, adapter, **options).apply, static_argnames=("start", "stop")
  )


@functools.cache
def _variables(config, adapter=None):
  variables = {"params": families.params(config)}
  if adapter:
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(Decoder(config, adapter).init, KEY, ONE)["adapter"]
    variables["adapter"] = jax.tree.map(
      lambda x: 0.5 * rng.standard_normal(x.shape, np.float32), shapes
    )
  return variables


@functools.cache
def _gradient(config, adapter, remat):
  """Jitted gradient of some loss for the module, on rows of which one is padded."""
  base = {"params": _variables(config)["params"]}
  tokens = families.tokens(config, 2, 16)
  segments = np.ones((2, 16), np.int32)
  segments[0, :3] = 0

  def loss(modules):
    decoder = Decoder(config, adapter, remat=remat)
    hidden, _ = decoder.apply({**base, "adapter": modules}, tokens, segments)
    return jnp.square(hidden).std()

  return jax.jit(jax.grad(loss))


@pytest.fixture(params=CASES)
def case(request):
  """(model, module, variables, jitted apply) with virtual tokens."""
  config, adapter = CASES[request.param]
  return config, adapter, _variables(config, adapter), _apply(config, adapter)


class TestConfig:
  @pytest.mark.parametrize(
    ("fields", "message"),
    [
      ({"kind": "ia3"}, "adapter.kind='ia3' .* lora, prefix, prompt"),
      ({"kind": "prefix", "length": 0}, "adapter.length=0 must be at least 1"),
      ({"kind": "prompt", "length": -3}, "adapter.length=-3 must be at least 1"),
      ({"kind": "prompt", "layers": 2}, "adapter.layers=2 .* adapter.kind='prompt'"),
      ({"kind": "prefix", "layers": -1}, "adapter.layers=-1 must be at least 0"),
      ({"kind": "lora", "rank": 0}, "adapter.rank=0 must be at least 1"),
      ({"kind": "lora", "layers": -1}, "adapter.layers=-1 must be at least 0"),
      ({"kind": "lora", "targets": ("query", "norm")}, "adapter.targets=.* must name"),
      ({"kind": "blocks", "blocks": (1, 0)}, "ascending, each once"),
      (
        {"kind": "blocks", "blocks": (1,), "layers": 2},
        "adapter.layers=2 does not go with adapter.kind='blocks', which chooses",
      ),
    ],
  )
  def test_names_the_key_that_is_wrong(self, fields, message):
    with pytest.raises(UserError, match=message):
      make(**fields)

  def test_all_that_is_wrong_is_named_at_once(self):
    with pytest.raises(UserError) as error:
      Lora(rank=0, targets=(), layers=-2)
    for name in ("rank", "targets", "layers"):
      assert f"adapter.{name}=" in str(error.value)

  def test_takes_the_fields_of_its_kind_from_those_of_all(self):
    fields = {"rank": 3, "targets": ["key"], "length": 4, "blocks": [1], "text": "Hi"}
    assert {kind: make(kind, **fields) for kind in KINDS} == {
      "lora": Lora(rank=3, targets=("key",)),
      "prefix": Prefix(length=4),
      "prompt": Prompt(length=4),
      "blocks": Blocks((1,)),
    }
    assert len({hash(make(kind, **fields)) for kind in KINDS}) == len(KINDS)

  def test_lora_alone_minds_its_fields(self):
    make("prefix", rank=0, targets=("gate",)).check(LEARNED)
    with pytest.raises(UserError, match="adapter.targets names 'gate'"):
      Lora(targets=("gate",)).check(LEARNED)
    Lora(targets=("gate",)).check(ROPE)
    with pytest.raises(UserError, match="adapter.layers=4"):
      Prefix(layers=4).check(ROPE)

  @pytest.mark.parametrize(
    ("adapter", "trunk", "prefix", "folder"),
    [
      (Adapter(), 3, 0, "adapter"),
      (Lora(), 0, 0, "adapter"),
      (Lora(layers=2), 1, 0, "adapter"),
      (TOP_PREFIX, 1, 5, "adapter"),
      (PROMPT, 0, 5, "adapter"),
      (Blocks((1, 2)), 1, 0, "teacher"),
    ],
  )
  def test_says_where_it_is(self, adapter, trunk, prefix, folder):
    assert adapter.trunk_layers(3) == trunk
    assert (adapter.prefix_length, adapter.folder) == (prefix, folder)


class TestStart:
  BASE = families.params(ROPE)

  @pytest.mark.parametrize("adapter", [Adapter(), Lora(), PREFIX, PROMPT])
  def test_is_drawn_at_random(self, adapter):
    assert adapter.start(self.BASE) is None

  def test_of_blocks_is_float32_copies(self):
    base = jax.tree.map(lambda x: x.astype(jnp.bfloat16), self.BASE)
    layers = Blocks((0, 2)).start(base)["layers"]
    for own, old in zip(*map(jax.tree.leaves, (layers, base["layers"])), strict=True):
      assert own.dtype == jnp.float32
      np.testing.assert_array_equal(own, old[np.array([0, 2])].astype(jnp.float32))

  @pytest.mark.parametrize(
    ("ids", "rows"), [((7, 2), (7, 2, 7, 2, 7)), (range(9), (0, 1, 2, 3, 4))]
  )
  def test_of_a_text_is_its_embeddings_repeated_or_cut(self, ids, rows):
    prompt = Prompt(length=5, ids=ids)
    assert prompt == Prompt(length=5, ids=rows)
    base = jax.tree.map(lambda x: x.astype(jnp.bfloat16), self.BASE)
    vectors = prompt.start(base)["prompt"]["vectors"]
    assert vectors.dtype == jnp.float32
    table = base["embed"]["embedding"].astype(jnp.float32)
    np.testing.assert_array_equal(vectors, table[np.array(rows)])
    drawn = jax.eval_shape(Decoder(ROPE, prompt).init, KEY, ONE)["adapter"]
    assert jax.tree.map(jnp.shape, drawn) == {"prompt": {"vectors": (5, 16)}}


class TestNorm:
  def test_of_a_pair_is_that_of_its_product(self):
    rng = np.random.default_rng(0)
    down, up = (rng.standard_normal(s, np.float32) for s in ((2, 4, 3), (2, 3, 5)))
    tree = {"layers": {"mlp": {"up": {"down": down, "up": up}}}}
    got = Lora(scale=9.0).norm(tree, None)
    np.testing.assert_allclose(got, np.linalg.norm(down @ up), rtol=1e-5)

  def test_of_a_prompt_is_that_of_its_vectors(self):
    tree = _variables(ROPE, PROMPT)["adapter"]
    want = np.linalg.norm(prompt_vectors(tree["prompt"]))
    np.testing.assert_allclose(PROMPT.norm(tree, None), want, rtol=1e-5)

  def test_of_blocks_is_that_of_their_change(self):
    base, blocks = {"layers": {"kernel": jnp.arange(12.0).reshape(3, 4)}}, Blocks((1,))
    tree = jax.tree.map(lambda x: x + 3, blocks.start(base))
    assert blocks.norm(blocks.start(base), base) == 0
    assert blocks.norm(tree, base) == 6


class TestTree:
  def _init(self, config, adapter):
    return jax.jit(Decoder(config, adapter).init)(KEY, jnp.zeros((1, 1), jnp.int32))

  def test_prefix(self):
    variables = self._init(ROPE, TOP_PREFIX)
    attention = variables["adapter"]["layers"]["attention"]
    leaves = {"prefix_key": (2, 5, 2, 6), "prefix_value": (2, 5, 2, 6)}
    assert jax.tree.map(jnp.shape, variables["adapter"]) == {
      "layers": {"attention": leaves}
    }
    for leaf in attention.values():
      assert leaf.dtype == jnp.float32
      assert leaf.std() == pytest.approx(0.02, rel=0.2)
    assert (attention["prefix_key"][0] != attention["prefix_key"][1]).all()
    shapes = models.parameter_shapes(ROPE)
    assert len(jax.tree.leaves(variables["params"])) == len(shapes)

  def test_prompt_starts_at_the_size_of_embeddings(self):
    wide = models.preset("llama", hidden_size=128, num_heads=2, num_layers=1)
    adapter = Prompt(length=16)
    tree = self._init(wide, adapter)["adapter"]
    layer = {"kernel": (128, 128), "bias": (128,)}
    assert jax.tree.map(jnp.shape, tree) == {
      "prompt": {"embedding": (16, 128), "hidden": layer, "out": layer}
    }
    assert prompt_vectors(tree["prompt"]).std() == pytest.approx(0.02, rel=0.2)

  @pytest.mark.parametrize("adapter", [PREFIX, PROMPT])
  def test_every_device_holds_all_of_it(self, adapter):
    mesh = sharding.make_mesh(2, 2, 2)
    tree = {"mu": {"adapter": _variables(ROPE, adapter)["adapter"]}}
    for leaf in jax.tree.leaves(sharding.shardings(tree, mesh)):
      assert leaf.spec == PartitionSpec()


class TestVirtualTokens:
  def test_leave_causality_alone_and_matter(self, case):
    config, _, variables, apply = case
    tokens = families.tokens(config, 2, 24)
    hidden, cache = apply(variables, tokens)
    assert (hidden.shape, cache) == ((2, 24, 16), None)
    changed = tokens.copy()
    changed[:, 13] = (tokens[:, 13] + 1) % config.vocab_size
    other, _ = apply(variables, changed)
    np.testing.assert_array_equal(hidden[:, :13], other[:, :13])
    assert (jnp.abs(hidden - other)[:, 13:].max(-1) > 1e-4).all()
    plain, _ = _apply(config)({"params": variables["params"]}, tokens)
    assert (jnp.abs(hidden - plain).max(-1) > 1e-3).all()

  def test_decoding_with_a_cache_gives_the_same_hidden_states(self, case):
    """70 tokens, one row padded on the left: a prompt at once, the rest one by one."""
    config, _, variables, apply = case
    tokens = jnp.asarray(families.tokens(config, 2, 70, seed=2))
    segments = jnp.ones((2, 70), jnp.int32).at[0, :9].set(0)
    positions = models.positions_from_segments(segments)
    whole, _ = apply(variables, tokens, segments)
    cache, pieces = models.init_cache(config, 2, 75), []
    assert cache.key.shape[-1] == 75
    for start, stop in [(0, 6), *((i, i + 1) for i in range(6, 70))]:
      part = (x[:, start:stop] for x in (tokens, segments, positions))
      hidden, cache = apply(variables, *part, cache)
      pieces.append(hidden)
    real = segments[..., None]
    cached = jnp.concatenate(pieces, 1)
    np.testing.assert_allclose(cached * real, whole * real, atol=1e-4)
    assert int(cache.length) == 70

  def test_every_packed_document_sees_them(self, case):
    config, _, variables, apply = case
    parts = families.tokens(config, 2, 12)
    segments = np.repeat([[1, 2]], 12, axis=1)
    packed, _ = apply(variables, parts.reshape(1, 24), segments)
    alone, _ = apply(variables, parts)
    np.testing.assert_allclose(packed.reshape(alone.shape), alone, atol=2e-5)

  def test_get_a_gradient_everywhere(self, case):
    config, adapter, variables, _ = case
    gradient = _gradient(config, adapter, True)(variables["adapter"])
    for leaf in jax.tree.leaves(gradient):
      per_part = jnp.abs(leaf).max(tuple(range(1, leaf.ndim)))
      # In the MLP, ReLU may leave single hidden units without any.
      assert (per_part > 0).mean() > (0.5 if leaf.ndim < 3 else 0.99)

  def test_get_the_same_gradient_without_rematerialisation(self):
    adapter = _variables(ROPE, PROMPT)["adapter"]
    first, second = (_gradient(ROPE, PROMPT, remat)(adapter) for remat in (True, False))
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), first, second
    )

  @pytest.mark.parametrize("name", ["prefix_rope", "prompt_learned"])
  def test_run_in_bfloat16(self, name):
    config, adapter = CASES[name]
    variables, tokens = _variables(config, adapter), families.tokens(config, 2, 24)
    low, _ = _apply(config, adapter, dtype=jnp.bfloat16)(variables, tokens)
    full, _ = _apply(config, adapter)(variables, tokens)
    assert low.dtype == jnp.bfloat16
    assert jnp.abs(low - full).mean() < 0.05 * jnp.abs(full).mean()


@pytest.mark.parametrize("config", [ROPE, LEARNED], ids=["rope", "learned"])
class TestOracles:
  def test_prompt_is_vectors_before_the_embeddings(self, config):
    """The plain decoder on a longer row, at positions -5, -4, …"""
    variables = _variables(config, PROMPT)
    base = {"params": variables["params"]}
    tokens = families.tokens(config, 2, 24)
    embedded, _ = _apply(config)(base, tokens, stop=0)
    vectors = jnp.stack([prompt_vectors(variables["adapter"]["prompt"])] * 2)
    x = jnp.concatenate([vectors, embedded], axis=1)
    positions = jnp.stack([jnp.arange(-5, 24)] * 2)
    zeros = jnp.zeros_like(positions)
    naive, _ = _apply(config)(base, zeros, None, positions, hidden=x)
    hidden, _ = _apply(config, PROMPT)(variables, tokens)
    np.testing.assert_allclose(hidden, naive[:, 5:], atol=2e-5)
    bare = {**base, "adapter": {"prompt": {"vectors": vectors[0]}}}
    again, _ = _apply(config, PROMPT)(bare, tokens)
    np.testing.assert_allclose(again, hidden, atol=1e-5)

  def test_prefix_is_what_a_cache_of_other_tokens_holds(self, config):
    """Keys and values of 5 tokens, taken from the plain decoder's cache."""
    base = {"params": families.params(config)}
    tokens = families.tokens(config, 1, 29)
    positions = jnp.arange(29)[None]
    whole, _ = _apply(config)(base, tokens, None, positions)
    cache = models.init_cache(config, 1, 5)
    first = (tokens[:, :5], None, positions[:, :5])
    _, cache = _apply(config)(base, *first, cache)
    pair = {f"prefix_{n}": getattr(cache, n)[:, 0] for n in ("key", "value")}
    pair = {name: x.transpose(0, 3, 1, 2) for name, x in pair.items()}
    adapted = {**base, "adapter": {"layers": {"attention": pair}}}
    rest = (tokens[:, 5:], None, positions[:, 5:])
    hidden, _ = _apply(config, PREFIX)(adapted, *rest)
    np.testing.assert_allclose(hidden, whole[:, 5:], atol=2e-5)


class TestTopLayers:
  def test_those_below_keep_every_bit(self):
    variables, tokens = _variables(ROPE, TOP_PREFIX), families.tokens(ROPE, 2, 12)
    base = {"params": variables["params"]}
    cache = models.init_cache(ROPE, 2, 12)
    _, plain = _apply(ROPE)(base, tokens, cache=cache)
    _, adapted = _apply(ROPE, TOP_PREFIX)(variables, tokens, cache=cache)
    # Layer 1 is the lowest with a prefix: it shows in what enters layer 2.
    np.testing.assert_array_equal(plain.key[:2], adapted.key[:2])
    np.testing.assert_array_equal(plain.value[:2], adapted.value[:2])
    assert jnp.abs(plain.value[2] - adapted.value[2]).max() > 1e-3

  def test_those_below_cost_no_backward_pass(self):
    """Their scan appears once in the gradient: forward only."""
    variables, tokens = _variables(ROPE, TOP_PREFIX), families.tokens(ROPE, 2, 12)

    def loss(modules):
      both = {"params": variables["params"], "adapter": modules}
      return jnp.square(Decoder(ROPE, TOP_PREFIX).apply(both, tokens)[0]).sum()

    jaxpr = jax.make_jaxpr(jax.grad(loss))(variables["adapter"])
    scans = [e.params["length"] for e in jaxpr.eqns if e.primitive.name == "scan"]
    assert sorted(scans) == [1, 2, 2]


class TestParts:
  TOKENS = families.tokens(ROPE, 2, 12)
  SEGMENTS = np.repeat([[0, 1, 2], [1, 1, 1]], 4, axis=1)

  @pytest.mark.parametrize(
    ("adapter", "low"),
    [(None, 0), (None, 2), (Lora(rank=2, layers=2), 1), (TOP_PREFIX, 1)],
  )
  def test_a_trunk_and_a_top_are_the_whole(self, adapter, low):
    variables = _variables(ROPE, adapter)
    base = {"params": variables["params"]}
    text = (self.TOKENS, self.SEGMENTS)
    whole, _ = _apply(ROPE, adapter)(variables, *text)
    trunk, _ = _apply(ROPE)(base, *text, stop=low)
    top, _ = _apply(ROPE, adapter)(variables, *text, hidden=trunk, start=low)
    np.testing.assert_allclose(top, whole, atol=1e-6)
    # Below its modules the adapted decoder does not ask for them.
    same, _ = _apply(ROPE, adapter)(base, *text, stop=low)
    np.testing.assert_array_equal(same, trunk)

  def test_may_be_cut_anywhere(self):
    variables, text = _variables(ROPE, TOP_PREFIX), (self.TOKENS, self.SEGMENTS)
    apply = _apply(ROPE, TOP_PREFIX)
    hidden, _ = apply(variables, *text, stop=2)
    hidden, _ = apply(variables, *text, hidden=hidden, start=2)
    whole, _ = apply(variables, *text)
    np.testing.assert_allclose(hidden, whole, atol=1e-6)

  def test_are_reached_through_output(self):
    variables = _variables(ROPE)
    tokens, ids = self.TOKENS, self.SEGMENTS
    batch = Batch(tokens=tokens, labels=tokens, mask=ids > 0, segment_ids=ids)
    trunk = models.output(Decoder(ROPE), variables, batch, stop=1).hidden
    top = models.output(Decoder(ROPE), variables, batch, hidden=trunk, start=1)
    whole = models.output(Decoder(ROPE), variables, batch)
    np.testing.assert_allclose(top.hidden, whole.hidden, atol=1e-5)
    np.testing.assert_array_equal(top.head, variables["params"]["embed"]["embedding"])

  def test_make_no_difference_to_initialisation(self):
    hidden = jax.ShapeDtypeStruct((1, 1, 16), jnp.float32)
    init = functools.partial(Decoder(ROPE, TOP_PREFIX).init, start=2, stop=2)
    shapes = jax.eval_shape(
      lambda x: init(KEY, jnp.zeros((1, 1), int), hidden=x), hidden
    )
    whole = jax.eval_shape(Decoder(ROPE, TOP_PREFIX).init, KEY, ONE)
    assert jax.tree.structure(shapes) == jax.tree.structure(whole)

  @pytest.mark.parametrize(
    ("adapter", "options", "message"),
    [
      (None, {"start": 1}, "start=1 needs the hidden states"),
      (None, {"stop": 4}, "layers 0 to 4 of 3"),
      (None, {"start": 2, "stop": 1}, "layers 2 to 1 of 3"),
      (None, {"stop": 1, "cache": models.init_cache(ROPE, 2, 12)}, "cache"),
      (PROMPT, {"stop": 1}, "a prompt's virtual tokens"),
    ],
  )
  def test_that_cannot_be_had(self, adapter, options, message):
    with pytest.raises(ValueError, match=message):
      Decoder(ROPE, adapter).apply(_variables(ROPE, adapter), self.TOKENS, **options)


class TestMix:
  FIRST, SECOND = (families.tokens(LEARNED, 2, 12, seed=s) for s in (0, 1))
  SHARE = np.random.default_rng(0).random((2, 12), np.float32)

  def _run(self, first, second, share, **options):
    return _apply(LEARNED)(_variables(LEARNED), first, mix=Mix(second, share))[0]

  def test_ends_are_the_plain_texts(self):
    ones = np.ones((2, 12), np.float32)
    for tokens, share in ((self.FIRST, ones), (self.SECOND, 0 * ones)):
      plain, _ = _apply(LEARNED)(_variables(LEARNED), tokens)
      mixed = self._run(self.FIRST, self.SECOND, share)
      np.testing.assert_allclose(mixed, plain, atol=1e-5)

  def test_is_symmetric(self):
    mixed = self._run(self.FIRST, self.SECOND, self.SHARE)
    swapped = self._run(self.SECOND, self.FIRST, 1 - self.SHARE)
    np.testing.assert_allclose(mixed, swapped, atol=1e-4)

  def test_is_of_embeddings_but_not_of_positions(self):
    variables = _variables(LEARNED)
    mix = Mix(self.SECOND, self.SHARE)
    mixed, _ = _apply(LEARNED)(variables, self.FIRST, mix=mix, stop=0)
    table = variables["params"]["embed"]["embedding"]
    share = self.SHARE[..., None]
    expected = share * table[self.FIRST] + (1 - share) * table[self.SECOND]
    expected += variables["params"]["position_embed"]["embedding"][None, :12]
    np.testing.assert_allclose(mixed, expected, atol=1e-6)

  def test_has_nothing_to_do_with_given_hidden_states(self):
    x = jnp.zeros((2, 12, 16))
    mix = Mix(self.SECOND, self.SHARE)
    with pytest.raises(ValueError, match="mix"):
      Decoder(LEARNED).apply(_variables(LEARNED), self.FIRST, mix=mix, hidden=x)
