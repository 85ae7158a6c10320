"""RLKD: the student also learns the order of the teacher's likeliest tokens.

Ranking Loss based Knowledge Distillation, Zhang et al. 2024, arXiv 2409.12545.
"""

import dataclasses
from typing import Any

from jaxtyping import Array, Int, Key

from okd_jax.data.batch import Batch
from okd_jax.errors import UserError
from okd_jax.losses import TokenLoss, cross_entropy, rank_correlation
from okd_jax.methods.base import (
  DivergenceKnobs,
  Knob,
  Logits,
  Loss,
  Method,
  Models,
  Now,
  Params,
  check_positive,
  check_weight,
  combine,
  diagnostics,
  stop_gradient,
  token_sums,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Knobs(DivergenceKnobs):
  """What `rlkd` reads.

  divergence: D; the authors offer the KLs, Jensen-Shannon and total variation.
  rank_k: how many of each model's likeliest tokens are ranked; the authors take 5 for
    fine-tuning and 15 for pre-training.
  rank_temperature: of the soft ranks: towards 0 they are the true ranks.
  rank_divisor: m, the authors' 2.
  gold_weight: g, cross-entropy on gold.
  """

  rank_k: int = 5
  rank_temperature: Knob = 1.0
  rank_divisor: Knob = 2.0
  gold_weight: Knob = 0.0

  def __post_init__(self):
    super().__post_init__()
    if self.rank_k < 2:
      raise UserError(
        f"method.rank_k={self.rank_k} must be 2 or more: one token has no order"
      )
    check_positive("method.rank_temperature", self.rank_temperature)
    check_positive("method.rank_divisor", self.rank_divisor)
    check_weight("method.gold_weight", self.gold_weight)


def build(knobs: Knobs) -> Method:
  """loss = (1 - rho) + D(p, q) / m + g CE(y; q), the token mean."""
  token_loss = _token_loss(knobs)

  def loss(
    models: Models,
    params: Params,
    frozen: Params,
    batch: Batch,
    key: Key[Array, ""] | None,
    now: Now,
  ) -> Loss:
    outputs = {
      "student": models.student(params["student"], batch, key),
      "teacher": models.teacher(frozen, None, batch),
    }
    return token_sums(models, token_loss, outputs, batch, now)

  numbers = {
    "rank_temperature": knobs.rank_temperature,
    "rank_divisor": knobs.rank_divisor,
    "temperature": knobs.temperature,
    "gold_weight": knobs.gold_weight,
  }
  return Method(loss, numbers | knobs.shape)


def _token_loss(knobs: Knobs) -> TokenLoss:
  distance = knobs.distance()

  def token_loss(
    logits: Logits,
    labels: Int[Array, "B C"],
    *,
    rank_temperature: Any,
    rank_divisor: Any,
    gold_weight: Any,
    **rest: Any,
  ):
    student, teacher = logits["student"], stop_gradient(logits["teacher"])
    rank_loss = rank_correlation(teacher, student, knobs.rank_k, rank_temperature)
    d = distance(teacher, student, **rest)
    loss = combine(
      (1, rank_loss),
      (1 / rank_divisor, d),
      (gold_weight, cross_entropy(student, labels)),
    )
    metrics = {"divergence": d, "rank_loss": rank_loss}
    return loss, metrics | diagnostics(logits, labels)

  return token_loss
