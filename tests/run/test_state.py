"""The first state: what is drawn at random has a key that nothing else has."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small import built, config

from okd_jax.run.state import random_state

SEED = 0


def tree(key, teachers, width):
  """What some method trains besides."""
  return {"kernel": jax.random.normal(key, (width, teachers))}


def apart(one, two):
  """Whether two trees share no leaf, but for those that are 0."""
  pairs = zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True)
  pairs = [pair for pair in pairs if pair[0].any()]
  return bool(pairs) and not any(np.allclose(*pair, rtol=1e-3) for pair in pairs)


@pytest.fixture(scope="module")
def cast(tmp_path_factory):
  okd = config(**{"method.name": "okd", "train.seed": SEED})
  return built(okd, tmp_path_factory.mktemp("run")).cast


def drawn(cast):
  """The state, with another tree beside student and adapter."""
  trees = {"other": (tree, 1e-3)}
  optimizers = dict.fromkeys(("student", "adapter", "other"), optax.sgd(1.0))
  return random_state(SEED, cast, optimizers, trees)


def test_an_adapter_and_a_random_teacher(cast):
  """The frozen teacher is drawn with fold_in(seed, 1), and so was its adapter once."""
  key = jax.random.fold_in(jax.random.key(SEED), 1)
  [(name, decoder)] = cast.adapted.items()
  twin = jax.jit(decoder.init)(key, jnp.zeros((1, 1), jnp.int32))
  np.testing.assert_allclose(
    twin["params"]["embed"]["embedding"],
    cast.frozen[name]["embed"]["embedding"],
    rtol=1e-5,
  )
  assert apart(twin["adapter"], drawn(cast).params["adapter"][name])


def test_what_a_method_trains_besides_and_the_first_step(cast):
  """A step draws with fold_in(key, step): at step 0 not what the tree began with."""
  state = drawn(cast)
  key, width = jax.random.fold_in(state.key, 0), cast.student.config.hidden_size
  assert apart(tree(key, len(cast.teachers), width), state.params["other"])
