"""Parameters that stay: what is trained is divided from them, and nothing else."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from hypothesis import given, settings
from hypothesis import strategies as st
from trial import TEACHER, VOCAB

from okd_jax import models
from okd_jax.errors import UserError
from okd_jax.models import Decoder, logits
from okd_jax.models.adapters import Part

TOKENS = np.random.default_rng(0).integers(0, VOCAB, (2, 7))
BASE = jax.tree.map(np.asarray, models.init(TEACHER, jax.random.key(1)))
NAMES = [*traverse_util.flatten_dict(BASE, sep="/")]
# What stays: tables, whole layers, some weights of all layers, some of some.
FROZEN = ["embed", "layers/[02]/", "mlp|head", "layers/1/attention|norm", "layers"]


@pytest.fixture(scope="module")
def params():
  return models.init(TEACHER, jax.random.key(0))


def loss(variables, adapter):
  decoder = Decoder(TEACHER, adapter)
  hidden, _ = decoder.apply(variables, TOKENS)
  return jnp.square(logits(hidden, variables["params"], TEACHER)).mean()


@pytest.mark.parametrize("frozen", FROZEN)
def test_a_model_in_parts_is_the_model(params, frozen):
  """Same loss; the gradients of what is trained are the plain model's, by rows."""
  part = Part(frozen)
  tree, held = part.start(params), part.held(params)
  chex.assert_trees_all_equal(part.merge(held, tree), params)

  def in_part(tree):
    return loss(part.variables(tree, held), part)

  want, plain = jax.jit(jax.value_and_grad(lambda p: loss({"params": p}, None)))(params)
  got, grads = jax.jit(jax.value_and_grad(in_part))(tree)
  np.testing.assert_allclose(got, want, rtol=1e-5)
  chex.assert_trees_all_close(grads, part.start(plain), rtol=1e-4, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(NAMES), min_size=1), st.sets(st.integers(0, 2)))
def test_each_number_is_in_one_of_the_parts(names, layers):
  """Whatever the expression; a stack of layers is divided by rows."""
  some = [name.split("/", 1)[-1] for name in names]
  part = Part("|".join([*(f"{x}$" for x in some), *(f"layers/{i}/" for i in layers)]))
  base = BASE
  tree, held = part.start(base), part.held(base)
  sizes = [sum(x.size for x in jax.tree.leaves(t)) for t in (tree, held, base)]
  assert sizes[0] + sizes[1] == sizes[2]
  chex.assert_trees_all_equal(part.merge(held, tree), base)


def test_no_gradient_of_what_stays_is_computed(params):
  """Layer 2 alone is trained: one layer's kernels have gradients, and no table has."""
  part = Part("embed|head|norm|layers/[01]/")
  tree, held = part.start(params), part.held(params)

  def in_part(tree, held):
    return loss(part.variables(tree, held), part)

  program = jax.jit(jax.grad(in_part)).lower(tree, held)
  text = str(jax.make_jaxpr(jax.grad(in_part))(tree, held))
  sizes = f"{TEACHER.hidden_size},{TEACHER.mlp_size}"
  assert f"f32[1,{sizes}]" in text
  assert f"f32[{TEACHER.num_layers},{sizes}]" not in text
  assert f"f32[2,{sizes}]" in text  # those that stay; no gradient of theirs comes out
  assert (
    program.compile().memory_analysis().output_size_in_bytes
    < 1.01 * sum(x.nbytes for x in jax.tree.leaves(tree)) + 64
  )


def test_a_cached_pass_and_one_that_stops_halfway(params):
  part = Part("layers/1/")
  variables = part.variables(part.start(params), part.held(params))
  apply = jax.jit(Decoder(TEACHER, part).apply, static_argnames=("start", "stop"))
  want, _ = jax.jit(Decoder(TEACHER).apply)({"params": params}, TOKENS)
  below, _ = apply(variables, TOKENS, stop=1)
  got, _ = apply(variables, TOKENS, hidden=below, start=1)
  np.testing.assert_allclose(got, want, rtol=1e-5)
  cache = models.init_cache(TEACHER, 2, 7, jnp.float32)
  ones = np.ones((2, 7), np.int32)
  places = jnp.arange(7)[None].repeat(2, 0)
  first, cache = apply(variables, TOKENS[:, :4], ones[:, :4], places[:, :4], cache)
  rest, _ = apply(variables, TOKENS[:, 4:], ones[:, 4:], places[:, 4:], cache)
  np.testing.assert_allclose(jnp.concatenate([first, rest], 1), want, rtol=2e-5)


def test_the_expression_is_checked(params):
  with pytest.raises(UserError, match=r"student.frozen='\(' is no regular expression"):
    Part("(")
  with pytest.raises(UserError, match="'x9' is found in none of the parameters' names"):
    Part("x9").check_names(params)
  with pytest.raises(UserError, match="'' is found in every one of the .* embed/embed"):
    Part("").check_names(params)
  Part("layers/0/").check_names(params)
