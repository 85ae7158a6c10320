"""A teacher that is not there: what it said about the data was stored before.

Of each trained token `cache_teacher` keeps the K likeliest ids, their
log-probabilities and the mass of the rest; and, since K ids do not tell them, the
log-probability of the gold token and the entropy. The student is put into the same
K + 1 buckets (`losses.sparse`), so no divergence between the buckets exceeds the one
between whole distributions, and at K = V they are equal.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from okd_jax.losses.divergences import forward_kl, reverse_kl
from okd_jax.losses.logits import cross_entropy, entropy, log_probs
from okd_jax.losses.outputs import Output
from okd_jax.losses.per_token import per_token
from okd_jax.losses.sparse import TopK, buckets, top_k

# What is known of a token, by name.
FIELDS = ("ids", "log_probs", "log_tail", "gold_log_prob", "entropy")

Stored = Mapping[str, Shaped[Array, "B C ..."]]


def record(
  output: Output,
  labels: Int[Array, "B L"],
  *,
  k: int,
  temperature: float,
  dtype: Any,
  vocab_size: int,
  chunk: int,
) -> dict[str, Shaped[Array, "B L ..."]]:
  """{name: [B, L] or [B, L, K]}: all of FIELDS, from the teacher's output.

  Args:
    k: tokens kept; 0 is the whole vocabulary.
    temperature: of the stored distribution; gold log-probability and entropy are those
      of temperature 1.
    dtype: of the log-probabilities.
    vocab_size: ids that count, those of the student.
    chunk: positions of a row whose logits are in memory at once.
  """

  def pick(logits: Mapping[str, Float[Array, "B C V"]], labels: Int[Array, "B C"]):
    teacher = logits["teacher"]
    top = top_k(teacher, k or vocab_size, temperature)
    return {
      "ids": top.ids.astype(jnp.uint16 if vocab_size <= 1 << 16 else jnp.uint32),
      "log_probs": top.log_probs.astype(dtype),
      "log_tail": top.log_tail,
      "gold_log_prob": -cross_entropy(teacher, labels),
      "entropy": entropy(teacher),
    }

  cut = {"teacher": output.first_ids(vocab_size)}
  return per_token(pick, cut, labels, chunk)


def token_distance(
  distance: Callable[..., Float[Array, "B C"]],
  student: Float[Array, "B C V"],
  stored: Stored,
  *,
  temperature: float | Float[Array, ""],
  **knobs: Any,
) -> tuple[Float[Array, "B C"], dict[str, Float[Array, "B C"]]]:
  """(distance * T^2 between the buckets, `figures`)."""
  p, q = buckets(_top(stored), student, temperature)
  d = temperature**2 * distance(p, q, temperature=1.0, **knobs)
  return d, figures(student, stored, temperature)


def figures(
  student: Float[Array, "B C V"],
  stored: Stored,
  temperature: float | Float[Array, ""],
) -> dict[str, Float[Array, "B C"]]:
  """What is logged beside a loss; the KLs are those of the buckets, at T = 1 only."""
  student, top = jax.lax.stop_gradient(student), _top(stored)
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


def _top(stored: Stored) -> TopK:
  log_probs = stored["log_probs"].astype(jnp.float32)
  return TopK(stored["ids"].astype(jnp.int32), log_probs, stored["log_tail"])
