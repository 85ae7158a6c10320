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

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, Shaped

from okd_jax.data.batch import Batch
from okd_jax.errors import UserError
from okd_jax.losses import (
  Output,
  TokenLoss,
  cross_entropy,
  forward_kl,
  log_probs,
  per_token,
  reverse_kl,
  total_variation,
)
from okd_jax.methods.base import (
  Knob,
  Logits,
  Loss,
  Method,
  Models,
  Now,
  Params,
  TextKnobs,
  check_idle,
  check_weight,
  diagnostics,
  gold_nll,
  is_zero,
  stop_gradient,
  token_sums,
)
from okd_jax.methods.base.knobs import never
from okd_jax.methods.base.method import cut_heads

Labels = Mapping[str, Shaped[Array, "B C"]]
# (logits of student and teacher, labels, whose text it is) -> [B, C]
Term = Callable[..., Float[Array, "B C"]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Knobs(TextKnobs):
  """What `fdistill` reads.

  divergence: one of the four above; '' is total_variation.
  exact_mixture: the mixture's true conditional in jensen_shannon.
  gold_weight: cross-entropy on gold, on top.
  """

  divergence: str = ""
  exact_mixture: bool = False
  gold_weight: Knob = 0.0

  def __post_init__(self):
    super().__post_init__()
    if self.name not in _TERMS:
      raise UserError(
        f"method.divergence={self.name!r}: fdistill takes {', '.join(_TERMS)}, since "
        "only these are known to decompose over the steps of a sequence"
      )
    check_weight("method.gold_weight", self.gold_weight)
    if self.name != "jensen_shannon":
      check_idle(self, "method.divergence=jensen_shannon", "exact_mixture")

  @property
  def name(self) -> str:
    return self.divergence or "total_variation"


def build(knobs: Knobs) -> Method:
  """f-distill by one of four divergences."""
  texts, term = _TERMS[knobs.name]

  def loss(
    models: Models,
    params: Params,
    frozen: Params,
    batch: Batch,
    key: Key[Array, ""] | None,
    now: Now,
  ) -> Loss:
    value, metrics = 0.0, {}
    for number, writer in enumerate(texts):
      rows = batch.answers.get(writer, batch)
      own_key = jax.random.fold_in(key, number)
      outputs = {
        "student": models.student(params["student"], rows, own_key),
        "teacher": models.teacher(frozen, None, rows),
      }
      labels = {"labels": rows.labels}
      if knobs.exact_mixture:
        labels["share"] = _teacher_share(models, outputs, rows)
      token_loss = _token_loss(term, writer)
      part, metrics = token_sums(models, token_loss, outputs, rows, {}, labels)
      value += part
    metrics |= {"divergence": value}
    if batch.gold is not None and not is_zero(now["gold_weight"]):
      nll = gold_nll(models, params, batch.gold, jax.random.fold_in(key, 2))
      value, metrics = value + now["gold_weight"] * nll, metrics | {"gold_nll": nll}
    return value, metrics

  sequences = knobs.sequences(
    "student" if "student" in texts else "gold",
    beforehand=("teacher",) if "teacher" in texts else (),
    gold=not never(knobs.gold_weight),
  )
  return Method(loss, {"gold_weight": knobs.gold_weight}, sequences=sequences)


def _token_loss(term: Term, writer: str) -> TokenLoss:
  """A divergence's loss of a token of this writer's text."""

  def token_loss(logits: Logits, labels: Labels):
    student, teacher = logits["student"], stop_gradient(logits["teacher"])
    value = term(student, teacher, labels, writer)
    return value, diagnostics(logits, labels["labels"])

  return token_loss


def _forward_kl(
  student: Float[Array, "B C V"],
  teacher: Float[Array, "B C V"],
  labels: Labels,
  writer: str,
) -> Float[Array, "B C"]:
  return forward_kl(teacher, student)


def _reverse_kl(
  student: Float[Array, "B C V"],
  teacher: Float[Array, "B C V"],
  labels: Labels,
  writer: str,
) -> Float[Array, "B C"]:
  return reverse_kl(teacher, student)


def _total_variation(
  student: Float[Array, "B C V"],
  teacher: Float[Array, "B C V"],
  labels: Labels,
  writer: str,
) -> Float[Array, "B C"]:
  return 0.5 * total_variation(teacher, student)


def _jensen_shannon(
  student: Float[Array, "B C V"],
  teacher: Float[Array, "B C V"],
  labels: Labels,
  writer: str,
) -> Float[Array, "B C"]:
  log_p, log_q = log_probs(teacher), log_probs(student)
  share = labels["share"][..., None] if "share" in labels else 0.5
  log_m = jnp.logaddexp(log_p + jnp.log(share), log_q + jnp.log1p(-share))
  return 0.5 * forward_kl(log_p if writer == "teacher" else log_q, log_m)


# Whose text each divergence needs, and its term on a token of it.
_TERMS: dict[str, tuple[tuple[str, ...], Term]] = {
  "forward_kl": (("teacher",), _forward_kl),
  "reverse_kl": (("student",), _reverse_kl),
  "jensen_shannon": (("teacher", "student"), _jensen_shannon),
  "total_variation": (("teacher", "student"), _total_variation),
}


def _teacher_share(
  models: Models, outputs: Mapping[str, Output], rows: Batch
) -> Float[Array, "B L"]:
  """w: p(y_<t) / (p(y_<t) + q(y_<t)) over the answer so far, a constant."""

  def gap(logits: Logits, labels: Any) -> Float[Array, "B C"]:
    student, teacher = logits["student"], logits["teacher"]
    return cross_entropy(student, labels) - cross_entropy(teacher, labels)

  gaps = per_token(gap, cut_heads(outputs), rows.labels, models.chunk)
  gaps = jnp.where(rows.mask, gaps, 0.0)
  before = jnp.cumsum(gaps, axis=1) - gaps
  # Away from 0 and 1, where a side of the mixture would vanish.
  return jnp.clip(jax.nn.sigmoid(before), 1e-6, 1 - 1e-6)
