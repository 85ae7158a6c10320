"""Schedules and the optimiser, against plain formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from okd_jax import optim
from okd_jax.errors import UserError

OPTIONS = dict(b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0, clip=0.0)


def test_schedules():
  cosine = optim.schedule("cosine", 1.0, 110, 10, 0.2)
  got = [float(cosine(n)) for n in (0, 5, 10, 60, 110)]
  np.testing.assert_allclose(got, [0, 0.5, 1.0, 0.6, 0.2], atol=1e-6)
  linear = optim.schedule("linear", 2.0, 100, 0, 1.0)
  np.testing.assert_allclose([float(linear(n)) for n in (0, 50, 100)], [2, 1.5, 1])
  assert float(optim.schedule("constant", 3.0, 5, 0, 0.0)(4)) == 3.0


@pytest.mark.parametrize(
  "name, warmup, message",
  [("cosin", 0, "optim.schedule='cosin'"), ("cosine", 11, "optim.warmup_steps=11")],
)
def test_bad_schedules(name, warmup, message):
  with pytest.raises(UserError, match=message):
    optim.schedule(name, 1.0, 10, warmup, 0.0)


def test_first_adam_step_is_the_learning_rate_in_size():
  params = {"kernel": jnp.ones(4)}
  tx = optim.build(lambda _: 0.1, lr_scale=0.5, **OPTIONS)
  updates, _ = tx.update({"kernel": jnp.arange(1.0, 5.0)}, tx.init(params), params)
  np.testing.assert_allclose(updates["kernel"], -0.05, rtol=1e-5)


def test_clip_is_by_the_trees_own_norm():
  params = {"kernel": jnp.zeros(2)}
  clipped = optim.build(lambda _: 1.0, **OPTIONS | {"clip": 1.0})
  state = clipped.init(params)
  grads = {"kernel": jnp.array([30.0, 40.0])}
  _, state = clipped.update(grads, state, params)
  moment = [x for x in jax.tree.leaves(state) if getattr(x, "shape", ()) == (2,)][0]
  np.testing.assert_allclose(moment, 0.1 * np.array([0.6, 0.8]), rtol=1e-5)


def test_decay_is_for_matrices_only():
  params = {
    "embed": {"embedding": jnp.ones((4, 2))},
    "norm": {"scale": jnp.ones(2), "bias": jnp.ones(2)},
    "layers": {"query": {"kernel": jnp.ones((3, 2, 2)), "bias": jnp.ones((3, 2))}},
  }
  mask = optim.decay_mask(params)
  assert mask == {
    "embed": {"embedding": True},
    "norm": {"scale": False, "bias": False},
    "layers": {"query": {"kernel": True, "bias": False}},
  }
  tx = optim.build(lambda _: 1.0, **OPTIONS | {"weight_decay": 0.5})
  zeros = jax.tree.map(jnp.zeros_like, params)
  updates, _ = tx.update(zeros, tx.init(params), params)
  np.testing.assert_allclose(updates["embed"]["embedding"], -0.5)
  np.testing.assert_array_equal(updates["layers"]["query"]["bias"], 0)
