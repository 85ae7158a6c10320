"""The training step: what moves, what does not, and what must make no difference."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trial import (
  SAMPLED,
  STUDENT,
  TEACHER,
  Setup,
  grads_and_loss,
  kept_by_layers,
  make_batch,
)

from okd_jax import methods
from okd_jax.methods.kd import NAMED
from okd_jax.models import Decoder
from okd_jax.run.state import init_state
from okd_jax.run.step import _counted, compile_step
from okd_jax.runtime import sharding


@pytest.mark.parametrize("microbatches", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_microbatches_make_no_difference(microbatches):
  """Guards C1: a mean of means (TRL#4719, verl#7200, swift#10165, NeMo#4172)."""
  batch = make_batch()
  # Unequal on purpose: the first row alone holds most of the valid tokens.
  batch = batch.replace(
    mask=batch.mask.at[1:].set(batch.mask[1:] & (jnp.arange(12)[None] < 3))
  )
  whole, metrics = grads_and_loss(Setup("okd"), batch)
  parts, same = grads_and_loss(Setup("okd", microbatches=microbatches), batch)
  chex.assert_trees_all_close(parts, whole, rtol=1e-4, atol=1e-5)
  for name in ("loss", "student_nll", "top1_agreement", "tokens"):
    np.testing.assert_allclose(same[name], metrics[name], rtol=1e-5)


def test_an_all_masked_part_adds_nothing():
  """Guards B5: DLM's NaN for a micro-batch without a valid token."""
  batch = make_batch()
  batch = batch.replace(mask=batch.mask.at[::2].set(False))  # all rows of part 0 of 2
  whole, _ = grads_and_loss(Setup("okd"), batch)
  parts, metrics = grads_and_loss(Setup("okd", microbatches=2), batch)
  chex.assert_trees_all_close(parts, whole, rtol=1e-4, atol=1e-5)
  batch = batch.replace(mask=jnp.zeros_like(batch.mask))
  nothing, metrics = grads_and_loss(Setup("okd", microbatches=2), batch)
  assert metrics["loss"] == 0 and metrics["finite"] == 1
  chex.assert_trees_all_equal(nothing, jax.tree.map(jnp.zeros_like, nothing))


def test_padding_makes_no_difference():
  """Guards B2: tunix's loss moves from .739 to 6.322 with the pads' contents."""
  batch = make_batch()
  want, metrics = grads_and_loss(Setup("okd"), batch)
  real = batch.segment_ids == 1
  junk = batch.replace(
    tokens=jnp.where(real, batch.tokens, 7), labels=jnp.where(real, batch.labels, 7)
  )
  got, same = grads_and_loss(Setup("okd"), junk)
  assert metrics["loss"] == same["loss"]
  chex.assert_trees_all_close(got, want, atol=1e-7)
  longer = jax.tree.map(lambda v: jnp.pad(v, ((0, 0), (0, 6))), batch)
  left = jax.tree.map(lambda v: jnp.pad(v, ((0, 0), (6, 0))), batch)
  for padded in (longer, left):
    got, same = grads_and_loss(Setup("okd"), padded)
    np.testing.assert_allclose(same["loss"], metrics["loss"], rtol=1e-6)
    chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-5)


def test_packed_rows_equal_rows_of_their_own():
  """Guards B6: two texts in one row train as they do in two."""
  batch = make_batch(rows=8, length=12)
  want, metrics = grads_and_loss(Setup("okd"), batch)
  packed = jax.tree.map(lambda v: v.reshape(4, 24), batch)
  second = (jnp.arange(24)[None] >= 12) & (packed.segment_ids == 1)
  packed = packed.replace(segment_ids=packed.segment_ids + second)
  got, same = grads_and_loss(Setup("okd"), packed)
  np.testing.assert_allclose(same["loss"], metrics["loss"], rtol=1e-5)
  chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-5)


def test_a_copy_of_the_batch_changes_no_mean():
  """Guards C3: a denominator that is not the number of valid tokens."""
  batch = make_batch()
  twice = jax.tree.map(lambda v: jnp.concatenate([v, v]), batch)
  want, metrics = grads_and_loss(Setup("kd"), batch)
  got, same = grads_and_loss(Setup("kd"), twice)
  np.testing.assert_allclose(same["loss"], metrics["loss"], rtol=1e-6)
  chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", sorted({*methods.METHODS} - {*NAMED, *SAMPLED}))
def test_only_student_and_adapter_move(name):
  """Guards F1: the teacher is bit-identical and has no optimiser state."""
  setup = Setup(name)
  before = jax.tree.map(np.array, setup.frozen)
  state, _ = setup.train(3)
  chex.assert_trees_all_equal(setup.frozen, before)
  adapted = setup.method.adapts
  trained = {"student"} | ({"adapter"} if adapted else set())
  assert set(state.params) == set(state.opt_state) == trained
  moments = sum(x.size for x in jax.tree.leaves(state.opt_state))
  weights = sum(x.size for x in jax.tree.leaves(state.params))
  assert 2 * weights <= moments <= 2 * weights + 10  # and a few counters
  for tree in trained:
    moved = jax.tree.map(lambda a, b: jnp.any(a != b), state.params, setup.params)
    assert all(jax.tree.leaves(moved[tree]))


def test_no_gradient_of_the_teachers_base_is_computed():
  """Guards F1: matmuls in the step's program, counted with and without a module.

  A frozen projection costs one matmul forward and one backward (to what lies below);
  a weight gradient would be a third, with a kernel's shape as its result.
  """
  setup = Setup("okd")
  text = str(jax.make_jaxpr(setup.train_step)(setup.state, setup.frozen, make_batch()))
  assert TEACHER.hidden_size != STUDENT.hidden_size
  kernel = f"{TEACHER.hidden_size},{TEACHER.mlp_size}"
  made = [
    line
    for line in text.splitlines()
    if "dot_general" in line and f"f32[{kernel}] = dot_general" in line
  ]
  assert not made
  student = f"{STUDENT.hidden_size},{STUDENT.mlp_size}"
  assert f"f32[{student}] = dot_general" in text  # so the search does find them


def test_a_step_that_is_not_finite_changes_nothing():
  """Guards reliability 5: stop before an update, whatever is saved later."""
  setup = Setup("okd")
  poisoned = jax.tree.map(lambda x: x * jnp.nan, setup.frozen)
  state, metrics = setup.step(setup.state, poisoned, make_batch())
  assert metrics["finite"] == 0
  chex.assert_trees_all_equal(state.params, setup.state.params)
  chex.assert_trees_all_equal(state.opt_state, setup.state.opt_state)


def test_an_update_that_is_not_finite_is_never_stored():
  """With an infinite rate loss and gradients are fine, and the step says it is not.

  None of the optimiser's finite numbers moves either.
  """
  setup = Setup("sft", lr=np.inf)
  state, metrics = setup.step(setup.state, setup.frozen, make_batch())
  assert metrics["finite"] == 0 and not np.isfinite(metrics["student_update_norm"])
  assert np.isfinite(metrics["student_grad_norm"]) and np.isfinite(metrics["loss"])
  chex.assert_trees_all_equal(state.params, setup.state.params)
  chex.assert_trees_all_equal(state.opt_state, setup.state.opt_state)


def test_what_is_not_finite_is_found_before_the_update():
  """To look takes hardly any memory; to wait for all updates took twice as much."""
  setup, x = Setup("sft"), jnp.ones((4, 64))

  def loss(models, params, frozen, batch, key, now):
    return sum(jnp.sum(jnp.square(x @ w)) for w in params["student"].values()), {}

  method = dataclasses.replace(setup.method, loss=loss)
  tree = {f"kernel_{i}": jnp.zeros((64, 1 << 14)) for i in range(16)}  # 64 MiB
  state = jax.eval_shape(
    lambda: init_state({"student": tree}, setup.optimizers, jax.random.key(0))
  )
  mesh = sharding.make_mesh(8, 1, 1)
  step = compile_step(method, setup.models, setup.optimizers, 1, 3, state, mesh)
  with jax.set_mesh(mesh):
    program = step.lower(state, {}, jax.eval_shape(make_batch)).compile()
  unguarded = 2 * 64 << 20  # gradients and the updates made of them
  assert program.memory_analysis().temp_size_in_bytes < 1.3 * unguarded


@pytest.mark.slow
def test_jit_makes_no_difference():
  setup, batch = Setup("okd"), make_batch()
  compiled, metrics = setup.step(setup.state, setup.frozen, batch)
  with jax.disable_jit():
    plain, same = setup.train_step(setup.state, setup.frozen, batch)
  np.testing.assert_allclose(same["loss"], metrics["loss"], rtol=1e-5)
  chex.assert_trees_all_close(plain.params, compiled.params, rtol=1e-3, atol=1e-4)


def test_remat_makes_no_difference_but_in_the_program():
  """Guards D4: nanodo's remat test compares two equal models."""
  batch = make_batch()
  params = Decoder(STUDENT).init(jax.random.key(0), batch.tokens)["params"]

  def loss(params, remat):
    decoder = Decoder(STUDENT, remat=remat)
    hidden, _ = decoder.apply({"params": params}, batch.tokens)
    return jnp.square(hidden).sum()

  plain, remat = (
    sum(kept_by_layers(lambda p, remat=remat: loss(p, remat), params))
    for remat in (False, True)
  )
  assert remat == batch.tokens.size * STUDENT.hidden_size * STUDENT.num_layers
  assert plain > 5 * remat
  grads = [jax.grad(loss)(params, remat) for remat in (False, True)]
  chex.assert_trees_all_close(*grads, rtol=1e-5, atol=1e-6)


def test_dropout_is_the_students_and_follows_the_key():
  batch = make_batch()
  dropped, plain = Setup("okd", dropout=0.5), Setup("okd")
  one, _ = grads_and_loss(dropped, batch)
  without, _ = grads_and_loss(plain, batch)
  assert any(jax.tree.leaves(jax.tree.map(lambda a, b: jnp.any(a != b), one, without)))
  later = dropped.state.replace(step=jnp.int32(1))
  _, first = dropped.step(dropped.state, dropped.frozen, batch)
  _, second = dropped.step(later, dropped.frozen, batch)
  assert first["loss"] != second["loss"]


def test_compiled_once():
  setup = Setup("okd")
  train_step, state = setup.train_step, setup.state

  @jax.jit
  @chex.assert_max_traces(n=1)
  def step(*arguments):
    return train_step(*arguments)

  for i in range(3):
    state, _ = step(state, setup.frozen, make_batch(i))


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
  "sizes, microbatches",
  [
    ((2, 2, 2), 2),
    pytest.param((8, 1, 1), 1, marks=SLOW),
    pytest.param((1, 8, 1), 2, marks=SLOW),
    pytest.param((2, 2, 2), 1, marks=SLOW),
    pytest.param((8, 1, 1), 2, marks=SLOW),
    pytest.param((1, 8, 1), 1, marks=SLOW),
    pytest.param((2, 4, 1), 1, marks=SLOW),
    pytest.param((4, 1, 2), 1, marks=SLOW),
    pytest.param((1, 2, 4), 2, marks=SLOW),
  ],
)
def test_devices_make_no_difference(sizes, microbatches, capfd):
  """Guards C2, D5: LMOps and DLM average per device first; the rows differ here.

  And XLA does not warn of an array that all devices must hold whole to divide it anew.
  """
  alone = Setup("okd")
  _, want = alone.train(3)
  setup = Setup("okd", microbatches=microbatches)
  mesh = sharding.make_mesh(*sizes)
  with jax.set_mesh(mesh):
    step = compile_step(
      setup.method, setup.models, setup.optimizers, microbatches, 3, setup.state, mesh
    )
    state = jax.device_put(setup.state, sharding.shardings(setup.state, mesh))
    frozen = jax.device_put(setup.frozen, sharding.shardings(setup.frozen, mesh))
    losses = []
    for i in range(3):
      # With two parts the same rows twice, so that the mean stays what it is.
      batch = make_batch(i)
      batch = jax.tree.map(lambda v: jnp.concatenate([v] * microbatches), batch)
      batch = sharding.put_batch(jax.tree.map(np.asarray, batch), mesh)
      state, metrics = step(state, frozen, batch)
      losses.append(float(metrics["loss"]))
    np.testing.assert_allclose(losses, want, rtol=2e-5)
    assert "rematerialization" not in capfd.readouterr().err
    if sizes[1] > 1:
      kernel = state.params["student"]["layers"]["mlp"]["up"]["kernel"]
      assert kernel.addressable_shards[0].data.size < kernel.size


def test_donated_state_leaves_the_teacher_alone():
  """Guards trap (c) 2: a student made of the teacher's arrays, donated."""
  from okd_jax.models import take_layers

  setup = Setup("okd", student=TEACHER)
  student, _ = take_layers(setup.frozen["teacher"], TEACHER, TEACHER.num_layers)
  state = setup.state.replace(params=setup.state.params | {"student": student})
  mesh = sharding.make_mesh(8, 1, 1)
  with jax.set_mesh(mesh):
    step = compile_step(setup.method, setup.models, setup.optimizers, 1, 3, state, mesh)
    state = jax.device_put(state, sharding.shardings(state, mesh))
    batch = sharding.put_batch(jax.tree.map(np.asarray, make_batch()), mesh)
    for _ in range(2):
      state, metrics = step(state, setup.frozen, batch)
      assert np.isfinite(float(metrics["loss"]))


def poisoned(where, state, frozen):
  """A number that is not finite in one place: (state, frozen, what its figure is)."""

  def spoil(tree):
    leaves, structure = jax.tree.flatten(tree)
    place = max(range(len(leaves)), key=lambda i: leaves[i].size)
    leaves[place] = leaves[place].at[(0,) * leaves[place].ndim].set(jnp.nan)
    return jax.tree.unflatten(structure, leaves)

  if where == "teacher":
    return state, spoil(frozen), "teacher_nll"
  if where in state.params:
    params = state.params | {where: spoil(state.params[where])}
    figure = {"student": "student_nll", "adapter": "module_loss"}[where]
    return state.replace(params=params), frozen, figure
  name = where.removeprefix("optimiser of ")
  opt_state = state.opt_state | {name: spoil(state.opt_state[name])}
  return state.replace(opt_state=opt_state), frozen, f"{name}_update_norm"


WHERE = ["teacher", "student", "adapter", "optimiser of student"]
WHERE.append("optimiser of adapter")


@pytest.fixture(scope="module")
def counting():
  """OKD's step that counts what it skips, on one device and on eight."""
  setup = Setup("okd")
  state = setup.state.replace(skipped=jnp.zeros((), jnp.int32))
  mesh = sharding.make_mesh(2, 4, 1)
  with jax.set_mesh(mesh):
    spread = compile_step(
      setup.method, setup.models, setup.optimizers, 1, 20, state, mesh
    )
  return setup, state, {1: jax.jit(setup.train_step), 8: spread}, mesh


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("where", WHERE)
def test_whatever_is_not_finite_moves_nothing_and_is_counted(counting, where, devices):
  """In data it is a teacher's token; the step after it goes on from the same bits."""
  setup, state, steps, mesh = counting
  step = steps[devices]
  batch = make_batch()
  bad, frozen, figure = poisoned(where, state, setup.frozen)
  before = jax.tree.map(np.array, (bad.params, bad.opt_state))
  if devices == 8:
    with jax.set_mesh(mesh):
      own = jax.tree.map(jnp.copy, bad)  # which is donated
      own = jax.device_put(own, sharding.shardings(bad, mesh))
      frozen = jax.device_put(frozen, sharding.shardings(frozen, mesh))
      rows = sharding.put_batch(jax.tree.map(np.asarray, batch), mesh)
      new, metrics = step(own, frozen, rows)
  else:
    new, metrics = step(bad, frozen, batch)
  assert metrics["finite"] == 0 and metrics["skipped"] == 1 and new.skipped == 1
  assert not np.isfinite(metrics[figure]) and new.step == 1
  chex.assert_trees_all_equal(
    jax.tree.map(np.array, (new.params, new.opt_state)), before
  )


def test_a_run_goes_on_after_what_it_skipped(counting):
  """As if the step had not come: its trees, moments and their count are as before."""
  setup, state, steps, _ = counting
  _, frozen, _ = poisoned("teacher", state, setup.frozen)
  skipped, metrics = steps[1](state, frozen, make_batch())
  assert metrics["skipped"] == 1
  after, metrics = steps[1](skipped, setup.frozen, make_batch(1))
  later = state.replace(step=jnp.int32(1))
  plain, _ = steps[1](later, setup.frozen, make_batch(1))
  assert metrics["skipped"] == 1 and metrics["finite"] == 1
  chex.assert_trees_all_equal(after.params, plain.params)
  chex.assert_trees_all_equal(after.opt_state, plain.opt_state)


def test_an_update_that_overflows_in_some_numbers_is_none_that_was_skipped(counting):
  """The others have moved: a run that may skip must stop there all the same."""
  _, state, *_ = counting
  yes, no = jnp.bool_(True), jnp.bool_(False)
  new, told = _counted(state, yes, no, {})
  assert told["skipped"] == -1 and told["finite"] == 0 and new.skipped == 0
  new, told = _counted(state, no, no, {})
  assert told["skipped"] == 1 == new.skipped
