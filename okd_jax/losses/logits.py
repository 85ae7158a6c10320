"""What every loss needs of logits: log-probabilities, and the losses of one model.

All in float32, whatever comes in.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

# Stands for log 0. Finite, so that 0 * log 0 is 0 and no gradient turns into NaN.
_LOG_ZERO = -1e30

# Two models' vocabularies need not agree here: who compares them says so in an error.
Logits = Float[Array, "*B _"] | Float[np.ndarray, "*B _"]
PerToken = Float[Array, "*B"]
Knob = float | np.number | Float[Array, ""]  # a number, or one that jit traces


def log_probs(logits: Logits, temperature: Knob = 1.0) -> Float[Array, "*B V"]:
  """float32 log-softmax of logits / T.

  Args:
    logits: of any float type; -inf is a token of probability 0.
    temperature: T, above 0.

  Returns:
    log-probabilities [*B, V]; of a logit of -inf a very low number, and not -inf.

  Source: the softmax with a temperature of Hinton et al. 2015, arXiv 1503.02531, Eq. 1.

  >>> print(jnp.round(log_probs(jnp.array([0.0, -jnp.inf])), 2))
  [ 0.e+00 -1.e+30]
  """
  log_q = jax.nn.log_softmax(logits.astype(jnp.float32) / temperature, axis=-1)
  return jnp.maximum(log_q, _LOG_ZERO)


def cross_entropy(
  logits: Logits, labels: Int[Array, "*B"] | Int[np.ndarray, "*B"]
) -> PerToken:
  """-log q(label); its gradient in the logits is q - one_hot(label).

  Args:
    logits: of q.
    labels: the token that is meant, one a position.

  Returns:
    The loss of each position [*B], in nats; NaN where the label is no token
    (`data.check_vocabulary` looks before).

  Source: maximum likelihood; the second term of OKD, arXiv 2409.12512, Eq. 16.

  >>> q = jnp.log(jnp.array([0.75, 0.25]))
  >>> print(f"{cross_entropy(q, jnp.array(1)):.4f}")  # log 4
  1.3863
  """
  log_q = log_probs(logits)
  return -jnp.take_along_axis(log_q, labels[..., None], axis=-1)[..., 0]


def entropy(logits: Logits) -> PerToken:
  """H(q) = -sum q log q.

  Args:
    logits: of q.

  Returns:
    The entropy of each position [*B], in nats.

  Source: A Mathematical Theory of Communication, Shannon 1948.

  >>> print(f"{entropy(jnp.zeros(4)):.4f}")  # log 4
  1.3863
  """
  log_q = log_probs(logits)
  return -jnp.sum(jnp.exp(log_q) * log_q, axis=-1)


def top1_agreement(teacher_logits: Logits, student_logits: Logits) -> PerToken:
  """1 where some likeliest token of one is a likeliest token of the other, else 0.

  Two maxima and a search: two argmax cost a tenth of a chunk on a CPU.

  Args:
    teacher_logits: of one model.
    student_logits: of the other; the order does not matter.

  Returns:
    1.0 or 0.0 at each position [*B]; equal logits share the first place.

  Raises:
    TypeError: from JAX, if the vocabularies differ.

  Source: OKD, arXiv 2409.12512, Eq. 3, which has one likeliest token each.

  >>> p, q = jnp.array([[2.0, 1.0], [0.0, 0.0]]), jnp.array([[1.0, 2.0], [0.0, 1.0]])
  >>> print(top1_agreement(p, q))
  [0. 1.]
  """
  best = [x >= jnp.max(x, -1, keepdims=True) for x in (teacher_logits, student_logits)]
  return jnp.any(best[0] & best[1], axis=-1).astype(jnp.float32)


def top_k_overlap(
  teacher_logits: Logits, student_logits: Logits, k: int = 10
) -> PerToken:
  """The share of the teacher's k likeliest tokens that are the student's, too.

  Args, Raises: as `top1_agreement`.
    k: at most the vocabulary is taken.

  Returns:
    A share at each position [*B]; of equal logits the lower ids come first.

  >>> p, q = jnp.array([[3.0, 2.0, 1.0, 0.0], [3.0, 0.0, 2.0, 1.0]])
  >>> print(top_k_overlap(p, q, k=2))
  0.5
  """
  k = min(k, teacher_logits.shape[-1])
  _, theirs = jax.lax.top_k(teacher_logits, k)
  _, own = jax.lax.top_k(student_logits, k)
  return jnp.mean(jnp.any(theirs[..., None] == own[..., None, :], axis=-1), axis=-1)


def at_least_zero(value: PerToken) -> PerToken:
  """Rounding may leave -1e-8 where p = q: never report that, keep its gradient."""
  return value + jax.lax.stop_gradient(jnp.maximum(value, 0) - value)
