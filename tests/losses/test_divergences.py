"""Each divergence against hand-computed values, a float64 oracle and its gradient."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from okd_jax.losses import (
  adaptive_kl,
  alpha_beta,
  cross_entropy,
  forward_kl,
  jensen_shannon,
  reverse_kl,
  skew_forward_kl,
  skew_reverse_kl,
  top_k_overlap,
  total_variation,
  weighted_kl,
)

P = np.array([0.4, 0.3, 0.2, 0.1])
Q = np.array([0.25, 0.25, 0.3, 0.2])

# Hand-computed, natural logarithm: METHODS 1.2; for p^a q^b with a = b = 1 the value is
# half the squared distance, with a = b = 1/2 it is 4 (1 - sum sqrt(pq)).
GOLDEN = [
  (forward_kl, {}, 0.0922902),
  (reverse_kl, {}, 0.0971877),
  (jensen_shannon, {"beta": 0.1}, 0.0083153),
  (jensen_shannon, {"beta": 0.5}, 0.0233991),
  (jensen_shannon, {"beta": 0.9}, 0.0086620),
  (jensen_shannon, {"beta": 0.5, "normalize": True}, 0.0935964),
  (skew_forward_kl, {"alpha": 0.1}, 0.0749515),
  (skew_reverse_kl, {"alpha": 0.1}, 0.0772457),
  (total_variation, {}, 0.2),
  (adaptive_kl, {"head_mass": 0.5}, 0.0953511),
  (weighted_kl, {"weight": 0.5}, 0.0947389),
  (weighted_kl, {"weight": 0.25}, 0.0959633),
  (alpha_beta, {"alpha": 1.0, "beta": 0.0}, 0.0922902),
  (alpha_beta, {"alpha": 0.0, "beta": 1.0}, 0.0971877),
  (alpha_beta, {"alpha": 1.0, "beta": 1.0}, 0.0225),
  (alpha_beta, {"alpha": 0.5, "beta": 0.5}, 0.0941625),
  (forward_kl, {"temperature": 2.0}, 0.1007379),
  (reverse_kl, {"temperature": 2.0}, 0.1021868),
]
ALL = {
  "forward": (forward_kl, oracle.forward_kl, {}),
  "reverse": (reverse_kl, oracle.reverse_kl, {}),
  "jsd.1": (jensen_shannon, oracle.jensen_shannon, {"beta": 0.1}),
  "jsd.5": (jensen_shannon, oracle.jensen_shannon, {"beta": 0.5}),
  "jsd.9": (jensen_shannon, oracle.jensen_shannon, {"beta": 0.9}),
  "njsd.1": (
    jensen_shannon,
    oracle.jensen_shannon,
    {"beta": 0.1, "normalize": True},
  ),
  "njsd.7": (
    jensen_shannon,
    oracle.jensen_shannon,
    {"beta": 0.7, "normalize": True},
  ),
  "skewf.1": (skew_forward_kl, oracle.skew_forward_kl, {"alpha": 0.1}),
  "skewf.6": (skew_forward_kl, oracle.skew_forward_kl, {"alpha": 0.6}),
  "skewr.1": (skew_reverse_kl, oracle.skew_reverse_kl, {"alpha": 0.1}),
  "skewr.6": (skew_reverse_kl, oracle.skew_reverse_kl, {"alpha": 0.6}),
  "tvd": (total_variation, oracle.total_variation, {}),
  "akl.5": (adaptive_kl, oracle.adaptive_kl, {"head_mass": 0.5}),
  "akl.9": (adaptive_kl, oracle.adaptive_kl, {"head_mass": 0.9}),
  "weighted.3": (weighted_kl, oracle.weighted_kl, {"weight": 0.3}),
  "ab.2,.7": (alpha_beta, oracle.alpha_beta, {"alpha": 0.2, "beta": 0.7}),
  "ab.5,.5": (alpha_beta, oracle.alpha_beta, {"alpha": 0.5, "beta": 0.5}),
  "ab1,1": (alpha_beta, oracle.alpha_beta, {"alpha": 1.0, "beta": 1.0}),
  "ab.5,0": (alpha_beta, oracle.alpha_beta, {"alpha": 0.5, "beta": 0.0}),
  "ab0,.6": (alpha_beta, oracle.alpha_beta, {"alpha": 0.0, "beta": 0.6}),
}
every = pytest.mark.parametrize("loss, truth, knobs", ALL.values(), ids=ALL)


def logits(seed, shape=(3, 5, 17), scale=3.0, dtype=jnp.float32):
  return (scale * jax.random.normal(jax.random.key(seed), shape)).astype(dtype)


def exact(*arrays):
  """What a low-precision array holds: rounding belongs to the input, not to us."""
  return [np.asarray(x.astype(jnp.float32), np.float64) for x in arrays]


@functools.cache
def _compiled(loss, knobs):
  def total(a, b, temperature):
    values = loss(a, b, temperature=temperature, **dict(knobs))
    return values.sum(), values

  return jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))


def run(loss, knobs, a, b, temperature=1.0):
  """Values and both gradients, compiled once for each loss and shape."""
  a, b = (jnp.asarray(x, getattr(x, "dtype", None)) for x in (a, b))
  (_, values), grads = _compiled(loss, tuple(knobs.items()))(a, b, temperature)
  return values, grads


def frozen(truth, knobs, a, b, temperature=1.0):
  """The oracle whose adaptive weights are constants, as the gradient must see them."""
  if truth is oracle.adaptive_kl:
    weight = oracle.adaptive_weight(a, b, temperature, **knobs)
    return functools.partial(oracle.weighted_kl, temperature=temperature, weight=weight)
  return functools.partial(truth, temperature=temperature, **knobs)


def slopes(truth, knobs, a, b, temperature=1.0, step=1e-5):
  """Finite differences of the float64 oracle in both sides' logits."""
  f = frozen(truth, knobs, a, b, temperature)
  first = oracle.gradient(lambda x: f(x, b), a, step)
  return first, oracle.gradient(lambda x: f(a, x), b, step)


# Values.


@pytest.mark.parametrize("loss, knobs, value", GOLDEN)
def test_golden_values(loss, knobs, value):
  """Guards A2, A4: directions swapped (EasyDeL GKD), the wrong side weighted (TRL)."""
  got = loss(jnp.log(P), jnp.log(Q), **knobs)
  np.testing.assert_allclose(got, value, atol=1e-6)


@every
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_equals_the_oracle(loss, truth, knobs, dtype):
  """Guards A4, A6: mixed log-probabilities (TRL), temperature ignored (verl)."""
  a, b = logits(0, dtype=dtype), logits(1, dtype=dtype)
  for temperature in (0.5, 1.0, 4.0):
    got, grads = run(loss, knobs, a, b, temperature)
    chex.assert_shape(got, (3, 5))
    assert got.dtype == jnp.float32
    assert grads[0].dtype == grads[1].dtype == dtype
    want = truth(*exact(a, b), temperature=temperature, **knobs)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@every
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), scale=st.floats(0.1, 10), t=st.floats(0.5, 8))
def test_value_and_gradients_equal_the_oracle(loss, truth, knobs, seed, scale, t):
  """Guards A6, A7: no T^2 (KDFlow), a gradient lost through p or the outer q."""
  a, b = logits(seed, scale=scale), logits(seed + 1000, scale=scale)
  x, y = exact(a, b)
  # Total variation has a kink where p_v = q_v, the adaptive head where the mass is mu.
  p, q = oracle.softmax(x, t), oracle.softmax(y, t)
  assume(np.abs(np.log(p) - np.log(q)).min() > 1e-4)
  mass = np.cumsum(-np.sort(-p, -1), -1)
  assume(np.abs(mass - knobs.get("head_mass", 0.5)).min() > 1e-5)
  got, grads = run(loss, knobs, a, b, t)
  want = truth(x, y, temperature=t, **knobs)
  # The scaled logits are rounded to float32: up to 4 / .5 * scale times 2^-24.
  slack = 1e-6 * max(1, scale)
  # Alpha-beta divides sums of order 1 by alpha * beta, and their rounding with them.
  product = knobs["alpha"] * knobs["beta"] if loss is alpha_beta else 1
  atol = t**2 * slack / min(1, abs(product) or 1)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=atol)
  # dD/dz holds T^2 / T.
  for grad, slope in zip(grads, slopes(truth, knobs, x, y, t), strict=True):
    np.testing.assert_allclose(grad, slope, rtol=1e-4, atol=max(t, 1) * 5 * slack)


@every
def test_small_divergence_of_bfloat16_logits(loss, truth, knobs):
  """Guards A10: EasyDeL's bf16 softmax reports 0 where .0048 is right."""
  teacher = logits(0, (64, 512), 2.0, jnp.bfloat16)
  student = (teacher + logits(1, (64, 512), 0.1)).astype(jnp.bfloat16)
  x, y = exact(teacher, student)
  assert 4e-3 < oracle.forward_kl(x, y).mean() < 6e-3
  got = loss(teacher, student, **knobs)
  # 2% is the bar of A10, and here for every position, not for their mean alone.
  np.testing.assert_allclose(got, truth(x, y, **knobs), rtol=0.02)


@every
def test_bfloat16_gradients_are_rounded_once(loss, truth, knobs):
  """Guards A10, D2: a gradient that was summed in bf16."""
  a, b = (logits(seed, dtype=jnp.bfloat16) for seed in (0, 1))
  _, grads = run(loss, knobs, a, b)
  _, wanted = run(loss, knobs, a.astype(jnp.float32), b.astype(jnp.float32))
  for grad, want in zip(grads, wanted, strict=True):
    # bfloat16 has 8 significant bits: one rounding is at most 2^-9 of the value.
    np.testing.assert_allclose(grad.astype(jnp.float32), want, rtol=2.0**-8, atol=1e-6)


@every
@settings(max_examples=15, deadline=None)
@given(
  seed=st.integers(0, 999),
  scale=st.floats(0.01, 50),
  t=st.floats(0.25, 8),
  dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
)
def test_zero_at_identity_and_never_negative(loss, truth, knobs, seed, scale, t, dtype):
  """Guards A1, A9: cross-entropies called KL (torchtune, DLM), 0/0 in AKL (KDFlow)."""
  a, b = (logits(seed + i, scale=scale, dtype=dtype) for i in (0, 1))
  same, grads = run(loss, knobs, a, a, t)
  assert (same >= 0).all() and (same < 1e-4).all()
  for grad in grads:
    np.testing.assert_allclose(grad.astype(jnp.float32), 0, atol=1e-4)
  assert (run(loss, knobs, a, b, t)[0] >= 0).all()
  # And where p and q differ by rounding only.
  near = (a.astype(jnp.float32) * (1 + 2e-7)).astype(dtype)
  assert (run(loss, knobs, a, near, t)[0] >= 0).all()


@every
def test_jit_changes_nothing(loss, truth, knobs):
  """Guards D4; a traced temperature is the same as a number."""
  a, b = logits(0), logits(1)
  got, grads = run(loss, knobs, a, b, 2.0)
  plain = functools.partial(loss, temperature=2.0, **knobs)
  np.testing.assert_allclose(got, plain(a, b), rtol=1e-6, atol=1e-6)
  eager = jax.grad(lambda x, y: plain(x, y).sum(), argnums=(0, 1))(a, b)
  chex.assert_trees_all_close(grads, eager, rtol=1e-5, atol=1e-6)


# Shifts and temperature.


@every
@pytest.mark.parametrize("c, d", [(20.0, -20.0), (-20.0, 20.0), (100.0, 0.0)])
def test_shift_invariance(loss, truth, knobs, c, d):
  """Guards A5: raw logits copied between vocabularies (swift)."""
  a, b = logits(0), logits(1)
  values, grads = run(loss, knobs, a, b)
  shifted, moved = run(loss, knobs, a + c, b + d)
  # A logit near 100 is itself rounded by 2^-18 = 4e-6.
  np.testing.assert_allclose(shifted, values, rtol=1e-4, atol=1e-5)
  chex.assert_trees_all_close(moved, grads, rtol=1e-4, atol=1e-5)
  for grad in grads:
    # The same invariance, differentiated; float32 sums of terms of that size.
    assert (abs(grad.sum(-1)) <= 2e-6 * (1 + abs(grad).sum(-1))).all()


@every
def test_temperature_divides_the_logits_and_multiplies_the_value(loss, truth, knobs):
  """Guards A6: T^2 is there, and on both sides' logits."""
  a, b = logits(0), logits(1)
  for t in (0.5, 2.0, 8.0):  # Powers of 2: a / t is exact.
    got, grads = run(loss, knobs, a, b, t)
    values, slope = run(loss, knobs, a / t, b / t)
    np.testing.assert_allclose(got, t**2 * values, rtol=1e-6, atol=1e-7)
    want = jax.tree.map(lambda x, t=t: t * x, slope)
    chex.assert_trees_all_close(grads, want, rtol=1e-5, atol=1e-6)


@every
def test_temperature_keeps_gradients_level(loss, truth, knobs):
  """Guards A6: no T^2 (KDFlow: .486, .109, .027 at T = 1, 2, 4)."""
  if loss is total_variation:
    pytest.skip("not quadratic near p = q: its gradient grows like T")
  a = logits(0, scale=0.5)
  b = a + logits(1, scale=0.1)
  grads = [run(loss, knobs, a, b, t)[1] for t in (1.0, 2.0, 4.0, 8.0)]
  for side in (0, 1):
    sizes = jnp.array([jnp.linalg.norm(g[side]) for g in grads])
    assert sizes.max() / sizes.min() < 1.5


# Extremes.


@every
@pytest.mark.parametrize("scale", [60.0, 120.0, 1e4])
def test_extreme_logits(loss, truth, knobs, scale):
  """Guards A8: NaN loss and gradient at scale 120, skew-RKL already at 60 (DLM)."""
  a, b = logits(0, scale=scale), logits(1, scale=scale)
  values, grads = run(loss, knobs, a, b)
  chex.assert_tree_all_finite((values, grads))
  # Finite is not enough; float32 holds log-probabilities of size scale to 2^-23 scale.
  want = truth(*exact(a, b), **knobs)
  np.testing.assert_allclose(values, want, rtol=1e-5, atol=1e-6 * scale)


@every
def test_both_sides_underflow(loss, truth, knobs):
  """Guards A8: disjoint one-hot sides, 0 (and log 0) everywhere else."""
  a = jnp.full((3, 5, 17), -1e4).at[..., 0].set(1e4)
  b = jnp.full((3, 5, 17), -1e4).at[..., 1].set(1e4)
  for x, y in ((a, b), (b, a), (a, a)):
    value, grads = run(loss, knobs, x, y)
    chex.assert_tree_all_finite((value, grads))
    want = truth(*exact(x, y), **knobs)
    np.testing.assert_allclose(value, want, rtol=1e-5, atol=1e-6)


@every
def test_masked_vocabulary_is_as_if_absent(loss, truth, knobs):
  """Guards A8, C3: a mean over V (KDFlow); -inf on both sides is no token at all."""
  a, b = logits(0), logits(1)
  wide = [
    jnp.pad(x, ((0, 0), (0, 0), (2, 4)), constant_values=-jnp.inf) for x in (a, b)
  ]
  values, grads = run(loss, knobs, a, b)
  padded, padded_grads = run(loss, knobs, *wide)
  np.testing.assert_allclose(padded, values, rtol=1e-5, atol=1e-6)
  for narrow, grad in zip(grads, padded_grads, strict=True):
    np.testing.assert_allclose(grad[..., 2:-4], narrow, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(grad[..., :2], 0)
    np.testing.assert_array_equal(grad[..., -4:], 0)


@every
@pytest.mark.parametrize("side", ["teacher", "student", "disjoint"])
def test_tokens_that_one_side_excludes(loss, truth, knobs, side):
  """Guards A8: NaN where one side gives 0 to tokens with mass on the other."""
  a, b = logits(0), logits(1)
  if side != "student":
    a = a.at[..., :3].set(-jnp.inf)
  if side == "student":
    b = b.at[..., 2:5].set(-jnp.inf)
  if side == "disjoint":
    b = b.at[..., 3:].set(-jnp.inf)
  values, grads = run(loss, knobs, a, b)
  chex.assert_tree_all_finite((values, grads))
  x, y = exact(a, b)
  want = truth(x, y, **knobs)
  if np.isinf(want).all():
    assert (values > 1e20).all()
    return
  assert np.isfinite(want).all()
  np.testing.assert_allclose(values, want, rtol=1e-5, atol=1e-6)
  for grad, slope in zip(grads, slopes(truth, knobs, x, y), strict=True):
    np.testing.assert_allclose(grad, slope, rtol=1e-4, atol=1e-5)


# Gradients.


def closed_form_teacher(a, b, direction):
  p = jax.nn.softmax(a)
  log_ratio = jax.nn.log_softmax(a) - jax.nn.log_softmax(b)
  if direction == "forward":
    return p * (log_ratio - (p * log_ratio).sum(-1, keepdims=True))
  return p - jax.nn.softmax(b)


def test_closed_form_gradients():
  """Guards A7: a cross-entropy that loses the gradient through p when p is trained."""
  a, b = logits(0), logits(1)
  p, q = jax.nn.softmax(a), jax.nn.softmax(b)

  def centred(g):
    return q * (g - (q * g).sum(-1, keepdims=True))

  def check(want, loss, side=1, **knobs):
    got = run(loss, knobs, a, b)[1][side]
    np.testing.assert_allclose(got, want, atol=1e-5, err_msg=f"{loss} {knobs}")

  forward, reverse = q - p, centred(jnp.log(q / p))
  check(forward, forward_kl)
  check(reverse, reverse_kl)
  check(closed_form_teacher(a, b, "forward"), forward_kl, 0)
  check(closed_form_teacher(a, b, "reverse"), reverse_kl, 0)
  for beta in (0.1, 0.3, 0.9):
    m = beta * p + (1 - beta) * q
    want = (1 - beta) * centred(jnp.log(q / m))
    check(want, jensen_shannon, beta=beta)
    check(want / (beta * (1 - beta)), jensen_shannon, beta=beta, normalize=True)
  for alpha in (0.1, 0.6):
    m = alpha * p + (1 - alpha) * q
    check(centred(-(1 - alpha) * p / m), skew_forward_kl, alpha=alpha)
    m = (1 - alpha) * p + alpha * q
    check(centred(jnp.log(q / m) - alpha * q / m), skew_reverse_kl, alpha=alpha)
  check(centred(0.5 * jnp.sign(q - p)), total_variation)
  weight = oracle.adaptive_weight(*exact(a, b))[..., None]
  check(weight * forward + (1 - weight) * reverse, adaptive_kl)
  check(0.3 * forward + 0.7 * reverse, weighted_kl, weight=0.3)
  # ABKD's gradient in q is q^(b-1) (q^a - p^a) / a.
  power = q**-0.3 * (q**0.2 - p**0.2) / 0.2
  check(centred(power), alpha_beta, alpha=0.2, beta=0.7)


@every
def test_gradients_equal_finite_differences(loss, truth, knobs):
  """Guards A7: against nothing but the oracle's formula, also at T = 2."""
  a, b = logits(0), logits(1)
  for t in (1.0, 2.0):
    _, grads = run(loss, knobs, a, b, t)
    for grad, slope in zip(grads, slopes(truth, knobs, *exact(a, b), t), strict=True):
      np.testing.assert_allclose(grad, slope, rtol=1e-4, atol=1e-5)


# What each divergence promises of itself.


def test_jensen_shannon_ends_and_range():
  """Guards A2, A3: the ends are the named divergences; beta outside raises."""
  a, b = logits(0), logits(1)
  for norm in (False, True):
    jsd = functools.partial(jensen_shannon, normalize=norm)
    np.testing.assert_array_equal(jsd(a, b, beta=0.0), forward_kl(a, b))
    np.testing.assert_array_equal(jsd(a, b, beta=1.0), reverse_kl(a, b))
    np.testing.assert_array_equal(jsd(a, b, 2.0, beta=0), forward_kl(a, b, 2.0))
    np.testing.assert_array_equal(jsd(a, b, 2.0, beta=1), reverse_kl(a, b, 2.0))
    for beta in (-0.1, 1.1):
      with pytest.raises(ValueError, match="between 0 and 1|\\[0, 1\\]"):
        jsd(a, b, beta=beta)
  np.testing.assert_allclose(jensen_shannon(a, b), jensen_shannon(b, a), rtol=1e-5)
  for beta in (0.1, 0.3):
    np.testing.assert_allclose(
      jensen_shannon(a, b, beta=beta),
      jensen_shannon(b, a, beta=1 - beta),
      rtol=1e-5,
    )


@pytest.mark.parametrize("end", [0.0, 1.0])
def test_normalised_jensen_shannon_is_continuous(end):
  """Guards A3: .031 at .01 and 3.69 at 0 (TRL-type JSD)."""
  a, b = logits(0, scale=1.0), logits(1, scale=1.0)
  limit = jensen_shannon(a, b, beta=end, normalize=True)
  gaps = []
  for inside in (0.1, 0.01, 0.001):
    beta = abs(end - inside)
    got = jensen_shannon(a, b, beta=beta, normalize=True)
    want = oracle.jensen_shannon(*exact(a, b), beta=beta, normalize=True)
    # Float32 sums of size 1 divided by beta (1 - beta), which is inside.
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-7 / inside)
    gaps.append(float(jnp.abs(got / limit - 1).max()))
  # First order in the distance from the end: each tenth takes most of the gap away.
  assert gaps[0] > 4 * gaps[1] > 16 * gaps[2] and gaps[2] < 0.01


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), scale=st.floats(0.1, 50), beta=st.floats(0.05, 0.95))
def test_jensen_shannon_is_at_most_the_entropy_of_beta(seed, scale, beta):
  """Guards A4: m with the wrong side weighted leaves the bound."""
  a, b = logits(seed, (2, 7), scale), logits(seed + 1000, (2, 7), scale)
  entropy = -beta * np.log(beta) - (1 - beta) * np.log(1 - beta)
  assert (jensen_shannon(a, b, beta=beta) <= entropy + 1e-6).all()
  apart = [
    x.at[..., part].set(-jnp.inf) for x, part in ((a, np.s_[:3]), (b, np.s_[3:]))
  ]
  np.testing.assert_allclose(jensen_shannon(*apart, beta=beta), entropy, rtol=1e-5)


@pytest.mark.parametrize("alpha", [0.01, 0.1, 0.6])
@pytest.mark.parametrize("loss", [skew_forward_kl, skew_reverse_kl])
def test_skew_is_bounded_even_for_disjoint_supports(loss, alpha):
  """Guards A8: DLM's skew is NaN where it should be -log alpha."""
  bound = -np.log(alpha)
  a, b = logits(0, scale=30.0), logits(1, scale=30.0)
  values, grads = run(loss, {"alpha": alpha}, a, b)
  assert (values <= bound + 1e-5).all()
  apart = a.at[..., :9].set(-jnp.inf), b.at[..., 9:].set(-jnp.inf)
  values, grads = run(loss, {"alpha": alpha}, *apart)
  np.testing.assert_allclose(values, bound, rtol=1e-5)
  chex.assert_tree_all_finite(grads)


def test_skew_without_skew_is_the_plain_kl():
  """Guards A2: bit-equal at alpha = 0, also in T and in the gradient; the range."""
  a, b = logits(0), logits(1)
  for skew, plain in ((skew_forward_kl, forward_kl), (skew_reverse_kl, reverse_kl)):
    for t in (1.0, 2.0):
      np.testing.assert_array_equal(skew(a, b, t, alpha=0.0), plain(a, b, t))
    got = jax.grad(lambda x, f=skew: f(a, x, alpha=0.0).sum())(b)
    want = jax.grad(lambda x, f=plain: f(a, x).sum())(b)
    np.testing.assert_array_equal(got, want)
    for alpha in (-0.1, 1.0, 1.1):
      with pytest.raises(ValueError, match="alpha"):
        skew(a, b, alpha=alpha)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), scale=st.floats(0.01, 50))
def test_total_variation_bounds(seed, scale):
  """METHODS 3: symmetric, in [0, 1], 1 for disjoint supports."""
  a, b = logits(seed, (2, 7), scale), logits(seed + 1000, (2, 7), scale)
  value = total_variation(a, b)
  np.testing.assert_array_equal(value, total_variation(b, a))
  assert (value >= 0).all() and (value <= 1 + 1e-6).all()
  apart = a.at[..., :3].set(-jnp.inf), b.at[..., 3:].set(-jnp.inf)
  np.testing.assert_allclose(total_variation(*apart), 1, rtol=1e-6)
  np.testing.assert_allclose(total_variation(*apart, 2.0), 4, rtol=1e-6)


def adaptive(p, q, **knobs):
  return adaptive_kl(jnp.log(jnp.array(p)), jnp.log(jnp.array(q)), **knobs)


@pytest.mark.parametrize(
  "q, side",
  [
    ([0.5, 0.2, 0.2, 0.1], "forward"),
    ([0.4, 0.3, 0.25, 0.05], "reverse"),
  ],
)
def test_adaptive_kl_follows_where_the_sides_differ(q, side):
  """Guards A2: a sort the other way moves tokens between head and tail (DSKD)."""
  # Head mass .8 makes .4 and .3 the head, .2 and .1 the tail.
  truth = {"forward": oracle.forward_kl, "reverse": oracle.reverse_kl}
  want = {name: f(np.log(P), np.log(q)) for name, f in truth.items()}
  assert abs(want["forward"] - want["reverse"]) > 1e-3
  np.testing.assert_allclose(adaptive(P, q, head_mass=0.8), want[side], atol=1e-6)
  order = np.array([2, 0, 3, 1])
  mixed = adaptive(P[order], np.array(q)[order], head_mass=0.8)
  np.testing.assert_allclose(mixed, want[side], atol=1e-6)


def test_adaptive_kl_head_always_has_the_top_token():
  """METHODS 3: a top token heavier than the head mass is still the head, alone."""
  p, q = np.array([0.02, 0.9, 0.08]), np.array([0.1, 0.7, 0.2])
  forward = oracle.forward_kl(np.log(p), np.log(q))
  reverse = oracle.reverse_kl(np.log(p), np.log(q))
  for head_mass in (0.01, 0.5):
    got = adaptive(p, q, head_mass=head_mass)
    np.testing.assert_allclose(got, 0.5 * forward + 0.5 * reverse, atol=1e-6)
  got = adaptive(p, q, head_mass=0.99)  # The head is .9 and .08; the gaps .32 of .4.
  np.testing.assert_allclose(got, 0.8 * forward + 0.2 * reverse, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_adaptive_kl_orders_ties_by_index(dtype):
  """A stable order: with five equal tokens and mass 1/2, the first two are the head."""
  teacher = jnp.zeros(5, dtype)
  first = jnp.array([1.0, -1.0, 0.25, 0.25, 0.25], dtype)
  for order in ([0, 1, 2, 3, 4], [2, 3, 4, 0, 1], [2, 0, 3, 4, 1]):
    student = first[np.array(order)]
    x, y = exact(teacher, student)
    got, grads = run(adaptive_kl, {}, teacher, student)
    np.testing.assert_allclose(got, oracle.adaptive_kl(x, y), rtol=1e-5)
    chex.assert_tree_all_finite(grads)


def test_adaptive_weights_are_halves_at_identity_and_constants_elsewhere():
  """Guards A9, F3: 0/0 at identity (KDFlow), gradient through a weight (DistiLLM-2)."""
  a, b = logits(0), logits(1)
  same, grads = run(adaptive_kl, {}, a, a)
  np.testing.assert_array_equal(same, 0)
  for grad in grads:
    np.testing.assert_allclose(grad, 0, atol=1e-6)
  weight = jnp.asarray(oracle.adaptive_weight(*exact(a, b)), jnp.float32)

  def fed_in(x, y):
    return (weight * forward_kl(x, y) + (1 - weight) * reverse_kl(x, y)).sum()

  got = run(adaptive_kl, {}, a, b)[1]
  chex.assert_trees_all_close(got, jax.grad(fed_in, (0, 1))(a, b), atol=1e-5)


def test_weighted_kl_ends_and_range():
  """Guards A2: the weight is the forward KL's."""
  a, b = logits(0), logits(1)
  for t in (1.0, 2.0):
    np.testing.assert_allclose(
      weighted_kl(a, b, t, weight=1.0), forward_kl(a, b, t), rtol=1e-6
    )
    np.testing.assert_allclose(
      weighted_kl(a, b, t, weight=0.0), reverse_kl(a, b, t), rtol=1e-6
    )
  np.testing.assert_allclose(
    weighted_kl(a, b, weight=0.3), weighted_kl(b, a, weight=0.7), rtol=1e-6
  )
  for weight in (-0.1, 1.1):
    with pytest.raises(ValueError, match="weight"):
      weighted_kl(a, b, weight=weight)


def test_alpha_beta_ends_and_range():
  """Guards A2, A3: (1, 0) and (0, 1) are the KLs, reached without a jump."""
  a, b = logits(0, scale=1.0), logits(1, scale=1.0)
  power = functools.partial(alpha_beta, a, b)
  np.testing.assert_allclose(power(1.0, 1.0, 0.0), forward_kl(a, b), rtol=1e-5)
  np.testing.assert_allclose(power(1.0, 0.0, 1.0), reverse_kl(a, b), rtol=1e-5)
  np.testing.assert_allclose(power(2.0, 1.0, 0.0), forward_kl(a, b, 2.0), rtol=1e-5)
  # Exchanging the sides exchanges the powers.
  swapped = alpha_beta(b, a, alpha=0.7, beta=0.2)
  np.testing.assert_allclose(power(alpha=0.2, beta=0.7), swapped, rtol=1e-5)
  np.testing.assert_allclose(
    power(alpha=0.5, beta=0.0), alpha_beta(b, a, alpha=0.0, beta=0.5), rtol=1e-5
  )
  # Near an end: off by the order of .01, plus float32 sums of size 1 divided by .01.
  np.testing.assert_allclose(power(alpha=1.0, beta=0.01), forward_kl(a, b), rtol=0.05)
  np.testing.assert_allclose(power(alpha=0.01, beta=1.0), reverse_kl(a, b), rtol=0.05)
  for alpha, beta in ((0.0, 0.0), (-0.1, 0.5), (0.5, -0.1)):
    with pytest.raises(ValueError, match="alpha|beta"):
      alpha_beta(a, b, alpha=alpha, beta=beta)


@pytest.mark.parametrize(
  "loss, knob, values",
  [
    (jensen_shannon, "beta", (0.1, 0.9)),
    (skew_forward_kl, "alpha", (0.0, 0.3)),
    (skew_reverse_kl, "alpha", (0.0, 0.3)),
    (adaptive_kl, "head_mass", (0.3, 0.9)),
    (weighted_kl, "weight", (0.0, 0.3)),
  ],
)
def test_traced_knobs(loss, knob, values):
  """A knob on a schedule is a traced scalar and gives the same value."""
  a, b = logits(0), logits(1)
  traced = jax.jit(lambda x: loss(a, b, **{knob: x}))
  for value in values:
    got, want = traced(value), loss(a, b, **{knob: value})
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_cross_entropy():
  """SFT is KD from a one-hot teacher: its logit gradient is q - e_y (METHODS 3)."""
  a = logits(0)
  labels = jax.random.randint(jax.random.key(2), (3, 5), 0, 17)
  got = cross_entropy(a, labels)
  np.testing.assert_allclose(
    got, oracle.cross_entropy(a, np.asarray(labels)), rtol=1e-5
  )
  grad = jax.grad(lambda x: cross_entropy(x, labels).sum())(a)
  want = jax.nn.softmax(a) - jax.nn.one_hot(labels, 17)
  np.testing.assert_allclose(grad, want, atol=1e-6)
  one_hot = jnp.where(jax.nn.one_hot(labels, 17) > 0, 0.0, -jnp.inf)
  np.testing.assert_allclose(forward_kl(one_hot, a), got, rtol=1e-5)


def test_cross_entropy_extremes():
  """Guards A8, A10: bf16 and +-1e4 logits, and -inf vocabulary, stay exact."""
  labels = jax.random.randint(jax.random.key(2), (3, 5), 0, 17)
  for a in (logits(0, scale=1e4), logits(0, dtype=jnp.bfloat16)):
    wide = jnp.pad(a, ((0, 0), (0, 0), (0, 4)), constant_values=-jnp.inf)
    value, grad = jax.value_and_grad(lambda x: cross_entropy(x, labels).sum())(wide)
    chex.assert_tree_all_finite((value, grad))
    got = cross_entropy(wide, labels)
    want = oracle.cross_entropy(exact(a)[0], np.asarray(labels))
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_the_overlap_of_the_likeliest_tokens():
  """Sets of the k best of each, counted one by one; k beyond the vocabulary is all."""
  rng = np.random.default_rng(0)
  p, q = rng.normal(size=(2, 3, 4, 12)).astype(np.float32)
  for k in (1, 5, 20):
    got = top_k_overlap(jnp.asarray(p), jnp.asarray(q), k)
    size = min(k, 12)
    for place in np.ndindex(3, 4):
      best = [{*np.argsort(-z[place])[:size].tolist()} for z in (p, q)]
      assert got[place] == pytest.approx(len(best[0] & best[1]) / size)
