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

from okd_jax.losses.divergences import Knob, Logits, PerToken, forward_kl, log_probs


class TopK(NamedTuple):
  """The K likeliest tokens of a distribution, and the mass of all others.

  `log_tail` is a very low number where there are no others.
  """

  ids: Int[Array, "*B K"]
  log_probs: Float[Array, "*B K"]
  log_tail: Float[Array, "*B"]


def top_k(teacher_logits: Logits, k: int, temperature: Knob = 1.0) -> TopK:
  """The K largest of softmax(logits / T), largest first; K is cut to V.

  The temperature cannot be changed afterwards: the tail has forgotten its logits.
  """
  log_p = log_probs(teacher_logits, temperature)
  values, ids = jax.lax.top_k(log_p, min(k, log_p.shape[-1]))
  return TopK(ids, values, _log_rest(log_p, ids))


def buckets(
  top: TopK, student_logits: Logits, temperature: Knob = 1.0
) -> tuple[Float[Array, "*B K+1"], Float[Array, "*B K+1"]]:
  """log-probabilities (p, q) of the teacher's K tokens and, last, of the tail.

  They are logits like any others (of temperature 1) to every divergence.
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
  """KL(p || q) * T^2 between K + 1 buckets; `top` was taken at the same T."""
  p, q = buckets(top, student_logits, temperature)
  return temperature**2 * forward_kl(p, q)


def topk_reverse_kl(
  top: TopK, student_logits: Logits, temperature: Knob = 1.0
) -> PerToken:
  """KL(q || p) * T^2 between K + 1 buckets; `top` was taken at the same T."""
  p, q = buckets(top, student_logits, temperature)
  return temperature**2 * forward_kl(q, p)


def _log_rest(log_p: Logits, ids: Int[Array, "*B K"]) -> Float[Array, "*B"]:
  """log of the mass outside `ids`, summed and not 1 minus: exact however small."""
  lowest = jnp.finfo(jnp.float32).min
  outside = jnp.put_along_axis(log_p, ids, lowest, axis=-1, inplace=False)
  return jnp.maximum(jax.nn.logsumexp(outside, axis=-1), -1e30)
