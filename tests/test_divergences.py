"""Each divergence against hand-computed values, a float64 oracle and its gradient."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from okd_jax.losses import cross_entropy, forward_kl, jensen_shannon, reverse_kl

P = np.array([0.4, 0.3, 0.2, 0.1])
Q = np.array([0.25, 0.25, 0.3, 0.2])

# Hand-computed, natural logarithm: METHODS 1.2.
GOLDEN = [
  (forward_kl, {}, 0.0922902),
  (reverse_kl, {}, 0.0971877),
  (jensen_shannon, {"beta": 0.1}, 0.0083153),
  (jensen_shannon, {"beta": 0.5}, 0.0233991),
  (jensen_shannon, {"beta": 0.9}, 0.0086620),
  (forward_kl, {"temperature": 2.0}, 0.1007379),
  (reverse_kl, {"temperature": 2.0}, 0.1021868),
]
ALL = [
  (forward_kl, oracle.forward_kl, {}),
  (reverse_kl, oracle.reverse_kl, {}),
  (jensen_shannon, oracle.jensen_shannon, {"beta": 0.1}),
  (jensen_shannon, oracle.jensen_shannon, {"beta": 0.5}),
  (jensen_shannon, oracle.jensen_shannon, {"beta": 0.9}),
]
IDS = ["forward", "reverse", "jsd.1", "jsd.5", "jsd.9"]
every = pytest.mark.parametrize("loss, truth, knobs", ALL, ids=IDS)


def logits(seed, shape=(3, 5, 17), scale=3.0, dtype=jnp.float32):
  return (scale * jax.random.normal(jax.random.key(seed), shape)).astype(dtype)


@pytest.mark.parametrize("loss, knobs, value", GOLDEN)
def test_golden_values(loss, knobs, value):
  """Guards A2, A4: directions swapped (EasyDeL GKD), the wrong side weighted (TRL)."""
  got = loss(jnp.log(P), jnp.log(Q), **knobs)
  np.testing.assert_allclose(got, value, atol=1e-6)


@every
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_equals_the_oracle(loss, truth, knobs, dtype, temperature):
  teacher, student = logits(0, dtype=dtype), logits(1, dtype=dtype)
  got = jax.jit(functools.partial(loss, temperature=temperature, **knobs))(
    teacher, student
  )
  chex.assert_shape(got, (3, 5))
  assert got.dtype == jnp.float32
  # The oracle sees the same rounded inputs: rounding belongs to them, not to us.
  rounded = [np.asarray(x.astype(jnp.float32)) for x in (teacher, student)]
  want = truth(*rounded, temperature=temperature, **knobs)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@every
def test_small_divergence_of_bfloat16_logits(loss, truth, knobs):
  """Guards A10: EasyDeL's bf16 softmax reports 0 where .0048 is right."""
  teacher = logits(0, (64, 512), 2.0, jnp.bfloat16)
  student = (teacher + logits(1, (64, 512), 0.1)).astype(jnp.bfloat16)
  got = loss(teacher, student, **knobs).mean()
  rounded = [np.asarray(x.astype(jnp.float32)) for x in (teacher, student)]
  want = truth(*rounded, **knobs).mean()
  assert 3e-4 < want < 4e-2
  np.testing.assert_allclose(got, want, rtol=0.02)


@every
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), scale=st.floats(0.01, 50), t=st.floats(0.25, 8))
def test_zero_at_identity_and_never_negative(loss, truth, knobs, seed, scale, t):
  """Guards A1: a 'KL' that is a cross-entropy (torchtune, LMOps, DLM: H(p) here)."""
  a, b = logits(seed, (2, 9), scale), logits(seed + 1, (2, 9), scale)
  same = loss(a, a, temperature=t, **knobs)
  assert (same >= 0).all() and (same < 1e-4).all()
  assert (loss(a, b, temperature=t, **knobs) >= 0).all()


@every
@pytest.mark.parametrize("c, d", [(20.0, -20.0), (-20.0, 20.0), (100.0, 0.0)])
def test_shift_invariance(loss, truth, knobs, c, d):
  """Guards A5: raw logits copied between vocabularies (swift)."""
  a, b = logits(0), logits(1)
  np.testing.assert_allclose(
    loss(a + c, b + d, **knobs), loss(a, b, **knobs), rtol=1e-4, atol=1e-5
  )


@every
def test_temperature_keeps_gradients_level(loss, truth, knobs):
  """Guards A6: no T^2 (KDFlow: .486, .109, .027 at T = 1, 2, 4)."""
  a = logits(0, scale=0.5)
  b = a + logits(1, scale=0.1)

  def size(t):
    grad = jax.grad(lambda x: loss(a, x, temperature=t, **knobs).sum())(b)
    return jnp.linalg.norm(grad)

  sizes = jnp.array([size(t) for t in (1.0, 2.0, 4.0, 8.0)])
  assert sizes.max() / sizes.min() < 1.5


@every
@pytest.mark.parametrize("scale", [120.0, 1e4])
def test_extreme_logits_stay_finite(loss, truth, knobs, scale):
  """Guards A8: NaN loss and gradient at scale 120 (DLM)."""
  a, b = logits(0, scale=scale), logits(1, scale=scale)
  value, grads = jax.value_and_grad(
    lambda x, y: loss(x, y, **knobs).sum(), argnums=(0, 1)
  )(a, b)
  chex.assert_tree_all_finite((value, grads))


@every
def test_masked_vocabulary_is_as_if_absent(loss, truth, knobs):
  """Guards A8, C3: -inf on both sides changes neither value nor gradient."""
  a, b = logits(0), logits(1)
  wide = [
    jnp.pad(x, ((0, 0), (0, 0), (0, 4)), constant_values=-jnp.inf) for x in (a, b)
  ]
  grad = jax.grad(lambda x, y: loss(x, y, **knobs).sum(), argnums=(0, 1))
  np.testing.assert_allclose(loss(*wide, **knobs), loss(a, b, **knobs), rtol=1e-5)
  for narrow, padded in zip(grad(a, b), grad(*wide), strict=True):
    np.testing.assert_allclose(padded[..., :17], narrow, atol=1e-5)
    np.testing.assert_array_equal(padded[..., 17:], 0)


def test_closed_form_gradients():
  """Guards A7: a cross-entropy that loses the gradient through p when p is trained."""
  a, b = logits(0), logits(1)
  p, q = jax.nn.softmax(a), jax.nn.softmax(b)
  log_ratio = jax.nn.log_softmax(b) - jax.nn.log_softmax(a)

  def grad(loss, side):
    return jax.grad(lambda x, y: loss(x, y).sum(), argnums=side)(a, b)

  np.testing.assert_allclose(grad(forward_kl, 1), q - p, atol=1e-5)
  centred = log_ratio - (q * log_ratio).sum(-1, keepdims=True)
  np.testing.assert_allclose(grad(reverse_kl, 1), q * centred, atol=1e-5)
  m = 0.3 * p + 0.7 * q
  log_m = jnp.log(q) - jnp.log(m)
  want = 0.7 * q * (log_m - (q * log_m).sum(-1, keepdims=True))
  jsd = functools.partial(jensen_shannon, beta=0.3)
  np.testing.assert_allclose(grad(jsd, 1), want, atol=1e-5)
  np.testing.assert_allclose(grad(reverse_kl, 0), p - q, atol=1e-5)


@every
def test_gradients_equal_finite_differences(loss, truth, knobs):
  a, b = np.asarray(logits(0, (6,))), np.asarray(logits(1, (6,)))
  grads = jax.grad(lambda x, y: loss(x, y, **knobs), argnums=(0, 1))(a, b)
  for side, grad in enumerate(grads):
    for i in range(6):
      step = np.zeros((2, 6))
      step[side, i] = 1e-5
      up = truth(a + step[0], b + step[1], **knobs)
      down = truth(a - step[0], b - step[1], **knobs)
      np.testing.assert_allclose(grad[i], (up - down) / 2e-5, atol=1e-4)


def test_jensen_shannon_ends_and_range():
  """Guards A2, A3: the ends are the named divergences; beta outside raises."""
  a, b = logits(0), logits(1)
  np.testing.assert_array_equal(jensen_shannon(a, b, beta=0.0), forward_kl(a, b))
  np.testing.assert_array_equal(jensen_shannon(a, b, beta=1.0), reverse_kl(a, b))
  np.testing.assert_allclose(jensen_shannon(a, b), jensen_shannon(b, a), rtol=1e-5)
  for beta in (-0.1, 1.1):
    with pytest.raises(ValueError, match="between 0 and 1"):
      jensen_shannon(a, b, beta=beta)


def test_cross_entropy():
  a = logits(0)
  labels = jax.random.randint(jax.random.key(2), (3, 5), 0, 17)
  got = cross_entropy(a, labels)
  np.testing.assert_allclose(
    got, oracle.cross_entropy(a, np.asarray(labels)), rtol=1e-5
  )
  grad = jax.grad(lambda x: cross_entropy(x, labels).sum())(a)
  want = jax.nn.softmax(a) - jax.nn.one_hot(labels, 17)
  np.testing.assert_allclose(grad, want, atol=1e-6)
