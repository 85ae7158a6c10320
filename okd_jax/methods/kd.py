"""Distillation from a frozen teacher on gold text, by any divergence.

Distilling the Knowledge in a Neural Network, Hinton et al. 2015, arXiv 1503.02531.
`kd` takes the divergence as a knob; the others are names that papers use.
"""

import dataclasses
from typing import Any

import jax
from jaxtyping import Array, Key

from okd_jax.data.batch import Batch
from okd_jax.losses import TokenLoss, cross_entropy
from okd_jax.losses.stored import token_distance
from okd_jax.methods.base import (
  Knob,
  Logits,
  Loss,
  Method,
  Models,
  Now,
  Params,
  TargetKnobs,
  check_idle,
  check_least,
  check_share,
  check_weight,
  combine,
  diagnostics,
  gold_nll,
  is_zero,
  stop_gradient,
  token_sums,
  towards_student,
  weigh,
)
from okd_jax.methods.base.divergences import Distance, among_top_k
from okd_jax.methods.base.knobs import never


@dataclasses.dataclass(frozen=True, kw_only=True)
class Knobs(TargetKnobs):
  """What `kd` reads beside `TargetKnobs`.

  divergence: D; '' is the forward KL.
  temperature: T of the divergence, which is multiplied by T^2.
  kd_ratio: r, the share of the divergence.
  gold_weight: g, cross-entropy on gold on top of that share.
  top_k: use the teacher's so many likeliest tokens and one bucket for the rest, as a
    stored teacher would give them; 0 is the whole vocabulary.
  """

  kd_ratio: Knob = 1.0
  gold_weight: Knob = 0.0
  top_k: int = 0

  def __post_init__(self):
    super().__post_init__()
    check_share("method.kd_ratio", self.kd_ratio)
    check_weight("method.gold_weight", self.gold_weight)
    check_least("method.top_k", self.top_k, 0)
    if never(self.kd_ratio):
      check_idle(self, "method.kd_ratio above 0", "student_mix", "top_k")

  @property
  def numbers(self) -> dict[str, Knob]:
    """Those that the loss reads, by key."""
    names = ("kd_ratio", "temperature", "gold_weight")
    return {name: getattr(self, name) for name in names} | dict(self.shape)


def build(knobs: Knobs) -> Method:
  """loss = r D(p, q) + (1 - r + g) CE(y; q), the token mean."""
  distance = knobs.distance()
  if knobs.top_k:
    distance = among_top_k(distance, knobs.top_k)
  token_loss, how = _token_loss(distance), knobs.weighing

  def loss(
    models: Models,
    params: Params,
    frozen: Params,
    batch: Batch,
    key: Key[Array, ""] | None,
    now: Now,
  ) -> Loss:
    outputs = {"student": models.student(params["student"], batch, key)}
    if batch.stored is not None:
      labels = batch.labels, batch.stored
      return token_sums(models, token_loss, outputs, batch, now, labels)
    outputs["teacher"] = models.teacher(frozen, None, batch)
    if how:
      batch = batch.replace(weights=weigh(how, models, outputs, batch.weights))
    if batch.gold is None:
      return token_sums(models, token_loss, outputs, batch, now)
    # Sampled rows, and beside them what their prompts' answers should have been: no
    # cross-entropy on the former.
    no_gold = {**now, "gold_weight": now["kd_ratio"] - 1}
    value, metrics = token_sums(models, token_loss, outputs, batch, no_gold)
    weight = 1 - now["kd_ratio"] + now["gold_weight"]
    if is_zero(weight):
      return value, metrics
    nll = gold_nll(models, params, batch.gold, jax.random.fold_in(key, 1))
    return value + weight * nll, metrics | {"gold_nll": nll}

  # Whoever asks for K of the tokens must find a whole distribution.
  whole = not (knobs.top_k or how)
  return knobs.mixed(Method(loss, knobs.numbers, takes_stored=whole))


def _token_loss(distance: Distance) -> TokenLoss:
  def token_loss(
    logits: Logits,
    labels: Any,
    *,
    kd_ratio: Any,
    gold_weight: Any,
    student_mix: Any = 0.0,
    **rest: Any,
  ):
    student = logits["student"]
    if "teacher" in logits:
      target = stop_gradient(logits["teacher"])
      if not is_zero(student_mix):
        target = towards_student(target, student, student_mix)
      d = distance(target, student, **rest)
      figures = diagnostics(logits, labels)
    else:
      labels, stored = labels
      d, figures = token_distance(distance, student, stored, **rest)
    ce = cross_entropy(student, labels)
    loss = combine((kd_ratio, d), (1 - kd_ratio + gold_weight, ce))
    return loss, figures | {"divergence": d, "student_nll": stop_gradient(ce)}

  return token_loss


# KD by one divergence, under the name it has in the literature.
NAMED = {
  "rkd": "reverse_kl",  # MiniLLM's direction, Gu et al. 2023, arXiv 2306.08543
  "jsd": "jensen_shannon",  # GKD's, Agarwal et al. 2024, arXiv 2306.13649
  "tvd": "total_variation",  # f-distill's, Wen et al. 2023, arXiv 2307.15190
  "akl": "adaptive_kl",  # Wu et al. 2024, arXiv 2404.02657
  "skl": "skew_forward_kl",  # DistiLLM's, Ko et al. 2024, arXiv 2402.03898
  "srkl": "skew_reverse_kl",  # likewise
}


def named(name: str) -> type[Knobs]:
  """The knobs of one of NAMED: those of `kd`, but the divergence is settled."""
  settled = dataclasses.field(default=NAMED[name], init=False)
  fields = [("divergence", str, settled)]
  return dataclasses.make_dataclass(
    f"Knobs_{name}", fields, bases=(Knobs,), frozen=True, kw_only=True
  )
