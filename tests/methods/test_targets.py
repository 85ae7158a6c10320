"""Which tokens a loss learns from, what the student learns from, and a held anchor."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trial import LogitTrial, Setup, grads_and_loss, make_batch, make_logits

from okd_jax import methods
from okd_jax.config.players import AdapterSettings
from okd_jax.errors import UserError
from okd_jax.losses import Output
from okd_jax.methods import online_module
from okd_jax.methods.base import Linear, TokenWeight, targets, token_weights

CLOSE = {"rtol": 1e-4, "atol": 1e-6}
EYE = jnp.eye(5)  # a head under which hidden states are the logits


def softmax(z):
  return np.asarray(jax.nn.softmax(jnp.asarray(z)))


def divide(how, teacher, student, weights, chunk=3):
  found = token_weights.divide(
    how, Output(teacher, EYE), Output(student, EYE), jnp.asarray(weights), chunk
  )
  return np.asarray(found)


def logits(seed, rows=4, length=7):
  return 2 * jax.random.normal(jax.random.key(seed), (rows, length, 5))


def kl(p, q):
  p, q = (np.asarray(jax.nn.log_softmax(x), np.float64) for x in (p, q))
  return (np.exp(p) * (p - q)).sum(-1)


# Weights of tokens


def test_the_top_of_a_row_by_hand():
  """Half of five tokens are three; padding with the largest distance has no part."""
  teacher = jnp.zeros((1, 6, 5))
  distances = jnp.array([0.0, 3.0, 1.0, 2.0, 9.0, 0.5])
  student = teacher.at[0, :, 0].set(distances)
  weights = np.array([[0.2, 0.2, 0.2, 0.2, 0.0, 0.2]], np.float32)
  got = divide(TokenWeight("top", 0.5), teacher, student, weights)
  np.testing.assert_allclose(got, [[0, 1 / 3, 1 / 3, 1 / 3, 0, 0]], rtol=1e-6)
  fifth = divide(TokenWeight("top", 0.2), teacher, student, weights)
  np.testing.assert_allclose(fifth, [[0, 1, 0, 0, 0, 0]], rtol=1e-6)


@pytest.mark.parametrize("kind", ["entropy", "divergence"])
def test_weights_in_proportion(kind):
  teacher, student = logits(0), logits(1)
  weights = np.random.default_rng(0).uniform(0, 1, (4, 7)).astype(np.float32)
  weights[:, 5:] = 0
  weights[2] = 0
  p = softmax(teacher)
  score = -(p * np.log(p)).sum(-1) if kind == "entropy" else kl(teacher, student)
  own = weights * score
  total = np.maximum(own.sum(1, keepdims=True), 1e-30)
  got = divide(TokenWeight(kind), teacher, student, weights)
  np.testing.assert_allclose(
    got, own * weights.sum(1, keepdims=True) / total, rtol=1e-4
  )


def test_a_row_whose_tokens_all_score_0_keeps_its_weights():
  same, weights = logits(0), np.full((4, 7), 0.1, np.float32)
  got = divide(TokenWeight("divergence"), same, same, weights)
  np.testing.assert_array_equal(got, weights)


@settings(max_examples=10, deadline=None)
@given(
  st.integers(0, 10_000),
  st.sampled_from(["entropy", "divergence", "top:0.2", "top:0.5", "top:1.0"]),
)
def test_rows_keep_their_weight_and_do_not_see_one_another(seed, text):
  """Guards C1, C2: however a batch is cut, a token weighs the same."""
  how, rng = TokenWeight.read("method.token_weight", text), np.random.default_rng(seed)
  teacher, student = logits(seed), logits(seed + 1)
  weights = (rng.uniform(size=(4, 7)) < 0.6) * np.float32(0.05)
  got = divide(how, teacher, student, weights)
  np.testing.assert_allclose(got.sum(1), weights.sum(1), rtol=1e-5)
  assert (got[weights == 0] == 0).all() and (got >= 0).all()
  if how.kind == "top":
    count = (weights > 0).sum(1)
    wanted = np.ceil(how.share * count - 1e-4)
    np.testing.assert_array_equal((got > 0).sum(1), wanted)
  halves = [
    divide(how, teacher[r], student[r], weights[r], chunk=7)
    for r in (slice(0, 2), slice(2, 4))
  ]
  np.testing.assert_allclose(np.concatenate(halves), got, rtol=1e-5)


def test_a_fifth_of_fifteen_is_three():
  """And not four, by the rounding of 0.2 * 15."""
  teacher = jnp.zeros((1, 15, 5))
  student = teacher.at[0, :, 0].set(jnp.arange(15.0))
  got = divide(TokenWeight("top", 0.2), teacher, student, np.ones((1, 15), np.float32))
  assert (got > 0).sum() == 3


@pytest.mark.parametrize("text", ["top", "top:0", "top:2", "top:x", "entropy:1", "kl"])
def test_weights_that_cannot_be(text):
  words = "must be one of entropy, divergence, top:SHARE"
  with pytest.raises(UserError, match=f"adapter.tokens=.{text}. {words}"):
    AdapterSettings(tokens=text)
  with pytest.raises(UserError, match="method.token_weight="):
    methods.build("kd", {"token_weight": text})


def test_a_gate_is_the_modules_alone():
  """Of a fifth of the tokens the module's loss, of all of them the student's."""
  student, teacher, base = make_logits()
  batch = make_batch()
  plain, gated = LogitTrial("okd"), LogitTrial("okd")
  gate = TokenWeight("top", 0.2)
  gated.models = dataclasses.replace(gated.models, module_tokens=gate)

  def grads(trial):
    loss = lambda s, t: trial(s, t, base, batch)  # noqa: E731
    return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(student, teacher)

  (s, t), _ = grads(gated)
  (s_all, t_all), _ = grads(plain)
  chex.assert_trees_all_close(s, s_all, **CLOSE)
  mask = np.asarray(batch.mask)
  distance = np.where(mask, kl(teacher, student), -1)
  for row in range(len(mask)):
    kept = np.argsort(-distance[row])[: int(np.ceil(mask[row].sum() / 5))]
    beside = np.setdiff1d(np.arange(mask.shape[1]), kept)
    assert (np.abs(t[row, kept]).sum(-1) > 0).all()
    np.testing.assert_array_equal(t[row, beside], 0)
    # The kept ones share what the row's tokens weigh together.
    factor = mask[row].sum() / len(kept)
    np.testing.assert_allclose(t[row, kept], factor * t_all[row, kept], rtol=1e-4)


@pytest.mark.parametrize("name", ["kd", "okd"])
def test_the_students_tokens_are_weighed(name):
  student, teacher, base = make_logits()
  batch = make_batch()
  said = teacher if name == "okd" else base

  def grads(**knobs):
    trial = LogitTrial(name, **knobs)
    loss = lambda s, t: trial(s, t, base, batch)[0]  # noqa: E731
    return jax.jit(jax.grad(loss, (0, 1)))(student, teacher)

  some, everything = grads(token_weight="top:0.5"), grads()
  mask = np.asarray(batch.mask)
  distance = np.where(mask, kl(said, student), -1)
  for row in range(len(mask)):
    kept = np.argsort(-distance[row])[: int(np.ceil(mask[row].sum() / 2))]
    beside = np.setdiff1d(np.arange(mask.shape[1]), kept)
    np.testing.assert_array_equal(some[0][row, beside], 0)
    factor = mask[row].sum() / len(kept)
    want = factor * everything[0][row, kept]
    np.testing.assert_allclose(some[0][row, kept], want, rtol=1e-4)
  if name == "okd":
    chex.assert_trees_all_close(some[1], everything[1], **CLOSE)


@pytest.mark.parametrize(
  "options",
  [
    {"token_weight": "divergence"},
    pytest.param({"token_weight": "top:0.5", "one_row_in": 4}, marks=pytest.mark.slow),
  ],
)
def test_micro_batches_weigh_the_same(options):
  """Guards C1: with a gate on the module as well, and rows without a trained token."""
  batch = make_batch()
  batch = batch.replace(mask=batch.mask.at[jnp.array([0, 5])].set(False))
  options = options | {"module_tokens": TokenWeight("top", 0.3)}
  whole, metrics = grads_and_loss(Setup("okd", **options), batch)
  cut, same = grads_and_loss(Setup("okd", microbatches=2, **options), batch)
  chex.assert_trees_all_close(cut, whole, rtol=1e-4, atol=1e-5)
  for figure in ("loss", "module_loss", "student_loss"):
    np.testing.assert_allclose(same[figure], metrics[figure], rtol=1e-5)


# Targets


def student_gradient(name, student, teacher, base, batch, **knobs):
  trial = LogitTrial(name, **knobs)
  return jax.jit(jax.grad(lambda s: trial(s, teacher, base, batch)[0]))(student)


@pytest.mark.parametrize("kind", ["arithmetic", "geometric"])
@pytest.mark.parametrize("share, heat", [(0.0, 1.0), (0.3, 1.0), (0.3, 2.0)])
def test_a_mixture_of_both_teachers(kind, share, heat):
  """The gradient of T^2 times the forward KL is weight * T (q - the mixture), at T."""
  student, teacher, base = make_logits()
  batch = make_batch()
  knobs = {"target_mix": share, "target_kind": kind, "temperature": heat}
  got = student_gradient("okd", student, teacher, base, batch, **knobs)
  adapted, plain = (softmax(z / heat) for z in (teacher, base))
  if kind == "arithmetic":
    mixed = share * adapted + (1 - share) * plain
  else:
    mixed = softmax(share * np.log(adapted) + (1 - share) * np.log(plain))
  weight = np.asarray(batch.mask / batch.mask.sum())[..., None]
  want = weight * heat * (softmax(student / heat) - mixed)
  np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("name", ["kd", "okd"])
def test_a_target_between_student_and_teacher(name):
  student, teacher, base = make_logits()
  batch = make_batch()
  got = student_gradient(name, student, teacher, base, batch, student_mix=0.6)
  said = teacher if name == "okd" else base
  mixed = softmax(0.6 * student + 0.4 * said)
  weight = np.asarray(batch.mask / batch.mask.sum())[..., None]
  np.testing.assert_allclose(got, weight * (softmax(student) - mixed), atol=1e-6)


def test_a_target_that_moves_with_the_run():
  """Linear: 0.6 at the first step, 0 at the last."""
  trial = LogitTrial("kd", student_mix=0.6, end={"student_mix": 0.0})
  student, teacher, base = make_logits()
  batch = make_batch()

  def grad(progress):
    loss = lambda s: trial(s, teacher, base, batch, progress=progress)[0]  # noqa: E731
    return jax.grad(loss)(student)

  plain = student_gradient("kd", student, teacher, base, batch)
  np.testing.assert_allclose(grad(1.0), plain, atol=1e-6)
  half = student_gradient("kd", student, teacher, base, batch, student_mix=0.3)
  np.testing.assert_allclose(grad(0.5), half, atol=1e-6)


def test_a_target_that_adapts():
  """TAID's rule in plain Python: faster than the line while the divergence falls."""
  knob, momentum, rate = Linear(0.6, 0.0), 0.99, 5e-4
  carried = {"student_mix": 0.6, "_student_mix_gain": 0.0, "_divergence": 0.0}
  carried = {k: jnp.float32(v) for k, v in carried.items()}
  share, gain, before = 0.6, 0.0, 0.0
  for step, d in enumerate([2.0, 1.0, 1.5, 0.2], 1):
    fell = (before - d) / before if before else 0.0
    gain = momentum * gain + (1 - momentum) * fell
    share = min(share - rate / (1 + np.exp(-gain)) * share, knob(step / 1000))
    before = d
    carried = targets._adapt(
      knob, carried, {"divergence": jnp.float32(d)}, jnp.float32(step / 1000)
    )
    np.testing.assert_allclose(carried["student_mix"], share, rtol=1e-6)
  near, figures = {"student_mix": jnp.float32(0.5001)}, {"divergence": jnp.float32(1)}
  last = targets._adapt(Linear(0.6, 0.5), carried | near, figures, jnp.float32(0))
  assert last["student_mix"] == 0.5  # and not beyond the end
  method = methods.build(
    "okd", {"student_mix": 0.5, "end": {"student_mix": 0.0}, "student_mix_adapts": True}
  )
  assert method.carried["student_mix"] == 0.5 and "student_mix" not in method.knobs


@pytest.mark.parametrize(
  "name, knobs, words",
  [
    ("okd", {"target_kind": "geometric"}, "needs method.target_mix below 1"),
    ("okd", {"target_mix": 1.5}, "target_mix=1.5 must lie between"),
    ("kd", {"student_mix": -0.1}, "student_mix=-0.1 must lie between"),
    ("kd", {"student_mix_adapts": True}, "must move, to 0 as a rule"),
    (
      "kd",
      {"student_mix_adapts": True, "student_mix": 0.1, "end": {"student_mix": 0.5}},
      "must fall",
    ),
    ("kd", {"target_mix": 0.5}, "kd here does not read it"),
    ("okd", {"drift_target": -1}, "drift_target=-1 must be at least 0"),
    (
      "okd",
      {"drift_target": 0.1, "anchor_weight": 1.0, "end": {"anchor_weight": 0.0}},
      "leave out method.end.anchor_weight",
    ),
  ],
)
def test_knobs_that_cannot_be(name, knobs, words):
  with pytest.raises(UserError, match=words):
    methods.build(name, knobs)


def test_a_stored_teacher_cannot_be_mixed_or_weighed():
  assert methods.build("kd", {}).takes_stored
  for knobs in ({"student_mix": 0.5}, {"token_weight": "entropy"}):
    assert not methods.build("kd", knobs).takes_stored


# A held anchor


def test_an_anchor_follows_the_drift():
  hold, at = online_module._hold, {"anchor_weight": jnp.float32(0.5)}
  above, below = ({"drift": jnp.float32(x)} for x in (0.3, 0.05))
  assert hold(0.1, at, above)["anchor_weight"] == pytest.approx(0.5 * np.exp(0.05))
  assert hold(0.1, at, below)["anchor_weight"] == pytest.approx(0.5 * np.exp(-0.025))
  assert hold(0.1, at, {})["anchor_weight"] == 0.5  # nobody learned
  two = {"drift_a": jnp.float32(0.05), "drift_b": jnp.float32(0.15)}
  assert hold(0.1, at, two)["anchor_weight"] == pytest.approx(0.5)


@pytest.mark.parametrize(
  "name, module", [("okd", ""), pytest.param("kd", "lora", marks=pytest.mark.slow)]
)
def test_a_step_moves_the_anchor(name, module):
  """At first nothing has drifted: the anchor falls; micro-batches change nothing."""
  found = []
  for microbatches in (1, 2):
    setup = Setup(name, module=module, drift_target=0.1, microbatches=microbatches)
    state, metrics = setup.step(setup.state, setup.frozen, make_batch())
    np.testing.assert_allclose(metrics["method.anchor_weight"], 0.3)
    assert metrics["drift"] < 1e-6
    found.append(float(state.carried["anchor_weight"]))
  assert found[0] == pytest.approx(0.3 * np.exp(-0.05), rel=1e-5)
  assert found[1] == pytest.approx(found[0], rel=1e-6)


def test_a_step_that_is_not_finite_carries_nothing():
  setup = Setup("okd", drift_target=0.1)
  broken = jax.tree.map(lambda x: x * jnp.nan, setup.frozen)
  state, metrics = setup.step(setup.state, broken, make_batch())
  assert metrics["finite"] == 0
  assert state.carried["anchor_weight"] == jnp.float32(0.3)


@pytest.mark.slow
def test_a_target_of_drift_is_held():
  """After 300 steps the adapted teacher is about as far away as it was told to be."""
  setup = Setup("okd", drift_target=0.02, lr=3e-3, steps=300, teacher_kl_weight=0.6)
  state, drifts = setup.state, []
  for i in range(300):
    state, metrics = setup.step(state, setup.frozen, make_batch(i % 8))
    drifts.append(float(metrics["drift"]))
  assert 0.014 < np.mean(drifts[-60:]) < 0.028
