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
import logging
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from okd_jax.data.batch import Batch, first_rows, other_rows
from okd_jax.losses import Output, Part, TokenLoss, cross_entropy, forward_kl
from okd_jax.methods.base import (
  DivergenceKnobs,
  Knob,
  Logits,
  Loss,
  Method,
  Models,
  Now,
  Params,
  check_choice,
  check_share,
  check_weight,
  combine,
  cut_heads,
  diagnostics,
  stop_gradient,
  sums_of_rows,
)
from okd_jax.methods.base.divergences import ShapedKnobs, bind
from okd_jax.methods.base.knobs import ends, never

_log = logging.getLogger(__name__)

UPDATES = {
  # Algorithm 1: both distributions are computed once, then both trees move.
  "simultaneous": (("student", "adapter"),),
  # The module moves first and the student is pulled to the updated teacher, as in
  # PromptKD (Kim et al. 2024, arXiv 2402.12842). Costs two passes.
  "sequential": (("adapter",), ("student",)),
}
_STUDENTS = ("student_kl_weight", "gold_weight")  # numbers of the student's loss alone
# Above this share of the student's pull the adapted teacher follows the student away
# from what it knew (drift .15 at .5, .46 at .75, 2.95 at 1: BUILD_NOTES.md).
_UNSAFE_ALPHA = 0.75


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModuleKnobs(ShapedKnobs):
  """What the loss of an adapter reads, whatever the student's own loss is.

  teacher_divergence: from the student (target) to the adapted teacher, so that
    'forward_kl' is the paper's KL(q || p_ta).
  teacher_kl_weight: alpha; above 0.75 without an anchor it warns.
  anchor_weight: gamma; above 0 it needs the frozen teacher's logits as well.
  temperature: of the divergence, which is multiplied by T^2; the anchor's is 1.
  """

  teacher_divergence: str = "forward_kl"
  teacher_kl_weight: Knob = 0.25
  anchor_weight: Knob = 0.0

  def __post_init__(self):
    super().__post_init__()
    check_share("method.teacher_kl_weight", self.teacher_kl_weight)
    check_weight("method.anchor_weight", self.anchor_weight)
    pulls = ends(self.teacher_kl_weight), ends(self.anchor_weight)
    if any(a > _UNSAFE_ALPHA and not g for a, g in zip(*pulls, strict=True)):
      _log.warning(
        "method.teacher_kl_weight above %s lets the adapted teacher collapse onto the "
        "student; set method.anchor_weight (0.3 is a good start)",
        _UNSAFE_ALPHA,
      )

  def named_divergences(self) -> dict[str, str]:
    own = {"method.teacher_divergence": self.teacher_divergence}
    return super().named_divergences() | own

  def module_numbers(self) -> dict[str, Knob]:
    """The numbers that the adapter's loss reads, by key."""
    return {
      "teacher_kl_weight": self.teacher_kl_weight,
      "anchor_weight": self.anchor_weight,
      "temperature": self.temperature,
    } | self.shape


@dataclasses.dataclass(frozen=True, kw_only=True)
class Knobs(ModuleKnobs, DivergenceKnobs):
  """What `okd` reads.

  divergence: the student's, from the adapted teacher (target) to the student.
  student_kl_weight: w, the rest is cross-entropy on gold (the paper's Figure 9).
  gold_weight: g, cross-entropy on gold for the student, on top of 1 - w.
  update_order: 'simultaneous' or 'sequential'.
  """

  student_kl_weight: Knob = 1.0
  gold_weight: Knob = 0.0
  update_order: str = "simultaneous"

  def __post_init__(self):
    super().__post_init__()
    check_share("method.student_kl_weight", self.student_kl_weight)
    check_weight("method.gold_weight", self.gold_weight)
    check_choice("method.update_order", self.update_order, UPDATES)


def build(knobs: Knobs) -> Method:
  """The sum of both losses; one gradient of it is both separate gradients."""
  student_distance, module_loss = knobs.distance(), build_module_loss(knobs)

  def student_loss(
    logits: Logits,
    labels: Int[Array, "B C"],
    *,
    student_kl_weight: Any,
    gold_weight: Any,
    **rest: Any,
  ):
    student, teacher = logits["student"], logits["teacher"]
    d = student_distance(stop_gradient(teacher), student, **rest)
    loss = combine(
      (student_kl_weight, d),
      (1 - student_kl_weight + gold_weight, cross_entropy(student, labels)),
    )
    metrics = {"divergence": d, "student_loss": loss}
    return loss, metrics | diagnostics(logits, labels)

  def loss(
    models: Models,
    params: Params,
    frozen: Params,
    batch: Batch,
    key: Key[Array, ""] | None,
    now: Now,
  ) -> Loss:
    student = models.student(params["student"], batch, key)
    [name] = models.teachers

    def taught(rows: Batch) -> dict[str, Output]:
      return adapted_outputs(models, name, params, frozen, rows, knobs.anchor_weight)

    def pulled(rows: Batch) -> dict[str, Output]:
      held = stop_gradient(params["adapter"])
      return {"teacher": models.teacher(frozen, held, rows)}

    losses = (student_loss, module_loss)
    return _by_rows(models, losses, student, taught, pulled, batch, now)

  numbers = {
    "student_kl_weight": knobs.student_kl_weight,
    "gold_weight": knobs.gold_weight,
  }
  return Method(
    loss,
    numbers | knobs.module_numbers(),
    adapts=True,
    updates=UPDATES[knobs.update_order],
    takes_rows=True,
  )


def _with_module(student_loss: TokenLoss, module_loss: TokenLoss) -> TokenLoss:
  """The sum of both; labels may be (labels, the module's weight of each position)."""

  def token_loss(logits: Logits, labels: Any, **knobs: Any):
    labels, weight = labels if isinstance(labels, tuple) else (labels, None)
    loss, metrics = student_loss(logits, labels, **knobs)
    mine = {k: v for k, v in knobs.items() if k not in _STUDENTS}
    module, more = module_loss(logits, labels, **mine)
    if weight is not None:
      module, more = weight * module, {k: weight * v for k, v in more.items()}
    return loss + module, more | metrics

  return token_loss


def _by_rows(
  models: Models,
  losses: tuple[TokenLoss, TokenLoss],
  student: Output,
  taught: Callable[[Batch], dict[str, Output]],
  pulled: Callable[[Batch], dict[str, Output]],
  batch: Batch,
  now: Now,
) -> Loss:
  """The student's loss over all rows, the module's over those that teach it.

  losses: the student's and the module's.
  taught, pulled: the teacher's outputs, with and without a gradient for its module.
  """
  student_loss, every = losses[0], models.one_row_in

  def part(
    loss: TokenLoss, hidden: Array, teacher: dict[str, Output], rows: Batch, facts: Any
  ) -> Part:
    outputs = {"student": student._replace(hidden=hidden)} | teacher
    return Part(loss, cut_heads(outputs, models.vocab_size), facts, rows.weights)

  if every == 0:
    parts = [part(student_loss, student.hidden, pulled(batch), batch, batch.labels)]
    return sums_of_rows(models, parts, now)
  both = _with_module(*losses)
  if every == 1:
    parts = [part(both, student.hidden, taught(batch), batch, batch.labels)]
    return sums_of_rows(models, parts, now)
  first, others = first_rows(batch, every), other_rows(batch, every)
  # The module's mean is over its own rows: its weights, relative to the student's.
  weight = first.module_weights / jnp.where(first.weights > 0, first.weights, 1.0)
  own, theirs = (rows(student.hidden, every) for rows in (first_rows, other_rows))
  parts = [
    part(both, own, taught(first), first, (first.labels, weight)),
    part(student_loss, theirs, pulled(others), others, others.labels),
  ]
  return sums_of_rows(models, parts, now)


def build_module_loss(knobs: ModuleKnobs) -> TokenLoss:
  """L_t, what moves an adapter.

  It reads logits 'student', 'teacher' (adapted) and, with an anchor, 'base'.
  """
  distance = bind(knobs.teacher_divergence)
  anchored = not never(knobs.anchor_weight)

  def module_loss(
    logits: Logits,
    labels: Int[Array, "B C"],
    *,
    teacher_kl_weight: Any,
    anchor_weight: Any,
    **rest: Any,
  ):
    teacher = logits["teacher"]
    d = distance(stop_gradient(logits["student"]), teacher, **rest)
    terms = [
      (teacher_kl_weight, d),
      (1 - teacher_kl_weight, cross_entropy(teacher, labels)),
    ]
    metrics = {"module_divergence": d}
    if anchored:
      metrics["drift"] = forward_kl(stop_gradient(logits["base"]), teacher)
      terms.append((anchor_weight, metrics["drift"]))
    loss = combine(*terms)
    return loss, metrics | {"module_loss": loss}

  return module_loss


def adapted_outputs(
  models: Models,
  name: str,
  params: Params,
  frozen: Params,
  batch: Batch,
  anchor_weight: Knob,
) -> dict[str, Output]:
  """{'teacher': this one, adapted; with an anchor also 'base': the frozen one}."""
  teacher, adapter = models.teachers[name], params["adapter"][name]
  if never(anchor_weight):
    return {"teacher": teacher.apply(frozen[name], adapter, batch)}
  adapted, base = teacher.both(frozen[name], adapter, batch)
  return {"teacher": adapted, "base": base}
