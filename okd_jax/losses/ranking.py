"""A loss on the order of the likeliest tokens, not on their probabilities."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from okd_jax.losses.logits import Knob, PerToken, at_least_zero

# Stands for a logit of -inf: finite, so that no difference of two is NaN.
_LOWEST = -1e30
# Below this a centred rank vector counts as constant; its correlation is then 0.
_SMALLEST_NORM = 1e-6


def rank_correlation(
  teacher_logits: Float[Array, "*B V"],
  student_logits: Float[Array, "*B V"],
  k: int = 5,
  temperature: Knob = 1.0,
) -> PerToken:
  """1 - rho: rho is Spearman's correlation of both models' soft ranks, in [-1, 1].

  Ranks are taken among the union of both models' top k, where an id counts once (unlike
  in the authors' code): rank_i = sum_j sigmoid((z_i - z_j) / temperature), towards
  temperature 0 the true one. Which tokens are ranked is a constant of the gradient,
  which flows to both sides. Where one side ranks nothing (all logits equal) the loss is
  1; where neither does, or both agree, it is 0.

  Args:
    teacher_logits: of one model.
    student_logits: of the other, over the same vocabulary.
    k: how many of each model's likeliest tokens are ranked; cut to V.
    temperature: how soft the ranks are.

  Returns:
    The loss at each position [*B], in [0, 2].

  Source: RLKD, Zhang et al. 2024, arXiv 2409.12545.

  >>> p = jnp.array([4.0, 2.0, 0.0])
  >>> losses = [rank_correlation(p, q, k=3) for q in (p, p[::-1])]
  >>> print([f"{loss:.2f}" for loss in losses])  # the same order, the opposite one
  ['0.00', '2.00']
  """
  k = min(k, teacher_logits.shape[-1])
  ids, valid = _union(teacher_logits, student_logits, k)
  slots = [jnp.take_along_axis(x, ids, -1) for x in (teacher_logits, student_logits)]
  # Padded vocabulary, -inf on both sides, is there only to make up the number.
  valid &= (slots[0] > -jnp.inf) | (slots[1] > -jnp.inf)
  ranks = [_soft_ranks(logits, valid, temperature) for logits in slots]
  rho = jnp.sum(ranks[0] * ranks[1], axis=-1)
  nothing = [jnp.all(rank == 0, axis=-1) for rank in ranks]
  return jnp.where(nothing[0] & nothing[1], 0.0, at_least_zero(1 - rho))


def _union(
  teacher_logits: Float[Array, "*B V"], student_logits: Float[Array, "*B V"], k: int
) -> tuple[Int[Array, "*B S"], Bool[Array, "*B S"]]:
  """Ids of both top k side by side, and which of them appear for the first time.

  Shapes are fixed: always S = 2 k slots, masked where they repeat.
  """
  teacher, student = (
    jax.lax.top_k(jax.lax.stop_gradient(logits), k)[1]
    for logits in (teacher_logits, student_logits)
  )
  repeated = jnp.any(student[..., :, None] == teacher[..., None, :], axis=-1)
  valid = jnp.concatenate([jnp.ones_like(repeated), ~repeated], axis=-1)
  return jnp.concatenate([teacher, student], axis=-1), valid


def _soft_ranks(
  logits: Float[Array, "*B S"], valid: Bool[Array, "*B S"], temperature: Knob
) -> Float[Array, "*B S"]:
  """Soft ranks among the valid slots, centred and of length 1; 0 elsewhere."""
  logits = jnp.maximum(logits.astype(jnp.float32), _LOWEST)
  gaps = (logits[..., :, None] - logits[..., None, :]) / temperature
  ranks = jnp.sum(jnp.where(valid[..., None, :], jax.nn.sigmoid(gaps), 0), axis=-1)
  count = jnp.sum(valid, axis=-1, keepdims=True)
  mean = jnp.sum(jnp.where(valid, ranks, 0), axis=-1, keepdims=True) / count
  centred = jnp.where(valid, ranks - mean, 0)
  square = jnp.sum(jnp.square(centred), axis=-1, keepdims=True)
  # Two steps, so that the square root's infinite slope at 0 is never taken.
  flat = square < _SMALLEST_NORM**2
  return jnp.where(flat, 0, centred / jnp.sqrt(jnp.where(flat, 1, square)))
