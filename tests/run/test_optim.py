"""Schedules and the optimiser, against plain formulas."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small import built, config
from trial import OPTIM, Setup, make_batch

from okd_jax.config.schema import OptimSettings
from okd_jax.errors import UserError
from okd_jax.run import optim
from okd_jax.run.state import init_state
from okd_jax.run.step import compile_step
from okd_jax.runtime import sharding

PLAIN = OptimSettings(weight_decay=0.0, clip=0.0)


def schedule(name, lr, steps, warmup, end):
  settings = OptimSettings(schedule=name, lr=lr, warmup_steps=warmup, end_lr=end)
  return optim.schedule(settings, steps)


def test_schedules():
  cosine = schedule("cosine", 1.0, 110, 10, 0.2)
  got = [float(cosine(n)) for n in (0, 5, 10, 60, 110)]
  np.testing.assert_allclose(got, [0, 0.5, 1.0, 0.6, 0.2], atol=1e-6)
  linear = schedule("linear", 2.0, 100, 0, 1.0)
  np.testing.assert_allclose([float(linear(n)) for n in (0, 50, 100)], [2, 1.5, 1])
  assert float(schedule("constant", 3.0, 5, 0, 0.0)(4)) == 3.0


@pytest.mark.parametrize(
  "name, warmup, message",
  [("cosin", 0, "optim.schedule='cosin'"), ("cosine", 11, "optim.warmup_steps=11")],
)
def test_bad_schedules(name, warmup, message):
  with pytest.raises(UserError, match=message):
    schedule(name, 1.0, 10, warmup, 0.0)


def test_first_adam_step_is_the_learning_rate_in_size():
  params = {"kernel": jnp.ones(4)}
  tx = optim.build(PLAIN, lambda _: 0.1, lr_scale=0.5)
  updates, _ = tx.update({"kernel": jnp.arange(1.0, 5.0)}, tx.init(params), params)
  np.testing.assert_allclose(updates["kernel"], -0.05, rtol=1e-5)


def test_clip_is_by_the_trees_own_norm():
  params = {"kernel": jnp.zeros(2)}
  clipped = optim.build(dataclasses.replace(PLAIN, clip=1.0), lambda _: 1.0)
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
    # Of adapters: the virtual tokens themselves, and the MLP that makes them.
    "prompt": {"embedding": jnp.ones((5, 2)), "dense": {"kernel": jnp.ones((2, 2))}},
  }
  mask = optim.decay_mask(params)
  assert mask == {
    "embed": {"embedding": True},
    "norm": {"scale": False, "bias": False},
    "layers": {"query": {"kernel": True, "bias": False}},
    "prompt": {"embedding": False, "dense": {"kernel": True}},
  }
  tx = optim.build(dataclasses.replace(PLAIN, weight_decay=0.5), lambda _: 1.0)
  zeros = jax.tree.map(jnp.zeros_like, params)
  updates, _ = tx.update(zeros, tx.init(params), params)
  np.testing.assert_allclose(updates["embed"]["embedding"], -0.5)
  np.testing.assert_array_equal(updates["layers"]["query"]["bias"], 0)


@pytest.mark.parametrize("dtype, wanted", [("", "float32"), ("bfloat16", "bfloat16")])
def test_the_first_moments_alone_have_the_dtype_asked_for(dtype, wanted, tmp_path):
  changes = {"method.name": "okd", "optim.dtype": dtype}
  state = built(config(**changes), tmp_path).plan.abstract
  for name, params in state.params.items():
    moments = optax.tree.get(state.opt_state[name], "mu")
    first = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, wanted), params)
    chex.assert_trees_all_equal_shapes_and_dtypes(moments, first)
    second = optax.tree.get(state.opt_state[name], "nu")
    chex.assert_trees_all_equal_shapes_and_dtypes(second, params)


@pytest.fixture(scope="module")
def steps():
  """Of kd: (compiled step, state, frozen, batch) by the first moments' dtype."""
  mesh, found = sharding.make_mesh(8, 1, 1), {}
  for dtype in ("", "bfloat16"):
    trial = Setup("kd")
    own = dataclasses.replace(OPTIM, dtype=dtype)
    tx = {"student": optim.build(own, lambda _: 3e-3)}
    state = init_state(trial.params, tx, jax.random.key(3))
    state = jax.device_put(state, sharding.shardings(state, mesh))
    frozen = jax.device_put(trial.frozen, sharding.shardings(trial.frozen, mesh))
    batch = sharding.put_batch(jax.tree.map(np.asarray, make_batch()), mesh)
    with jax.set_mesh(mesh):
      step = compile_step(trial.method, trial.models, tx, 1, 40, state, mesh)
      found[dtype] = step.lower(state, frozen, batch).compile(), state, frozen, batch
  return found


def test_moments_in_bfloat16_take_two_bytes_less_for_each_trained_parameter(steps):
  size = {
    dtype: step.memory_analysis().argument_size_in_bytes
    for dtype, (step, *_) in steps.items()
  }
  _, state, *_ = steps[""]
  trained = sum(leaf.size for leaf in jax.tree.leaves(state.params))
  assert size[""] - size["bfloat16"] == 2 * trained


def test_training_with_moments_in_bfloat16_stays_close(steps):
  losses = {}
  for dtype, (step, state, frozen, batch) in steps.items():
    state, losses[dtype] = jax.tree.map(jnp.copy, state), []
    for _ in range(40):
      state, metrics = step(state, frozen, batch)
      losses[dtype].append(float(metrics["loss"]))
  exact, rounded = losses.values()
  assert exact[0] == rounded[0] and exact != rounded
  assert exact[-1] < 0.7 * exact[0]
  np.testing.assert_allclose(rounded, exact, rtol=5e-3)
