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
"""

import logging

from okd_jax.errors import UserError
from okd_jax.losses import cross_entropy, forward_kl
from okd_jax.methods.base.knobs import (
  Knob,
  check_positive,
  check_share,
  check_weight,
  ends,
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
from okd_jax.methods.base.sequences import never

_log = logging.getLogger(__name__)

UPDATES = {
  # Algorithm 1: both distributions are computed once, then both trees move.
  "simultaneous": (("student", "adapter"),),
  # The module moves first and the student is pulled to the updated teacher, as in
  # PromptKD (Kim et al. 2024, arXiv 2402.12842). Costs two passes.
  "sequential": (("adapter",), ("student",)),
}
# Above this share of the student's pull the adapted teacher follows the student away
# from what it knew (drift .15 at .5, .46 at .75, 2.95 at 1: BUILD_NOTES.md).
_UNSAFE_ALPHA = 0.75


def build(
  *,
  divergence: str,
  teacher_divergence: str,
  teacher_kl_weight: Knob,
  student_kl_weight: Knob,
  anchor_weight: Knob,
  gold_weight: Knob,
  temperature: Knob,
  update_order: str,
  **shape: Knob,
) -> Method:
  """The sum of both losses; one gradient of it is both separate gradients.

  Args:
    divergence: the student's, from the adapted teacher (target) to the student.
    teacher_divergence: the module's, from the student (target) to the adapted
      teacher, so that 'forward_kl' is the paper's KL(q || p_ta).
    teacher_kl_weight: alpha; above 0.75 without an anchor it warns.
    student_kl_weight: w, the rest is cross-entropy on gold (the paper's Figure 9).
    anchor_weight: gamma; above 0 it needs the frozen teacher's logits as well.
    gold_weight: g, cross-entropy on gold for the student, on top of 1 - w.
    temperature: of both divergences, each times T^2; the anchor's is 1.
    update_order: 'simultaneous' or 'sequential'.
    shape: the knobs of either divergence.
  """
  check_share("method.student_kl_weight", student_kl_weight)
  check_weight("method.gold_weight", gold_weight)
  if update_order not in UPDATES:
    raise UserError(
      f"method.update_order={update_order!r} must be one of {', '.join(UPDATES)}"
    )
  divergence = divergence or "forward_kl"
  student_distance = find_divergence("method.divergence", divergence, shape)
  module_loss, module_knobs = build_module_loss(
    teacher_divergence=teacher_divergence,
    teacher_kl_weight=teacher_kl_weight,
    anchor_weight=anchor_weight,
    temperature=temperature,
    **shape,
  )

  def token_loss(logits, labels, *, student_kl_weight, gold_weight, **knobs):
    student, teacher = logits["student"], logits["teacher"]
    d = student_distance(stop_gradient(teacher), student, **knobs)
    loss = combine(
      (student_kl_weight, d),
      (1 - student_kl_weight + gold_weight, cross_entropy(student, labels)),
    )
    module, metrics = module_loss(logits, labels, **knobs)
    metrics |= {"divergence": d, "student_loss": loss}
    return loss + module, metrics | diagnostics(logits, labels)

  def loss(models, params, frozen, batch, key, knobs):
    outputs = {"student": models.student(params["student"], batch, key)}
    outputs |= teacher_outputs(models, params, frozen, batch, anchor_weight)
    return token_sums(models, token_loss, outputs, batch, knobs)

  knobs = {"student_kl_weight": student_kl_weight, "gold_weight": gold_weight}
  knobs |= module_knobs | own_shape(shape, divergence)
  return Method(loss, "adapted", knobs, UPDATES[update_order])


def build_module_loss(
  *,
  teacher_divergence: str,
  teacher_kl_weight: Knob,
  anchor_weight: Knob,
  temperature: Knob,
  **shape: Knob,
):
  """(L_t, its knobs): what moves the module, whatever the student's own loss is.

  L_t reads logits 'student', 'teacher' (adapted) and, with an anchor, 'base'.
  """
  check_share("method.teacher_kl_weight", teacher_kl_weight)
  check_weight("method.anchor_weight", anchor_weight)
  check_positive("method.temperature", temperature)
  distance = find_divergence("method.teacher_divergence", teacher_divergence, shape)
  anchored = not never(anchor_weight)
  unsafe = [
    alpha > _UNSAFE_ALPHA and not anchor
    for alpha, anchor in zip(ends(teacher_kl_weight), ends(anchor_weight), strict=True)
  ]
  if any(unsafe):
    _log.warning(
      "method.teacher_kl_weight above %s lets the adapted teacher collapse onto the "
      "student; set method.anchor_weight (0.3 is a good start)",
      _UNSAFE_ALPHA,
    )

  def module_loss(logits, labels, *, teacher_kl_weight, anchor_weight, **knobs):
    teacher = logits["teacher"]
    d = distance(stop_gradient(logits["student"]), teacher, **knobs)
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

  knobs = {
    "teacher_kl_weight": teacher_kl_weight,
    "anchor_weight": anchor_weight,
    "temperature": temperature,
  }
  return module_loss, knobs | own_shape(shape, teacher_divergence)


def teacher_outputs(models, params, frozen, batch, anchor_weight: Knob):
  """{'teacher': the adapted one's, with an anchor also 'base': the frozen one's}."""
  adapter = params["adapter"]
  if never(anchor_weight):
    return {"teacher": models.teacher(frozen, adapter, batch)}
  adapted, base = models.teachers(frozen, adapter, batch)
  return {"teacher": adapted, "base": base}
