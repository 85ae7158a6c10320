"""RLKD: the student also learns the order of the teacher's likeliest tokens.

Ranking Loss based Knowledge Distillation, Zhang et al. 2024, arXiv 2409.12545.
"""

from okd_jax.errors import UserError
from okd_jax.losses import cross_entropy, rank_correlation
from okd_jax.methods.base.knobs import (
  Knob,
  check_positive,
  check_weight,
  find_divergence,
  own_shape,
)
from okd_jax.methods.base.method import (
  Method,
  combine,
  diagnostics,
  stop_gradient,
  token_sums,
)


def build(
  *,
  divergence: str,
  rank_k: int,
  rank_temperature: Knob,
  rank_divisor: Knob,
  temperature: Knob,
  gold_weight: Knob,
  **shape: Knob,
) -> Method:
  """loss = (1 - rho) + D(p, q) / m + g CE(y; q), the token mean.

  Args:
    divergence: D; the authors offer the KLs, Jensen-Shannon and total variation.
    rank_k: how many of each model's likeliest tokens are ranked; the authors take 5
      for fine-tuning and 15 for pre-training.
    rank_temperature: of the soft ranks: towards 0 they are the true ranks.
    rank_divisor: m, the authors' 2.
    temperature: T of the divergence, which is multiplied by T^2.
    gold_weight: g, cross-entropy on gold.
    shape: the knobs of the divergence.
  """
  if rank_k < 2:
    raise UserError(f"method.rank_k={rank_k} must be 2 or more: one token has no order")
  for key, knob in (
    ("rank_temperature", rank_temperature),
    ("rank_divisor", rank_divisor),
    ("temperature", temperature),
  ):
    check_positive(f"method.{key}", knob)
  check_weight("method.gold_weight", gold_weight)
  divergence = divergence or "forward_kl"
  distance = find_divergence("method.divergence", divergence, shape)

  def token_loss(
    logits, labels, *, rank_temperature, rank_divisor, gold_weight, **knobs
  ):
    student, teacher = logits["student"], stop_gradient(logits["teacher"])
    rank_loss = rank_correlation(teacher, student, rank_k, rank_temperature)
    d = distance(teacher, student, **knobs)
    loss = combine(
      (1, rank_loss),
      (1 / rank_divisor, d),
      (gold_weight, cross_entropy(student, labels)),
    )
    metrics = {"divergence": d, "rank_loss": rank_loss}
    return loss, metrics | diagnostics(logits, labels)

  def loss(models, params, frozen, batch, key, knobs):
    outputs = {
      "student": models.student(params["student"], batch, key),
      "teacher": models.teacher(frozen, None, batch),
    }
    return token_sums(models, token_loss, outputs, batch, knobs)

  knobs = {
    "rank_temperature": rank_temperature,
    "rank_divisor": rank_divisor,
    "temperature": temperature,
    "gold_weight": gold_weight,
  }
  return Method(loss=loss, teacher="frozen", knobs=knobs | own_shape(shape, divergence))
