"""Teachers of whom only the likeliest tokens are known, and the mass of the rest.

A teacher's K largest probabilities and one bucket for everything else. The student is
put into the same K + 1 buckets, so nothing is renormalised: mass that the student
loses to the tail costs it, and by the log-sum inequality no KL between buckets exceeds
the KL they were made from. At K = V it is that KL.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from okd_jax.losses.divergences import forward_kl
from okd_jax.losses.logits import Knob, Logits, PerToken, log_probs


class TopK(NamedTuple):
  """The K likeliest tokens of a distribution, and the mass of all others.

  `log_tail` is a very low number where there are no others.
  """

  ids: Int[Array, "*B K"]
  log_probs: Float[Array, "*B K"]
  log_tail: Float[Array, "*B"]


def top_k(teacher_logits: Logits, k: int, temperature: Knob = 1.0) -> TopK:
  """The K largest of softmax(logits / T), largest first.

  Args:
    teacher_logits: of the whole vocabulary.
    k: K, cut to V.
    temperature: T. It cannot be changed afterwards: the tail has forgotten its logits.

  Returns:
    ids [*B, K], their log-probabilities, and that of all the rest together [*B].

  Raises:
    ValueError: from JAX, if k is negative.

  Source: the K largest of Sparse Logit Sampling, Anshumann et al. 2025, arXiv
  2503.16870; the bucket for all the rest is ours.

  >>> top = top_k(jnp.log(jnp.array([0.1, 0.6, 0.1, 0.2])), k=2)
  >>> print(top.ids, [f"{jnp.exp(x):.2f}" for x in (*top.log_probs, top.log_tail)])
  [1 3] ['0.60', '0.20', '0.20']
  """
  log_p = log_probs(teacher_logits, temperature)
  values, ids = jax.lax.top_k(log_p, min(k, log_p.shape[-1]))
  return TopK(ids, values, _log_rest(log_p, ids))


def buckets(
  top: TopK, student_logits: Logits, temperature: Knob = 1.0
) -> tuple[Float[Array, "*B N"], Float[Array, "*B N"]]:
  """Both models' log-probabilities of the teacher's K tokens and, last, of the tail.

  They are logits like any others (of temperature 1) to every divergence.

  Args:
    top: what is known of the teacher.
    student_logits: of the whole vocabulary.
    temperature: T, by which the student's logits are divided; `top` was taken at it.

  Returns:
    (log p, log q), each [*B, N] with N = K + 1.

  Source: see the head of this file; the log-sum inequality is Theorem 2.7.1 of Cover
  and Thomas, Elements of Information Theory, 2006.

  >>> top = top_k(jnp.log(jnp.array([0.1, 0.6, 0.1, 0.2])), k=2)
  >>> p, q = buckets(top, jnp.zeros(4))
  >>> print(*([f"{jnp.exp(x):.2f}" for x in side] for side in (p, q)))
  ['0.60', '0.20', '0.20'] ['0.25', '0.25', '0.50']
  """
  log_q = log_probs(student_logits, temperature)
  kept = jnp.take_along_axis(log_q, top.ids, axis=-1)
  rest = _log_rest(log_q, top.ids)
  return (
    jnp.concatenate([top.log_probs, top.log_tail[..., None]], axis=-1),
    jnp.concatenate([kept, rest[..., None]], axis=-1),
  )


def topk_forward_kl(
  top: TopK, student_logits: Logits, temperature: Knob = 1.0
) -> PerToken:
  """KL(p || q) * T^2 between K + 1 buckets.

  Args:
    top: what is known of the teacher, taken at the same T.
    student_logits: of the whole vocabulary.
    temperature: T, by which the student's logits are divided.

  Returns:
    The divergence at each position [*B], in nats: at most that of `forward_kl`.

  Source: as `buckets` and `forward_kl`.

  >>> teacher = jnp.log(jnp.array([0.1, 0.6, 0.1, 0.2]))
  >>> for k in (1, 4):  # the more is known the more it is; all of it: `forward_kl`
  ...   print(f"{topk_forward_kl(top_k(teacher, k), jnp.zeros(4)):.4f}")
  0.2738
  0.2974
  """
  p, q = buckets(top, student_logits, temperature)
  return temperature**2 * forward_kl(p, q)


def topk_reverse_kl(
  top: TopK, student_logits: Logits, temperature: Knob = 1.0
) -> PerToken:
  """KL(q || p) * T^2 between K + 1 buckets.

  Args, Returns: as `topk_forward_kl`, and at most `reverse_kl`.

  Source: as `buckets` and `reverse_kl`.

  >>> top = top_k(jnp.log(jnp.array([0.1, 0.6, 0.1, 0.2])), k=2)
  >>> print(f"{topk_reverse_kl(top, jnp.zeros(4)):.4f}")
  0.2951
  """
  p, q = buckets(top, student_logits, temperature)
  return temperature**2 * forward_kl(q, p)


def _log_rest(
  log_p: Float[Array, "*B V"], ids: Int[Array, "*B K"]
) -> Float[Array, "*B"]:
  """log of the mass outside `ids`, summed and not 1 minus: exact however small."""
  lowest = jnp.finfo(jnp.float32).min
  outside = jnp.put_along_axis(log_p, ids, lowest, axis=-1, inplace=False)
  return jnp.maximum(jax.nn.logsumexp(outside, axis=-1), -1e30)
