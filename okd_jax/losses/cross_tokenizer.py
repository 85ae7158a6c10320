"""Distance between distributions over different vocabularies, and which to compare.

Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss for LLMs,
Boizard et al. 2024, arXiv 2402.12030.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from okd_jax.losses.divergences import Knob, PerToken, log_probs


def sorted_distance(
  teacher_logits: Float[Array, "*B P"],
  student_logits: Float[Array, "*B Q"],
  temperature: Knob = 1.0,
) -> PerToken:
  """sum_i |p_(i) - q_(i)| * T^2, p_(i) being the i-th largest probability.

  The shorter vocabulary is filled up with probabilities 0. This is the Wasserstein-1
  distance where moving mass costs the same between any two tokens (ULD's closed form);
  it is 0 for distributions that differ only in which token is which, and at most
  2 T^2. Like total variation it is not quadratic near p = q. In float32; the gradient
  flows to the student alone.
  """
  p = jax.lax.stop_gradient(_ascending(teacher_logits, temperature))
  q = _ascending(student_logits, temperature)
  size = max(p.shape[-1], q.shape[-1])
  gap = jnp.abs(_filled(p, size) - _filled(q, size))
  return temperature**2 * jnp.sum(gap, axis=-1)


def align(
  student_mask: Bool[Array, "B L"], teacher_mask: Bool[Array, "B M"]
) -> tuple[Int[Array, "B L"], Bool[Array, "B L"]]:
  """The teacher's position for answer token j, at the student's position for its own.

  Returns:
    (index into the teacher's row, whether both answers have a token j).
  """
  number = jnp.cumsum(student_mask, axis=-1) - 1
  # The teacher's masked positions first, in order.
  positions = jnp.argsort(~teacher_mask, axis=-1, stable=True)
  last = teacher_mask.shape[-1] - 1
  index = jnp.take_along_axis(positions, jnp.clip(number, 0, last), axis=-1)
  length = jnp.sum(teacher_mask, axis=-1, keepdims=True)
  return index, student_mask & (number < length)


def _ascending(logits, temperature: Knob):
  return jnp.sort(jnp.exp(log_probs(logits, temperature)), axis=-1)


def _filled(ascending, size: int):
  """Tokens of probability 0 come first in ascending order."""
  missing = size - ascending.shape[-1]
  return jnp.pad(ascending, [(0, 0)] * (ascending.ndim - 1) + [(missing, 0)])
