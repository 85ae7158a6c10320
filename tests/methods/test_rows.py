"""Adapters that learn from some of the rows, or in some of the steps, alone."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from trial import VOCAB, Setup, grads_and_loss, make_batch

from okd_jax import methods
from okd_jax.config import read
from okd_jax.config.players import AdapterSettings
from okd_jax.data.batch import Batch, first_rows, other_rows
from okd_jax.errors import UserError
from okd_jax.run import job
from okd_jax.run.step import compile_step
from okd_jax.runtime import sharding

ONLINE = {"okd": {}, "kd": {"module": "lora"}}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def setup_of(name, **options):
  return Setup(name, **ONLINE[name], **options)


def without(batch, rows):
  """The batch, nothing of these rows being trained on."""
  return batch.replace(mask=batch.mask.at[rows].set(False))


def test_rows_in_groups():
  rows = jnp.arange(8)[:, None] * jnp.ones((1, 3))
  np.testing.assert_array_equal(first_rows(rows, 4)[:, 0], [0, 4])
  np.testing.assert_array_equal(other_rows(rows, 4)[:, 0], [1, 2, 3, 5, 6, 7])


@pytest.mark.parametrize(
  "name, options",
  [
    pytest.param("okd", {}, marks=pytest.mark.slow),
    ("okd", {"anchor_weight": 0.3, "student_kl_weight": 0.6}),
    pytest.param("kd", {"anchor_weight": 0.3}, marks=pytest.mark.slow),
  ],
)
def test_the_modules_gradient_is_that_of_its_rows(name, options):
  """As if the batch were these rows; the student's is that of the whole batch."""
  batch = make_batch()
  whole, metrics = grads_and_loss(setup_of(name, **options), batch)
  some, theirs = grads_and_loss(setup_of(name, one_row_in=4, **options), batch)
  alone, mine = grads_and_loss(setup_of(name, **options), first_rows(batch, 4))
  chex.assert_trees_all_close(some["student"], whole["student"], **CLOSE)
  chex.assert_trees_all_close(some["adapter"], alone["adapter"], **CLOSE)
  for figure in ("module_loss", "module_divergence"):
    np.testing.assert_allclose(theirs[figure], mine[figure], rtol=1e-5)
  for figure in ("divergence", "student_nll", "teacher_nll", "top1_agreement"):
    np.testing.assert_allclose(theirs[figure], metrics[figure], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name, microbatches", [("okd", 2), ("kd", 2)])
def test_micro_batches_teach_with_the_same_rows(name, microbatches):
  """Guards C1: unequal parts, the first of which has nothing to train on."""
  batch = without(make_batch(), jnp.array([0, 1, 2, 3]))
  whole, metrics = grads_and_loss(setup_of(name, one_row_in=4), batch)
  cut, same = grads_and_loss(
    setup_of(name, one_row_in=4, microbatches=microbatches), batch
  )
  chex.assert_trees_all_close(cut, whole, **CLOSE)
  for figure in ("loss", "module_loss", "student_nll"):
    np.testing.assert_allclose(same[figure], metrics[figure], rtol=1e-5)


@pytest.mark.parametrize("name", ["okd", pytest.param("kd", marks=pytest.mark.slow)])
def test_rows_without_a_trained_token_teach_nothing(name):
  """Guards B5: all rows that would teach are masked; the student learns anyway."""
  batch = without(make_batch(), jnp.array([0, 4]))
  grads, metrics = grads_and_loss(setup_of(name, one_row_in=4), batch)
  whole, _ = grads_and_loss(setup_of(name), batch)
  assert metrics["finite"] == 1 and metrics["module_loss"] == 0
  chex.assert_trees_all_equal(
    grads["adapter"], jax.tree.map(jnp.zeros_like, grads["adapter"])
  )
  chex.assert_trees_all_close(grads["student"], whole["student"], **CLOSE)


@pytest.mark.parametrize(
  "sizes, microbatches",
  [((2, 2, 2), 2), ((4, 1, 2), 1)],
)
@pytest.mark.slow
def test_devices_teach_with_the_same_rows(sizes, microbatches):
  """Guards C2: of 16 rows the same four teach, wherever they lie."""
  batch = make_batch(rows=16)
  alone = setup_of("okd", one_row_in=2)
  _, want = alone.step(alone.state, alone.frozen, batch)
  cut = setup_of("okd", one_row_in=2, microbatches=microbatches)
  mesh = sharding.make_mesh(*sizes)
  with jax.set_mesh(mesh):
    step = compile_step(
      cut.method, cut.models, cut.optimizers, microbatches, 20, cut.state, mesh
    )
    state = jax.device_put(cut.state, sharding.shardings(cut.state, mesh))
    frozen = jax.device_put(cut.frozen, sharding.shardings(cut.frozen, mesh))
    rows = sharding.put_batch(jax.tree.map(np.asarray, batch), mesh)
    _, got = step(state, frozen, rows)
  for name in ("loss", "module_loss", "student_loss", "adapter_grad_norm"):
    np.testing.assert_allclose(got[name], want[name], rtol=2e-5)


@pytest.fixture(scope="module")
def ways():
  """Steps over whole rows, in micro-batches, on eight devices: batch -> figures."""
  alone = setup_of("okd", one_row_in=2, anchor_weight=0.3)
  cut = setup_of("okd", one_row_in=2, anchor_weight=0.3, microbatches=2)
  mesh = sharding.make_mesh(2, 2, 2)
  with jax.set_mesh(mesh):
    step = compile_step(cut.method, cut.models, cut.optimizers, 2, 20, cut.state, mesh)
    frozen = jax.device_put(cut.frozen, sharding.shardings(cut.frozen, mesh))

  def on_devices(batch):
    with jax.set_mesh(mesh):
      state = jax.device_put(
        jax.tree.map(jnp.copy, cut.state), sharding.shardings(cut.state, mesh)
      )
      return step(state, frozen, sharding.put_batch(batch, mesh))[1]

  return {
    "whole": lambda batch: alone.step(alone.state, alone.frozen, batch)[1],
    "cut": lambda batch: cut.step(cut.state, cut.frozen, batch)[1],
    "devices": on_devices,
  }


def packed(seed, empty):
  """16 rows of two texts and some padding; nothing is trained on in rows `empty`."""
  rng = np.random.default_rng(seed)
  rows, length = 16, 12
  place = np.arange(length)
  first, end = rng.integers(2, 7, (rows, 1)), rng.integers(8, length + 1, (rows, 1))
  segments = np.where(place < first, 1, np.where(place < end, 2, 0))
  mask = (rng.uniform(size=(rows, length)) < 0.5) & (segments > 0)
  mask &= np.roll(segments, -1, axis=1) == segments  # no label is another text's
  mask[sorted(empty)] = False
  ids = rng.integers(0, VOCAB, (2, rows, length), dtype=np.int32)
  return Batch(ids[0], ids[1], mask, segments.astype(np.int32))


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10_000), st.sets(st.integers(0, 15), max_size=14))
@example(0, {0, 2, 4, 6, 8, 10, 12, 14})  # no row that would teach is trained on
@example(1, {0, 1, 2, 3, 4, 5, 6, 7})
@pytest.mark.slow
def test_packed_rows_give_one_loss_however_they_are_cut(ways, seed, empty):
  """Guards B5, C1, C2."""
  batch = packed(seed, empty)
  want = ways["whole"](batch)
  for name in ("cut", "devices"):
    got = ways[name](batch)
    for figure in ("loss", "module_loss", "student_loss", "drift"):
      np.testing.assert_allclose(got[figure], want[figure], rtol=1e-5, atol=1e-6)
    for tree in ("student", "adapter"):
      norm = f"{tree}_grad_norm"
      np.testing.assert_allclose(got[norm], want[norm], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("order", ["simultaneous", "sequential"])
def test_a_step_that_holds_the_module(order):
  """The adapter and its moments stay to the last bit; the student is pulled to it."""
  setup = setup_of("okd", update_order=order)
  mesh = sharding.make_mesh(8, 1, 1)
  moved, _ = setup.step(
    setup.state, setup.frozen, make_batch()
  )  # no longer at its start
  kept = jax.tree.map(np.array, (moved.params, moved.opt_state))
  held = compile_step(
    setup.method, setup.models, setup.optimizers, 1, 20, moved, mesh, learns=False
  )
  batch = make_batch(1)
  beside = setup_of("okd")  # in which both trees would move at once
  _, want = beside.step(moved, beside.frozen, batch)
  with jax.set_mesh(mesh):
    state, metrics = held(jax.tree.map(jnp.copy, moved), setup.frozen, batch)
  for tree, before in zip((state.params, state.opt_state), kept, strict=True):
    chex.assert_trees_all_equal(tree["adapter"], before["adapter"])
  assert not any(name.startswith("module_") for name in metrics)
  np.testing.assert_allclose(
    metrics["student_grad_norm"], want["student_grad_norm"], rtol=1e-5
  )


@pytest.mark.slow
def test_the_share_saves_memory():
  """The teacher keeps what its backward pass needs for a quarter of the rows."""
  batch = make_batch(rows=16, length=12)

  def temporaries(**options):
    setup = setup_of("okd", **options)
    program = jax.jit(setup.train_step).lower(setup.state, setup.frozen, batch)
    return program.compile().memory_analysis().temp_size_in_bytes

  assert temporaries(one_row_in=4) < 0.75 * temporaries(one_row_in=1)


def test_which_steps_the_module_learns_in():
  every = AdapterSettings(every=3, until=0.5)
  assert [i for i in range(20) if every.learns(i, 20)] == [0, 3, 6, 9]
  assert all(AdapterSettings().learns(i, 5) for i in range(5))


@pytest.mark.parametrize(
  "changes, words",
  [
    ({"rows": 0.3}, "adapter.rows=0.3 must be one part of a whole"),
    ({"rows": 0}, "adapter.rows=0 must be one part"),
    ({"every": 0}, "adapter.every=0 must be at least 1"),
    ({"until": 0}, "adapter.until=0 must be above 0"),
  ],
)
def test_shares_that_cannot_be(changes, words):
  with pytest.raises(UserError, match=words):
    AdapterSettings(**changes)


def test_who_takes_shares():
  for name in methods.METHODS:
    method = methods.build(name, {})
    if method.adapts:
      assert method.takes_rows == (name != "promptkd"), name
  assert methods.build("kd", {}, "lora").takes_rows


@pytest.mark.parametrize("recipe", ["quickstart", "smollm2", "stories"])
@pytest.mark.parametrize("name, group", [("promptkd", 1), ("kd", 1), ("okd", 4)])
def test_a_recipes_share_of_rows_stops_no_method(recipe, name, group):
  flags = [f"--config=configs/{recipe}.py", f"--config.method.name={name}"]
  assert job.check(read.read(flags)).one_row_in == group


def test_rows_of_a_group_stay_together():
  with pytest.raises(UserError, match="and of 1 / adapter.rows = 4"):
    sharding.check_batch(16, 1, sharding.make_mesh(8, 1, 1), 4)
