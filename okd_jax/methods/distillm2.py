"""DistiLLM-2: the teacher's answers pull, the student's own push back.

Contrastive approach, Ko et al. 2025, arXiv 2503.07067; code jongwooko/distillm-2. Per
prompt a fixed pair, y_t by the teacher and y_s by the student, both sampled before
training:

    (2 - b) KL(p || a p + (1 - a) q) on y_t  +  b KL(q || (1 - a) p + a q) on y_s

each averaged over a sequence's tokens first and then over sequences, the student in
the second mixture being a constant (unlike in DistiLLM). Cross-entropy on gold and an
online module's loss are averaged in the same way here, not over all tokens. Its
curricula for a and b are off in the release: b may move (`end.contrast`), the one for a
is not here.
"""

import jax
import jax.numpy as jnp

from okd_jax.errors import UserError
from okd_jax.losses import forward_kl, log_probs, skew_forward_kl
from okd_jax.methods.base.knobs import Knob, check_weight, ends
from okd_jax.methods.base.method import (
  Method,
  combine,
  diagnostics,
  gold_nll,
  is_zero,
  stop_gradient,
  token_sums,
)
from okd_jax.methods.base.sequences import make_sequences, never


def build(*, skew: Knob, contrast: Knob, gold_weight: Knob, **sampling) -> Method:
  """DistiLLM-2.

  Args:
    skew: a.
    contrast: b, from 0 (the teacher's text alone) to 2 (the student's alone).
    gold_weight: cross-entropy on gold, on top.
    sampling: left open, temperature 0.8 and top_p 0.95 for both writers.
  """
  if not all(0 < value < 1 for value in ends(skew)):
    raise UserError(f"method.skew={skew} must lie between 0 and 1")
  if not all(0 <= value <= 2 for value in ends(contrast)):
    raise UserError(f"method.contrast={contrast} must lie between 0 and 2")
  check_weight("method.gold_weight", gold_weight)

  def pull(logits, labels, *, skew, contrast):
    student, teacher = logits["student"], stop_gradient(logits["teacher"])
    d = skew_forward_kl(teacher, student, alpha=skew)
    metrics = {"divergence": d} | diagnostics(logits, labels)
    return combine((2 - contrast, d)), metrics

  def push(logits, labels, *, skew, contrast):
    log_q, log_p = log_probs(logits["student"]), log_probs(logits["teacher"])
    mixture = jnp.logaddexp(log_p + jnp.log1p(-skew), log_q + jnp.log(skew))
    d = forward_kl(log_q, stop_gradient(mixture))
    return combine((contrast, d)), {"student_divergence": d}

  def loss(models, params, frozen, batch, key, knobs):
    knobs = dict(knobs)
    gold_weight = knobs.pop("gold_weight")
    value, metrics = 0.0, {}
    for number, (writer, term) in enumerate((("teacher", pull), ("student", push))):
      rows = batch[writer]
      outputs = {
        "student": models.student(
          params["student"], rows, jax.random.fold_in(key, number)
        ),
        "teacher": models.teacher(frozen, None, rows),
      }
      part, more = token_sums(models, term, outputs, rows, knobs)
      value, metrics = value + part, metrics | more
    if "gold" in batch and not is_zero(gold_weight):
      nll = gold_nll(models, params, batch, jax.random.fold_in(key, 2))
      value, metrics = value + gold_weight * nll, metrics | {"gold_nll": nll}
    return value, metrics

  sequences = make_sequences(
    "gold",
    **sampling,
    defaults=(1.0, 0.8, 0.95),
    beforehand=("teacher", "student"),
    gold=not never(gold_weight),
  )
  knobs = {"skew": skew, "contrast": contrast, "gold_weight": gold_weight}
  return Method(loss, "frozen", knobs, sequences=sequences, weights=sequence_weights)


def sequence_weights(mask):
  """1 / (tokens of the row times rows with any), so that long and short weigh alike."""
  tokens = jnp.sum(mask, axis=-1, keepdims=True, dtype=jnp.float32)
  rows = jnp.sum(tokens > 0, dtype=jnp.float32)
  return mask / jnp.maximum(tokens * rows, 1.0)
