"""Distance between distributions over different vocabularies, and which to compare.

Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss for LLMs,
Boizard et al. 2024, arXiv 2402.12030.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from okd_jax.losses.logits import Knob, PerToken, log_probs

_Ascending = Float[Array, "*B _"]  # probabilities, the smallest first


def sorted_distance(
  teacher_logits: Float[Array, "*B P"],
  student_logits: Float[Array, "*B Q"],
  temperature: Knob = 1.0,
) -> PerToken:
  """sum_i |p_(i) - q_(i)| * T^2, p_(i) being the i-th largest probability.

  The shorter vocabulary is filled up with probabilities 0. This is the Wasserstein-1
  distance where moving mass costs the same between any two tokens (ULD's closed form);
  it is 0 for distributions that differ only in which token is which, and at most
  2 T^2. Like total variation it is not quadratic near p = q. In float32.

  Args:
    teacher_logits: of p, a constant of the gradient.
    student_logits: of q, to whom the gradient flows.
    temperature: T, by which both logits are divided.

  Returns:
    The distance at each position [*B].

  Source: Universal Logit Distillation, arXiv 2402.12030.

  >>> p, q = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.25, 0.0, 0.75]))
  >>> print(f"{sorted_distance(p, q):.2f}")  # |0.5 - 0.75| + |0.5 - 0.25|
  0.50
  """
  p = jax.lax.stop_gradient(_ascending(teacher_logits, temperature))
  q = _ascending(student_logits, temperature)
  size = max(p.shape[-1], q.shape[-1])
  gap = jnp.abs(_filled(p, size) - _filled(q, size))
  return temperature**2 * jnp.sum(gap, axis=-1)


def align(
  student_mask: Bool[Array | np.ndarray, "B L"],
  teacher_mask: Bool[Array | np.ndarray, "B M"],
) -> tuple[Int[Array, "B L"], Bool[Array, "B L"]]:
  """The teacher's position for answer token j, at the student's position for its own.

  Args:
    student_mask: where the student's row holds tokens of the answer.
    teacher_mask: where the teacher's row, of the same answer, does.

  Returns:
    (index into the teacher's row, whether both answers have a token j).

  Source: Universal Logit Distillation, arXiv 2402.12030, where the answers are
  compared token by token, as far as the shorter one goes.

  >>> ours, theirs = jnp.array([[False, True, True]]), jnp.array([[True, False]])
  >>> index, both = align(ours, theirs)
  >>> print(both, index[both])
  [[False  True False]] [0]
  """
  number = jnp.cumsum(student_mask, axis=-1) - 1
  # The teacher's masked positions first, in order.
  positions = jnp.argsort(~teacher_mask, axis=-1, stable=True)
  last = teacher_mask.shape[-1] - 1
  index = jnp.take_along_axis(positions, jnp.clip(number, 0, last), axis=-1)
  length = jnp.sum(teacher_mask, axis=-1, keepdims=True)
  return index, student_mask & (number < length)


def _ascending(logits: Float[Array, "*B V"], temperature: Knob) -> _Ascending:
  return jnp.sort(jnp.exp(log_probs(logits, temperature)), axis=-1)


def _filled(ascending: _Ascending, size: int) -> _Ascending:
  """Tokens of probability 0 come first in ascending order."""
  missing = size - ascending.shape[-1]
  return jnp.pad(ascending, [(0, 0)] * (ascending.ndim - 1) + [(missing, 0)])
