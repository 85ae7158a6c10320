"""Online Knowledge Distillation: a teacher whose small modules learn with the student.

Exploring and Enhancing the Transfer of Distribution in Knowledge Distillation for
Autoregressive Language Models, Rao et al. 2024, arXiv 2409.12512.

Per step and token, with p the frozen teacher, p_ta the adapted one, q the student, y
the gold token:

    student  L_s = w KL(p_ta || q) + (1 - w + g) CE(y; q)       Eq. 17: w = 1, g = 0
    module   L_t = alpha KL(q || p_ta) + (1 - alpha) CE(y; p_ta)             Eq. 16
                   + gamma KL(p || p_ta)                               not the paper's

Each loss moves its own parameters only; nothing is sampled. The paper's L_KL(a, b)
is KL(b || a): its first argument is the one that is fitted. The anchor, weighed by
gamma, is our addition: nothing else in L_t remembers the base teacher, so that at
alpha = 1 every student is a fixed point and the adapted teacher collapses.

Cheaper, and not the paper's either: L_t is the mean over some of the rows alone
(`Models.one_row_in`). Which rows they are is chance, so its gradient is unbiased, and
only they are read with what the teacher's backward pass needs.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from okd_jax.data.batch import Batch, first_rows, other_rows
from okd_jax.losses import Output, Part, TokenLoss, cross_entropy
from okd_jax.methods import online_module
from okd_jax.methods.base import (
  Knob,
  Logits,
  Loss,
  Method,
  Models,
  Now,
  Params,
  TargetKnobs,
  TokenWeight,
  between_teachers,
  check_choice,
  check_idle,
  check_share,
  check_weight,
  combine,
  cut_heads,
  diagnostics,
  is_zero,
  stop_gradient,
  sums_of_rows,
  towards_student,
  weigh,
)
from okd_jax.methods.base.knobs import ends, never

UPDATES = {
  # Algorithm 1: both distributions are computed once, then both trees move.
  "simultaneous": (("student", "adapter"),),
  # The module moves first and the student is pulled to the updated teacher, as in
  # PromptKD (Kim et al. 2024, arXiv 2402.12842). Costs two passes.
  "sequential": (("adapter",), ("student",)),
}
# Numbers of the student's loss alone.
_STUDENTS = ("student_kl_weight", "gold_weight", "target_mix", "student_mix")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Knobs(online_module.Knobs, TargetKnobs):
  """What `okd` reads beside `TargetKnobs`.

  divergence: the student's, from the adapted teacher (target) to the student.
  student_kl_weight: w, the rest is cross-entropy on gold (the paper's Figure 9).
  gold_weight: g, cross-entropy on gold for the student, on top of 1 - w.
  target_mix: the adapted teacher's share in what the student learns from, the rest is
    the frozen one's; below 1 it needs the frozen teacher's logits in every row.
  target_kind: 'arithmetic', a mixture of probabilities, or 'geometric'.
  update_order: 'simultaneous' or 'sequential'.
  """

  student_kl_weight: Knob = 1.0
  gold_weight: Knob = 0.0
  target_mix: Knob = 1.0
  target_kind: str = "arithmetic"
  update_order: str = "simultaneous"

  def __post_init__(self):
    super().__post_init__()
    check_share("method.student_kl_weight", self.student_kl_weight)
    check_weight("method.gold_weight", self.gold_weight)
    check_choice("method.update_order", self.update_order, UPDATES)
    check_share("method.target_mix", self.target_mix)
    check_choice("method.target_kind", self.target_kind, ("arithmetic", "geometric"))
    if not self.mixes_teachers:
      check_idle(self, "method.target_mix below 1", "target_kind")
    if never(self.student_kl_weight):
      needed = "method.student_kl_weight above 0"
      check_idle(self, needed, "target_mix", "student_mix")

  @property
  def mixes_teachers(self) -> bool:
    """Whether the student also learns from the frozen teacher."""
    return min(ends(self.target_mix)) < 1

  @property
  def numbers(self) -> dict[str, Knob]:
    """Those that both losses read, by key, but for what is carried."""
    names = ["student_kl_weight", "gold_weight"]
    names += ["target_mix"] if self.mixes_teachers else []
    return {name: getattr(self, name) for name in names} | self.module_numbers()


def build(knobs: Knobs) -> Method:
  """The sum of both losses; one gradient of it is both separate gradients."""
  losses = _student_loss(knobs), online_module.build_loss(knobs)

  def loss(
    models: Models,
    params: Params,
    frozen: Params,
    batch: Batch,
    key: Key[Array, ""] | None,
    now: Now,
  ) -> Loss:
    """(sum in nats, {figure: its sum}) of a batch [B, L] and its weights."""
    student = models.student(params["student"], batch, key)
    [name] = models.teachers

    def outputs(params: Params, rows: Batch, base: bool) -> dict[str, Output]:
      base = base or knobs.mixes_teachers
      return online_module.adapted_outputs(models, name, params, frozen, rows, base)

    def taught(rows: Batch) -> dict[str, Output]:
      return outputs(params, rows, knobs.anchored)

    def pulled(rows: Batch) -> dict[str, Output]:
      return outputs({"adapter": stop_gradient(params["adapter"])}, rows, False)

    how = knobs.weighing
    return _by_rows(models, losses, how, student, taught, pulled, batch, now)

  method = Method(
    loss,
    knobs.numbers,
    adapts=True,
    updates=UPDATES[knobs.update_order],
    takes_rows=True,
  )
  return knobs.mixed(knobs.held(method))


def _student_loss(knobs: Knobs) -> TokenLoss:
  """L_s, what moves the student."""
  distance = knobs.distance()

  def student_loss(
    logits: Logits,
    labels: Int[Array, "B C"],
    *,
    student_kl_weight: Any,
    gold_weight: Any,
    target_mix: Any = 1.0,
    student_mix: Any = 0.0,
    **rest: Any,
  ):
    """(loss [B, C] in nats, {figure: [B, C]}): arXiv 2409.12512, Eq. 17."""
    student, target = logits["student"], stop_gradient(logits["teacher"])
    if knobs.mixes_teachers:
      base = stop_gradient(logits["base"])
      target = between_teachers(
        target, base, target_mix, knobs.target_kind, rest["temperature"]
      )
    if not is_zero(student_mix):
      target = towards_student(target, student, student_mix)
    d = distance(target, student, **rest)
    loss = combine(
      (student_kl_weight, d),
      (1 - student_kl_weight + gold_weight, cross_entropy(student, labels)),
    )
    metrics = {"divergence": d, "student_loss": loss}
    return loss, metrics | diagnostics(logits, labels)

  return student_loss


def _with_module(student_loss: TokenLoss, module_loss: TokenLoss) -> TokenLoss:
  """The sum of both; labels may be (labels, each loss's weight of each position)."""

  def token_loss(logits: Logits, labels: Any, **knobs: Any):
    """(loss [B, C] in nats, {figure: [B, C]}) of logits [B, C, V] by model."""
    labels, *weights = labels if isinstance(labels, tuple) else (labels,)
    mine = {k: v for k, v in knobs.items() if k not in _STUDENTS}
    found = student_loss(logits, labels, **knobs), module_loss(logits, labels, **mine)
    if weights:
      found = [_times(w, each) for w, each in zip(weights, found, strict=True)]
    (loss, metrics), (module, more) = found
    return loss + module, more | metrics

  return token_loss


def _times(
  weight: Float[Array, "B C"], found: tuple[Array, dict[str, Array]]
) -> tuple[Array, dict[str, Array]]:
  loss, metrics = found
  return weight * loss, {name: weight * value for name, value in metrics.items()}


def _by_rows(
  models: Models,
  losses: tuple[TokenLoss, TokenLoss],
  token_weight: TokenWeight | None,
  student: Output,
  taught: Callable[[Batch], dict[str, Output]],
  pulled: Callable[[Batch], dict[str, Output]],
  batch: Batch,
  now: Now,
) -> Loss:
  """The student's loss over all rows, the module's over those that teach it.

  losses: the student's and the module's.
  token_weight: what a token weighs in the student's.
  taught, pulled: the teacher's outputs, with and without a gradient for its module.
  """
  every = models.one_row_in
  if every < 2:
    teacher = pulled(batch) if every == 0 else taught(batch)
    module = batch.weights if every else None
    parts = [_part(models, losses, token_weight, student, teacher, batch, module)]
    return sums_of_rows(models, parts, now)
  first, others = first_rows(batch, every), other_rows(batch, every)
  own, theirs = (rows(student.hidden, every) for rows in (first_rows, other_rows))
  common = models, losses, token_weight
  own, theirs = (student.replace(hidden=each) for each in (own, theirs))
  parts = [
    _part(*common, own, taught(first), first, first.module_weights),
    _part(*common, theirs, pulled(others), others, None),
  ]
  return sums_of_rows(models, parts, now)


def _part(
  models: Models,
  losses: tuple[TokenLoss, TokenLoss],
  token_weight: TokenWeight | None,
  student: Output,
  teacher: dict[str, Output],
  rows: Batch,
  module_weights: Float[Array, "B L"] | None,
) -> Part:
  """Some rows with their losses: the student's and, with weights for it, the module's.

  Where both weigh alike there is one weight; else the sum's is the larger one, and the
  labels bring along each loss's share of it.
  """
  outputs = {"student": student} | teacher
  heads = cut_heads(outputs, models.vocab_size)
  weights, student_loss = rows.weights, losses[0]
  if token_weight:
    target = {name: outputs[name] for name in ("student", "teacher")}
    weights = weigh(token_weight, models, target, weights)
  if module_weights is None:
    return Part(student_loss, heads, rows.labels, weights)
  both = _with_module(*losses)
  if models.module_tokens:
    module_weights = weigh(models.module_tokens, models, outputs, module_weights)
  if module_weights is weights:
    return Part(both, heads, rows.labels, weights)
  larger = jnp.maximum(weights, module_weights)
  shares = (w / jnp.where(larger > 0, larger, 1.0) for w in (weights, module_weights))
  return Part(both, heads, (rows.labels, *shares), larger)
