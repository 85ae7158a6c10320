"""DistiLLM-2: the teacher's answers pull, the student's own push back.

Contrastive approach, Ko et al. 2025, arXiv 2503.07067; code jongwooko/distillm-2. Per
prompt a fixed pair, y_t by the teacher and y_s by the student, both sampled before
training:

    (2 - b) KL(p || a p + (1 - a) q) on y_t  +  b KL(q || (1 - a) p + a q) on y_s

each averaged over a sequence's tokens first and then over sequences, the student in
the second mixture being a constant (unlike in DistiLLM). Cross-entropy on gold and an
adapter's loss are averaged in the same way here, not over all tokens. Its curricula for
a and b are off in the release: b may move (`end.contrast`), the one for a is not here.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from okd_jax.data.batch import Batch
from okd_jax.errors import UserError
from okd_jax.losses import forward_kl, log_probs, skew_forward_kl
from okd_jax.methods.base import (
  Knob,
  Logits,
  Loss,
  Method,
  Models,
  Now,
  Params,
  TextKnobs,
  check_weight,
  combine,
  diagnostics,
  gold_nll,
  is_zero,
  stop_gradient,
  token_sums,
)
from okd_jax.methods.base.knobs import ends, never


@dataclasses.dataclass(frozen=True, kw_only=True)
class Knobs(TextKnobs):
  """What `distillm2` reads; left open, both writers draw at 0.8 with top_p 0.95.

  skew: a.
  contrast: b, from 0 (the teacher's text alone) to 2 (the student's alone).
  gold_weight: cross-entropy on gold, on top.
  """

  skew: Knob = 0.1
  contrast: Knob = 1.0
  gold_weight: Knob = 0.0

  own_temperature, own_top_p = 0.8, 0.95

  def __post_init__(self):
    super().__post_init__()
    if not all(0 < value < 1 for value in ends(self.skew)):
      raise UserError(f"method.skew={self.skew} must lie between 0 and 1")
    if not all(0 <= value <= 2 for value in ends(self.contrast)):
      raise UserError(f"method.contrast={self.contrast} must lie between 0 and 2")
    check_weight("method.gold_weight", self.gold_weight)


def build(knobs: Knobs) -> Method:
  """Both terms, and cross-entropy on gold."""

  def loss(
    models: Models,
    params: Params,
    frozen: Params,
    batch: Batch,
    key: Key[Array, ""] | None,
    now: Now,
  ) -> Loss:
    now = dict(now)
    gold_weight = now.pop("gold_weight")
    value, metrics = 0.0, {}
    for number, (writer, term) in enumerate((("teacher", _pull), ("student", _push))):
      rows = batch.answers[writer]
      own_key = jax.random.fold_in(key, number)
      outputs = {
        "student": models.student(params["student"], rows, own_key),
        "teacher": models.teacher(frozen, None, rows),
      }
      part, more = token_sums(models, term, outputs, rows, now)
      value, metrics = value + part, metrics | more
    if batch.gold is not None and not is_zero(gold_weight):
      nll = gold_nll(models, params, batch.gold, jax.random.fold_in(key, 2))
      value, metrics = value + gold_weight * nll, metrics | {"gold_nll": nll}
    return value, metrics

  sequences = knobs.sequences(
    "gold",
    beforehand=("teacher", "student"),
    gold=not never(knobs.gold_weight),
  )
  numbers = {
    "skew": knobs.skew,
    "contrast": knobs.contrast,
    "gold_weight": knobs.gold_weight,
  }
  return Method(loss, numbers, sequences=sequences, weights=sequence_weights)


def _pull(logits: Logits, labels: Int[Array, "B C"], *, skew: Any, contrast: Any):
  student, teacher = logits["student"], stop_gradient(logits["teacher"])
  d = skew_forward_kl(teacher, student, alpha=skew)
  metrics = {"divergence": d} | diagnostics(logits, labels)
  return combine((2 - contrast, d)), metrics


def _push(logits: Logits, labels: Int[Array, "B C"], *, skew: Any, contrast: Any):
  log_q, log_p = log_probs(logits["student"]), log_probs(logits["teacher"])
  mixture = jnp.logaddexp(log_p + jnp.log1p(-skew), log_q + jnp.log(skew))
  d = forward_kl(log_q, stop_gradient(mixture))
  return combine((contrast, d)), {"student_divergence": d}


def sequence_weights(mask: Bool[Array, "B L"]) -> Float[Array, "B L"]:
  """1 / (tokens of the row times rows with any), so that long and short weigh alike."""
  tokens = jnp.sum(mask, axis=-1, keepdims=True, dtype=jnp.float32)
  rows = jnp.sum(tokens > 0, dtype=jnp.float32)
  return mask / jnp.maximum(tokens * rows, 1.0)
