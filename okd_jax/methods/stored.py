"""A teacher that is not there: what it said about the data was stored before.

Of each trained token `cache_teacher` keeps the K likeliest ids, their
log-probabilities and the mass of the rest; and, since K ids do not tell them, the
log-probability of the gold token and the entropy. The student is put into the same
K + 1 buckets (`losses.sparse`), so no divergence between the buckets exceeds the one
between whole distributions, and at K = V they are equal.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from okd_jax.losses import (
  TopK,
  buckets,
  cross_entropy,
  entropy,
  forward_kl,
  log_probs,
  per_token,
  reverse_kl,
  top_k,
)
from okd_jax.methods.base.method import stop_gradient

# What is known of a token, by name.
FIELDS = ("ids", "log_probs", "log_tail", "gold_log_prob", "entropy")


def record(models, output, labels, k: int, temperature: float, dtype) -> dict:
  """{name: [B, L] or [B, L, K]}: all of FIELDS, from the teacher's output.

  k: 0 is the whole vocabulary. temperature: of the stored distribution; gold
  log-probability and entropy are those of temperature 1.
  """
  size = models.vocab_size

  def pick(logits, labels):
    teacher = logits["teacher"]
    top = top_k(teacher, k or size, temperature)
    return {
      "ids": top.ids.astype(jnp.uint16 if size <= 1 << 16 else jnp.uint32),
      "log_probs": top.log_probs.astype(dtype),
      "log_tail": top.log_tail,
      "gold_log_prob": -cross_entropy(teacher, labels),
      "entropy": entropy(teacher),
    }

  cut = {"teacher": output._replace(head=output.head[:size])}
  return per_token(pick, cut, labels, models.chunk)


def token_distance(distance: Callable, student, stored, *, temperature, **knobs):
  """(distance * T^2 between the buckets, `figures`) [B, C]."""
  p, q = buckets(_top(stored), student, temperature)
  d = temperature**2 * distance(p, q, temperature=1.0, **knobs)
  return d, figures(student, stored, temperature)


def figures(student, stored, temperature) -> dict:
  """As `method.diagnostics`; the KLs are those of the buckets, at T = 1 only."""
  student, top = stop_gradient(student), _top(stored)
  found = {
    "teacher_nll": -stored["gold_log_prob"],
    "teacher_entropy": stored["entropy"],
    "student_entropy": entropy(student),
    "top1_agreement": (student.argmax(-1) == top.ids[..., 0]).astype(jnp.float32),
  }
  if isinstance(temperature, jax.Array) or temperature != 1:
    return found
  p, q = map(log_probs, buckets(top, student, temperature))
  return found | {"forward_kl": forward_kl(p, q), "reverse_kl": reverse_kl(p, q)}


def _top(stored) -> TopK:
  log_probs = stored["log_probs"].astype(jnp.float32)
  return TopK(stored["ids"].astype(jnp.int32), log_probs, stored["log_tail"])
