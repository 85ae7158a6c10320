"""KL from a stored top k with a tail bucket, against explicit sets in float64."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from okd_jax.losses import (
  TopK,
  forward_kl,
  reverse_kl,
  top_k,
  topk_forward_kl,
  topk_reverse_kl,
)

ALL = {
  "forward": (topk_forward_kl, oracle.topk_forward_kl, forward_kl, oracle.forward_kl),
  "reverse": (topk_reverse_kl, oracle.topk_reverse_kl, reverse_kl, oracle.reverse_kl),
}
every = pytest.mark.parametrize("loss, truth, full, dense", ALL.values(), ids=ALL)


def logits(seed, shape=(3, 4, 17), scale=3.0, dtype=jnp.float32):
  return (scale * jax.random.normal(jax.random.key(seed), shape)).astype(dtype)


def exact(*arrays):
  return [np.asarray(jnp.asarray(x, jnp.float32), np.float64) for x in arrays]


@functools.cache
def _top(k):
  return jax.jit(functools.partial(top_k, k=k))


@functools.cache
def _compiled(loss):
  def total(student, top, temperature):
    values = loss(top, student, temperature)
    return values.sum(), values

  return jax.jit(jax.value_and_grad(total, has_aux=True))


def run(loss, teacher, student, k, temperature=1.0):
  """Values, the gradient in the student's logits, and the ids that were kept."""
  top = _top(k)(jnp.asarray(teacher), temperature=temperature)
  (_, values), grad = _compiled(loss)(jnp.asarray(student), top, temperature)
  return values, grad, np.asarray(top.ids)


def slope(truth, teacher, student, ids, temperature=1.0):
  a, b = exact(teacher, student)
  return oracle.gradient(lambda x: truth(a, x, ids, temperature), b)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("k", [1, 5, 17])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_top_k_holds_the_teacher(k, dtype, temperature):
  """The k likeliest ids, their log-probabilities at T, and the log of what is left."""
  a = logits(0, dtype=dtype)
  top = _top(k)(a, temperature=temperature)
  assert isinstance(top, TopK)
  chex.assert_shape(top, [(3, 4, k), (3, 4, k), (3, 4)])
  assert top.ids.dtype == jnp.int32
  assert top.log_probs.dtype == top.log_tail.dtype == jnp.float32
  log_p = oracle.log_softmax(exact(a)[0], temperature)
  kept = np.take_along_axis(log_p, np.asarray(top.ids), -1)
  np.testing.assert_allclose(top.log_probs, kept, rtol=1e-5, atol=1e-6)
  for at in np.ndindex(3, 4):
    assert len(set(np.asarray(top.ids)[at].tolist())) == k
    np.testing.assert_allclose(np.sort(kept[at]), np.sort(log_p[at])[17 - k :])
    tail = oracle.buckets(exact(a)[0][at], np.asarray(top.ids)[at], temperature)[-1]
    np.testing.assert_allclose(np.exp(top.log_tail[at]), np.exp(tail), rtol=1e-5)
  if k == 17:
    np.testing.assert_array_equal(np.exp(top.log_tail), 0)


def test_a_light_tail_keeps_its_digits():
  """Guards E3: 1 - sum(p) in float32 makes 1e-9 a 0 or 6e-8, and 0 has no gradient."""
  a = jnp.array([8.0, 7.0, 6.0, -14.0, -15.0, -16.0])
  top = top_k(a, 3)
  want = oracle.buckets(exact(a)[0], np.arange(3))[-1]
  np.testing.assert_allclose(top.log_tail, want, rtol=1e-6)
  # Both sides' tails weigh 1e-9 or less, and the larger of them matters to the loss.
  light = jnp.array([8.0, 7.0, 6.0, -10.0, -15.0, -12.0])
  for loss, truth, *_ in ALL.values():
    for x, y in ((a, light), (light, a), (a, a.at[3:].add(20.0))):
      got, grad, ids = run(loss, x, y, 3)
      want = truth(*exact(x, y), ids)
      # Terms of size 1 cancel down to the value: float32 leaves 1e-7.
      np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-7)
      np.testing.assert_allclose(grad, slope(truth, x, y, ids), rtol=1e-4, atol=2e-7)


@every
@pytest.mark.parametrize(
  "k, dtype", [(k, jnp.float32) for k in (1, 5, 16, 17)] + [(5, jnp.bfloat16)]
)
def test_equals_the_oracle(loss, truth, full, dense, k, dtype):
  """Guards A6, A7, E3: values and gradients, tail logits included, at T = 1 and 2."""
  a, b = logits(0, dtype=dtype), logits(1, dtype=dtype)
  for temperature in (1.0, 2.0):
    got, grad, ids = run(loss, a, b, k, temperature)
    chex.assert_shape(got, (3, 4))
    assert got.dtype == jnp.float32 and grad.dtype == dtype
    want = truth(*exact(a, b), ids, temperature)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    rtol = 1e-4 if dtype == jnp.float32 else 2.0**-8  # One rounding to 8 bits.
    np.testing.assert_allclose(
      grad.astype(jnp.float32),
      slope(truth, a, b, ids, temperature),
      rtol=rtol,
      atol=1e-5,
    )


@every
def test_with_every_id_it_is_the_full_kl(loss, truth, full, dense):
  """Guards E2: dense at k = V, in value and gradient, also at T = 2."""
  a, b = logits(0), logits(1)
  for temperature in (1.0, 2.0):
    got, grad, _ = run(loss, a, b, 17, temperature)
    np.testing.assert_allclose(got, full(a, b, temperature), rtol=1e-5, atol=1e-6)
    want = jax.grad(lambda x, t=temperature: full(a, x, t).sum())(b)
    np.testing.assert_allclose(grad, want, rtol=1e-4, atol=1e-5)


@every
@settings(max_examples=30, deadline=None)
@given(
  seed=st.integers(0, 999),
  scale=st.floats(0.05, 20),
  k=st.sampled_from([1, 5]),
  t=st.floats(0.5, 4),
)
def test_between_zero_and_the_full_kl(loss, truth, full, dense, seed, scale, k, t):
  """Guards E3: a surrogate that goes negative is clamped and learns nothing (verl)."""
  a, b = logits(seed, (2, 9), scale), logits(seed + 1000, (2, 9), scale)
  got, grad, ids = run(loss, a, b, k, t)
  whole = dense(*exact(a, b), t)
  assert (got >= 0).all()
  # Rounding of the scaled logits, up to 4 scale / T, times T^2.
  slack = 1e-6 * t**2 * max(1, scale)
  assert (got <= whole * (1 + 1e-5) + slack).all()
  np.testing.assert_allclose(got, truth(*exact(a, b), ids, t), rtol=1e-5, atol=slack)
  np.testing.assert_allclose(
    grad, slope(truth, a, b, ids, t), rtol=1e-4, atol=5e-6 * max(t, 1) * max(1, scale)
  )


@every
@settings(max_examples=20, deadline=None)
@given(
  seed=st.integers(0, 999),
  scale=st.floats(0.05, 20),
  dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
)
def test_zero_at_identity(loss, truth, full, dense, seed, scale, dtype):
  """Guards A1: and with no gradient there."""
  a = logits(seed, (3, 4, 17), scale, dtype)
  got, grad, _ = run(loss, a, a, 5)
  assert (got >= 0).all() and (got < 1e-5).all()
  np.testing.assert_allclose(grad.astype(jnp.float32), 0, atol=1e-5)


@every
def test_more_ids_come_closer_to_the_full_kl(loss, truth, full, dense):
  """Guards E2, C3: splitting a bucket never lowers the KL; no mean over K (axolotl)."""
  a, b = logits(0), logits(1)
  values = np.stack([run(loss, a, b, k)[0] for k in (1, 5, 12, 16, 17)])
  assert (np.diff(values, axis=0) >= -1e-5).all()
  assert values[-1].mean() > values[0].mean() + 0.1


@every
@settings(max_examples=30, deadline=None)
@given(
  seed=st.integers(0, 999),
  k=st.sampled_from([1, 5]),
  shifts=st.tuples(st.floats(0.05, 3), st.floats(0.05, 3)),
)
def test_rises_when_mass_moves_to_the_tail(loss, truth, full, dense, seed, k, shifts):
  """Guards E2: renormalised over the top k, the loss stays as it was (tunix, NeMo)."""
  a = logits(seed, (2, 9), 1.0)
  ids = np.asarray(top_k(a, k).ids)
  tail = np.ones((2, 9))
  np.put_along_axis(tail, ids, 0.0, -1)
  b = exact(a)[0]
  if loss is topk_forward_kl:
    # Wrong inside the head as well, and then as heavy a tail as the teacher's.
    b = b + (1 - tail) * exact(logits(seed + 1000, (2, 9), 1.0))[0]
    odds = [
      np.log((np.exp(x) * tail).sum(-1) / (np.exp(x) * (1 - tail)).sum(-1))
      for x in (exact(a)[0], b)
    ]
    b = b + tail * (odds[0] - odds[1])[:, None]
  values = []
  for shift in (0.0, shifts[0], sum(shifts)):
    values.append(run(loss, a, jnp.asarray(b + shift * tail, jnp.float32), k)[0])
  assert (values[1] > values[0]).all() and (values[2] > values[1]).all()


@every
def test_mass_outside_the_top_k_is_seen(loss, truth, full, dense):
  """Guards E2: tunix, maxtext, swift, NeMo see 7e-8 with 2e-4 of the mass inside."""
  a = logits(0, (4, 64), 0.5).at[:, :8].add(9.0)
  inside = np.asarray(jax.nn.softmax(a)[:, :8].sum(-1))
  assert (inside > 0.99).all()
  # The same proportions inside the top 8, and 2e-4 of the student's mass there.
  c = np.log(inside / (1 - inside)) - np.log(2e-4 / (1 - 2e-4))
  b = a.at[:, 8:].add(jnp.asarray(c, jnp.float32)[:, None])
  np.testing.assert_allclose(jax.nn.softmax(b)[:, :8].sum(-1), 2e-4, rtol=1e-3)
  got, grad, ids = run(loss, a, b, 8)
  assert (np.sort(ids, -1) == np.arange(8)).all()
  np.testing.assert_allclose(got, truth(*exact(a, b), ids), rtol=1e-5)
  assert (got > 3).all()
  # A step down the gradient takes mass out of the tail.
  assert (grad[:, 8:] > 0).all() and (grad[:, :8].sum(-1) < 0).all()
  np.testing.assert_allclose(grad.sum(-1), 0, atol=1e-5)


def test_closed_form_gradient():
  """Guards A7: q - p on the kept ids, and q - p_tail q / q_tail on all others."""
  a, b = logits(0), logits(1)
  p, q = jax.nn.softmax(a), jax.nn.softmax(b)
  _, grad, ids = run(topk_forward_kl, a, b, 5)
  kept = np.zeros((3, 4, 17), bool)
  np.put_along_axis(kept, ids, True, -1)
  tails = [jnp.where(kept, 0, x).sum(-1, keepdims=True) for x in (p, q)]
  want = q - jnp.where(kept, p, q * tails[0] / tails[1])
  np.testing.assert_allclose(grad, want, atol=1e-6)


@every
@pytest.mark.parametrize("c, d", [(20.0, -20.0), (-35.0, 0.0), (100.0, 0.0)])
def test_shift_invariance(loss, truth, full, dense, c, d):
  """Guards A5, E1: logits centred at -35, as GPT-2's are."""
  a, b = logits(0), logits(1)
  values, grad, _ = run(loss, a, b, 5)
  shifted, moved, _ = run(loss, a + c, b + d, 5)
  # A logit near 100 is itself rounded by 2^-18 = 4e-6.
  np.testing.assert_allclose(shifted, values, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(moved, grad, rtol=1e-4, atol=1e-5)


@every
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_padded_vocabulary_is_as_if_absent(loss, truth, full, dense, dtype):
  """Guards C3, E1: a zero-padded student (Liger); -inf ids weigh nothing anywhere."""
  a, b = logits(0, dtype=dtype), logits(1, dtype=dtype)
  wide = [
    jnp.pad(x, ((0, 0), (0, 0), (2, 4)), constant_values=-jnp.inf) for x in (a, b)
  ]
  for k in (5, 17) if dtype == jnp.float32 else (5,):
    values, grad, _ = run(loss, a, b, k)
    padded, padded_grad, _ = run(loss, *wide, k)
    np.testing.assert_allclose(padded, values, rtol=1e-5, atol=1e-6)
    rtol = 1e-5 if dtype == jnp.float32 else 2.0**-7
    kept = padded_grad.astype(jnp.float32)
    np.testing.assert_allclose(
      kept[..., 2:-4], grad.astype(jnp.float32), rtol=rtol, atol=1e-5
    )
    np.testing.assert_array_equal(kept[..., :2], 0)
    np.testing.assert_array_equal(kept[..., -4:], 0)


@every
def test_more_ids_than_the_teacher_has(loss, truth, full, dense):
  """Guards A8: kept ids of probability 0 and a tail of mass 0 are no NaN."""
  a = logits(0).at[..., 3:].set(-jnp.inf)
  b = logits(1)
  excluded = b.at[..., 3:].set(-jnp.inf)
  for k in (1, 5, 17):
    for student in (b, excluded):
      got, grad, ids = run(loss, a, student, k)
      chex.assert_tree_all_finite((got, grad))
      want = truth(*exact(a, student), ids)
      if np.isinf(want).all():  # The student's mass where the teacher has none.
        assert loss is topk_reverse_kl and student is b
        assert (got > 1e20).all()
        continue
      np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
      np.testing.assert_allclose(
        grad, slope(truth, a, student, ids), rtol=1e-4, atol=1e-5
      )


@every
@pytest.mark.parametrize("scale", [120.0, 1e4])
@pytest.mark.parametrize("k", [1, 5])
def test_extreme_logits(loss, truth, full, dense, k, scale):
  """Guards A8: both tails underflow, and their ratio still matters."""
  a, b = logits(0, scale=scale), logits(1, scale=scale)
  got, grad, ids = run(loss, a, b, k)
  chex.assert_tree_all_finite((got, grad))
  want = truth(*exact(a, b), ids)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6 * scale)


@every
def test_small_divergence_of_bfloat16_logits(loss, truth, full, dense):
  """Guards A10: 2% of a KL near .005, or of what is left of it in the buckets."""
  a = logits(0, (16, 512), 2.0, jnp.bfloat16)
  b = (a + logits(1, (16, 512), 0.1)).astype(jnp.bfloat16)
  got, _, ids = run(loss, a, b, 64)
  want = truth(*exact(a, b), ids)
  assert 1e-3 < want.mean() < 1e-2
  np.testing.assert_allclose(got, want, rtol=0.02)


@every
def test_jit_changes_nothing(loss, truth, full, dense):
  """Guards D4, F3: recomputed ids and stored ones give the same gradient."""
  a, b = logits(0), logits(1)
  values, grad, _ = run(loss, a, b, 5, 2.0)
  stored = top_k(a, 5, 2.0)
  np.testing.assert_allclose(loss(stored, b, 2.0), values, rtol=1e-6, atol=1e-6)
  eager = jax.grad(lambda x: loss(stored, x, temperature=2.0).sum())(b)
  np.testing.assert_allclose(eager, grad, rtol=1e-5, atol=1e-6)
