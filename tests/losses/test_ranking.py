"""RLKD's rank correlation (METHODS 5.1) against explicit sets of ids in float64."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from okd_jax.losses import rank_correlation


def logits(seed, shape=(3, 4, 17), scale=3.0, dtype=jnp.float32):
  return (scale * jax.random.normal(jax.random.key(seed), shape)).astype(dtype)


def exact(*arrays):
  return [np.asarray(jnp.asarray(x, jnp.float32), np.float64) for x in arrays]


@functools.cache
def _compiled(k):
  def total(a, b, temperature):
    values = rank_correlation(a, b, k=k, temperature=temperature)
    return values.sum(), values

  return jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))


def run(a, b, k=5, temperature=1.0):
  (_, values), grads = _compiled(k)(jnp.asarray(a), jnp.asarray(b), temperature)
  return values, grads


def slopes(a, b, k=5, temperature=1.0):
  """Finite differences with each position's union frozen: it is a constant."""
  a, b = exact(a, b)
  first, second = np.empty(a.shape), np.empty(b.shape)
  for at in np.ndindex(a.shape[:-1]):
    u = oracle.union(a[at], b[at], k)
    f = functools.partial(oracle.rank_correlation, temperature=temperature, ids=u)
    first[at] = oracle.gradient(lambda x, f=f, at=at: f(x, b[at]), a[at])
    second[at] = oracle.gradient(lambda x, f=f, at=at: f(a[at], x), b[at])
  return first, second


@pytest.mark.parametrize(
  "k, dtype", [(k, jnp.float32) for k in (1, 5, 17, 40)] + [(5, jnp.bfloat16)]
)
def test_equals_the_oracle(k, dtype):
  """Guards RLKD's batched `unique`, which leaves duplicates in a row; k >= V works."""
  a, b = logits(0, dtype=dtype), logits(1, dtype=dtype)
  if k == 1:  # One id on both sides has no rank at all.
    b = jnp.where(b.argmax(-1, keepdims=True) == a.argmax(-1, keepdims=True), -b, b)
  for temperature in (0.25, 1.0, 4.0):
    got, grads = run(a, b, k, temperature)
    chex.assert_shape(got, (3, 4))
    assert got.dtype == jnp.float32 and grads[1].dtype == dtype
    want = oracle.rank_correlation(*exact(a, b), k=k, temperature=temperature)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-6)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), scale=st.floats(0.3, 20), t=st.floats(0.3, 4))
def test_value_and_gradients_over_seeds(seed, scale, t):
  """In [0, 2], equal to the oracle; gradients are those of a constant union."""
  a, b = logits(seed, (2, 9), scale), logits(seed + 1000, (2, 9), scale)
  got, grads = run(a, b, 3, t)
  assert (got >= 0).all() and (got <= 2).all()
  want = oracle.rank_correlation(*exact(a, b), k=3, temperature=t)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
  for grad, slope in zip(grads, slopes(a, b, 3, t), strict=True):
    np.testing.assert_allclose(grad, slope, rtol=1e-3, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(
  seed=st.integers(0, 999),
  scale=st.floats(0.01, 50),
  t=st.floats(0.1, 8),
  dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
)
def test_zero_at_identity_and_within_its_range(seed, scale, t, dtype):
  """METHODS 5.1; guards A1: never below 0, where rho is rounded above 1."""
  a, b = (logits(seed + i, (2, 9), scale, dtype) for i in (0, 1))
  assume((np.ptp(exact(a)[0], axis=-1) > 1e-3).all())
  same, grads = run(a, a, 3, t)
  np.testing.assert_allclose(same, 0, atol=1e-5)
  chex.assert_tree_all_finite(grads)
  other, _ = run(a, b, 3, t)
  for value in (same, other):
    assert (value >= 0).all() and (value <= 2).all()


@pytest.mark.parametrize("k", [4, 9])
@pytest.mark.parametrize("temperature", [0.1, 1.0, 5.0])
def test_two_for_the_reversed_order(k, temperature):
  """Mirrored logits have mirrored soft ranks: rho is -1 at every temperature."""
  a = logits(0, (5, 8))
  got, _ = run(a, -a, k, temperature)  # 2 * 4 = 8: U is the whole vocabulary.
  np.testing.assert_allclose(got, 2, atol=1e-5)


@pytest.mark.parametrize("c, d", [(20.0, -20.0), (-35.0, 0.0), (100.0, 100.0)])
def test_shift_invariance(c, d):
  """Guards A5: ranks of the logits do not see a constant."""
  a, b = logits(0), logits(1)
  values, grads = run(a, b)
  shifted, moved = run(a + c, b + d)
  # A logit near 100 is itself rounded by 2^-18 = 4e-6.
  np.testing.assert_allclose(shifted, values, atol=1e-5)
  chex.assert_trees_all_close(moved, grads, rtol=1e-4, atol=1e-5)
  for grad in grads:
    np.testing.assert_allclose(grad.sum(-1), 0, atol=2e-6)


def test_temperature_is_a_scale_of_the_logits():
  """Guards A6: no T^2 here; the ranks at T are those of z / T."""
  a, b = logits(0), logits(1)
  for t in (0.5, 2.0, 4.0):
    np.testing.assert_allclose(
      run(a, b, temperature=t)[0], run(a / t, b / t)[0], atol=1e-6
    )


@pytest.mark.parametrize("k", [2, 12])
def test_tends_to_hard_spearman(k):
  """METHODS 5.1: exact as the temperature goes to 0."""
  keys = jax.random.split(jax.random.key(0), 20)
  order = jax.vmap(lambda key: jax.random.permutation(key, 12))(keys)
  a, b = (x.astype(jnp.float32) for x in (order[:10], order[10:]))
  want = oracle.spearman(np.asarray(a), np.asarray(b), k)
  assert np.ptp(want) > 0.1
  gaps = [
    float(jnp.abs(run(a, b, k, t)[0] - want).max()) for t in (2.0, 0.5, 0.2, 0.02)
  ]
  assert gaps[0] > gaps[1] > gaps[2] and gaps[3] < 1e-5


def test_hand_computed_hard_order():
  """Four ids, the first two exchanged: 1 - rho = 6 * 2 / (4 * 15) = .2."""
  a, b = jnp.array([3.0, 2.0, 1.0, 0.0]), jnp.array([2.0, 3.0, 1.0, 0.0])
  for k in (4, 10):
    np.testing.assert_allclose(run(a, b, k, 0.01)[0], 0.2, atol=1e-6)
  # k = 2: the union is those two ids alone, in reversed order.
  np.testing.assert_allclose(run(a, b, 2, 0.01)[0], 2, atol=1e-6)


def test_duplicates_change_nothing():
  """Guards RLKD: an id in both top k lists enters the ranks once."""
  a, b = logits(0, (6, 12)), logits(1, (6, 12))
  # The same four ids lead on both sides, in different orders, then three of four.
  for shared in (4, 3):
    lead = jnp.zeros((6, 12)).at[:, :shared].set(30.0)
    x, y = a + lead, b + lead
    for at in range(6):
      assert len(oracle.union(x[at], y[at], 4)) in ([4] if shared == 4 else [4, 5])
    got, grads = run(x, y, 4)
    want = oracle.rank_correlation(*exact(x, y), k=4)
    np.testing.assert_allclose(got, want, atol=2e-6)
    for grad, slope in zip(grads, slopes(x, y, 4), strict=True):
      np.testing.assert_allclose(grad, slope, rtol=1e-3, atol=1e-5)
  # With all ids in both lists, asking for more changes nothing either.
  np.testing.assert_allclose(run(a, b, 12)[0], run(a, b, 100)[0], atol=1e-6)


def test_gradient_only_through_the_ranks_of_the_union():
  """Guards F3: the index set is a constant, and nobody outside it is moved."""
  a, b = logits(0), logits(1)
  _, grads = run(a, b)
  for at in np.ndindex(a.shape[:-1]):
    u = oracle.union(a[at], b[at], 5)
    outside = np.setdiff1d(np.arange(17), u)
    for grad in grads:
      np.testing.assert_array_equal(grad[at][outside], 0)
      assert (grad[at][np.array(u)] != 0).any()


@pytest.mark.parametrize("k", [5, 17])
def test_gradients_equal_finite_differences(k):
  """Guards A7, also for bfloat16 inputs, whose gradient is rounded once."""
  for dtype, rtol in ((jnp.float32, 1e-4), (jnp.bfloat16, 2.0**-7)):
    a, b = logits(0, dtype=dtype), logits(1, dtype=dtype)
    for temperature in (1.0, 2.0):
      _, grads = run(a, b, k, temperature)
      for grad, slope in zip(grads, slopes(a, b, k, temperature), strict=True):
        np.testing.assert_allclose(
          grad.astype(jnp.float32), slope, rtol=rtol, atol=1e-5
        )


def test_jit_changes_nothing():
  """Guards D4."""
  a, b = logits(0), logits(1)
  values, grads = run(a, b)
  np.testing.assert_allclose(rank_correlation(a, b), values, atol=1e-6)
  eager = jax.grad(lambda x, y: rank_correlation(x, y).sum(), argnums=(0, 1))(a, b)
  chex.assert_trees_all_close(eager, grads, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_constant_logits(dtype):
  """Guards A8, A9: all ties have a norm of 0; RLKD drops the term when it is NaN."""
  level, b = jnp.full((3, 4, 17), 2.5, dtype), logits(1, dtype=dtype)
  # The last pair's union is a single id, which has no rank either.
  for x, y, k in ((level, b, 5), (b, level, 5), (level, level, 5), (b, b, 1)):
    value, grads = run(x, y, k)
    chex.assert_tree_all_finite((value, grads))
    assert (value >= 0).all() and (value <= 2).all()
  # Two ties among untied ids are no special case.
  tied = b.at[..., 3].set(b[..., 4])
  want = oracle.rank_correlation(*exact(tied, b), k=17)
  np.testing.assert_allclose(run(tied, b, 17)[0], want, atol=2e-6)


@pytest.mark.parametrize("scale", [60.0, 120.0, 1e4])
def test_extreme_logits(scale):
  """Guards A8: sigmoids that saturate, and squares of norms of their gradients."""
  a, b = logits(0, scale=scale), logits(1, scale=scale)
  value, grads = run(a, b)
  chex.assert_tree_all_finite((value, grads))
  want = oracle.rank_correlation(*exact(a, b))
  np.testing.assert_allclose(value, want, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("k", [5, 17])
def test_masked_vocabulary_is_as_if_absent(k):
  """Guards A8, C3: -inf on both sides changes neither value nor gradient."""
  a, b = logits(0), logits(1)
  wide = [
    jnp.pad(x, ((0, 0), (0, 0), (2, 4)), constant_values=-jnp.inf) for x in (a, b)
  ]
  values, grads = run(a, b, k)
  padded, padded_grads = run(*wide, k)
  np.testing.assert_allclose(padded, values, atol=2e-6)
  for narrow, grad in zip(grads, padded_grads, strict=True):
    np.testing.assert_allclose(grad[..., 2:-4], narrow, atol=2e-6)
    np.testing.assert_array_equal(grad[..., :2], 0)
    np.testing.assert_array_equal(grad[..., -4:], 0)


def test_masked_vocabulary_when_k_exceeds_the_tokens_left():
  """Guards A8, C3: k beyond the tokens that are left must not rank the masked ones."""
  a, b = logits(0, (3, 4, 6)), logits(1, (3, 4, 6))
  wide = [
    jnp.pad(x, ((0, 0), (0, 0), (2, 4)), constant_values=-jnp.inf) for x in (a, b)
  ]
  padded, padded_grads = run(*wide, 9)
  chex.assert_tree_all_finite((padded, padded_grads))
  np.testing.assert_allclose(padded, run(a, b, 9)[0], atol=2e-6)


@pytest.mark.parametrize("side", [0, 1])
def test_tokens_that_one_side_excludes(side):
  """Guards A8: -inf against the other side's best token ranks last, and is no NaN."""
  pair = [logits(0), logits(1)]
  best = pair[1 - side].max(-1, keepdims=True)
  pair[side] = jnp.where(pair[1 - side] == best, -jnp.inf, pair[side])
  value, grads = run(*pair)
  chex.assert_tree_all_finite((value, grads))
  assert (value >= 0).all() and (value <= 2).all()
  want = oracle.rank_correlation(*exact(*pair))
  np.testing.assert_allclose(value, want, rtol=1e-5, atol=2e-6)
  for grad, slope in zip(grads, slopes(*pair), strict=True):
    np.testing.assert_allclose(grad, slope, rtol=1e-3, atol=1e-5)
