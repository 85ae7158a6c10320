"""f-distill: sequence-level f-divergences, on the teacher's text and the student's.

f-Divergence Minimization for Sequence-Level Knowledge Distillation, Wen et al. 2023,
arXiv 2307.15190. y is the teacher's answer, sampled once before training; y' the
student's, sampled at each step. Token means over each:

    forward_kl       KL(p || q) on y
    reverse_kl       KL(q || p) on y'
    jensen_shannon   1/2 KL(p || m) on y + 1/2 KL(q || m) on y'
    total_variation  1/4 sum |q - p| on y and on y': an upper bound of the sequences'

The KLs are exact decompositions of the sequences'. Jensen-Shannon is exact only with
the mixture's true conditional, w p + (1 - w) q where w = p(y_<t) / (p(y_<t) +
q(y_<t)); the paper's formula and code take 1/2, as it says itself. Nothing is
differentiated through the sampling.
"""

import jax
import jax.numpy as jnp

from okd_jax.errors import UserError
from okd_jax.losses import (
  cross_entropy,
  forward_kl,
  log_probs,
  per_token,
  reverse_kl,
  total_variation,
)
from okd_jax.methods.base.knobs import Knob, check_weight
from okd_jax.methods.base.method import (
  Method,
  cut_heads,
  diagnostics,
  gold_nll,
  is_zero,
  stop_gradient,
  token_sums,
)
from okd_jax.methods.base.sequences import make_sequences, never

# Whose text each divergence needs.
_TEXTS = {
  "forward_kl": ("teacher",),
  "reverse_kl": ("student",),
  "jensen_shannon": ("teacher", "student"),
  "total_variation": ("teacher", "student"),
}


def build(
  *, divergence: str, exact_mixture: bool, gold_weight: Knob, **sampling
) -> Method:
  """f-distill by one of four divergences.

  Args:
    divergence: '' is total_variation.
    exact_mixture: the mixture's true conditional in jensen_shannon.
    gold_weight: cross-entropy on gold, on top.
  """
  name = divergence or "total_variation"
  if name not in _TEXTS:
    raise UserError(
      f"method.divergence={name!r}: fdistill takes {', '.join(_TEXTS)}, since only "
      "these are known to decompose over the steps of a sequence"
    )
  check_weight("method.gold_weight", gold_weight)
  texts = _TEXTS[name]

  def loss(models, params, frozen, batch, key, knobs):
    value, metrics = 0.0, {}
    for number, writer in enumerate(texts):
      rows = batch["teacher"] if writer == "teacher" else batch
      outputs = {
        "student": models.student(
          params["student"], rows, jax.random.fold_in(key, number)
        ),
        "teacher": models.teacher(frozen, None, rows),
      }
      labels = {"labels": rows["labels"]}
      if exact_mixture and name == "jensen_shannon":
        labels["share"] = _teacher_share(models, outputs, rows)
      term = _term(name, writer)
      part, metrics = token_sums(models, term, outputs, rows, {}, labels)
      value += part
    metrics |= {"divergence": value}
    if "gold" in batch and not is_zero(knobs["gold_weight"]):
      nll = gold_nll(models, params, batch, jax.random.fold_in(key, 2))
      value, metrics = value + knobs["gold_weight"] * nll, metrics | {"gold_nll": nll}
    return value, metrics

  sequences = make_sequences(
    "student" if "student" in texts else "gold",
    **sampling,
    beforehand=("teacher",) if "teacher" in texts else (),
    gold=not never(gold_weight),
  )
  knobs = {"gold_weight": gold_weight}
  return Method(loss=loss, teacher="frozen", knobs=knobs, sequences=sequences)


def _term(name: str, writer: str):
  """The divergence's token loss on text of this writer."""

  def token_loss(logits, labels):
    student, teacher = logits["student"], stop_gradient(logits["teacher"])
    if name == "forward_kl":
      value = forward_kl(teacher, student)
    elif name == "reverse_kl":
      value = reverse_kl(teacher, student)
    elif name == "total_variation":
      value = 0.5 * total_variation(teacher, student)
    else:
      log_p, log_q = log_probs(teacher), log_probs(student)
      share = labels["share"][..., None] if "share" in labels else 0.5
      log_m = jnp.logaddexp(log_p + jnp.log(share), log_q + jnp.log1p(-share))
      value = 0.5 * forward_kl(log_p if writer == "teacher" else log_q, log_m)
    return value, diagnostics(logits, labels["labels"])

  return token_loss


def _teacher_share(models, outputs, rows):
  """w [B, L]: p(y_<t) / (p(y_<t) + q(y_<t)) over the answer so far, a constant."""

  def gap(logits, labels):
    student, teacher = logits["student"], logits["teacher"]
    return cross_entropy(student, labels) - cross_entropy(teacher, labels)

  gaps = per_token(gap, cut_heads(outputs), rows["labels"], models.chunk)
  gaps = jnp.where(rows["mask"], gaps, 0.0)
  before = jnp.cumsum(gaps, axis=1) - gaps
  # Away from 0 and 1, where a side of the mixture would vanish.
  return jnp.clip(jax.nn.sigmoid(before), 1e-6, 1 - 1e-6)
