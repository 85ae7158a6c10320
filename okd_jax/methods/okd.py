"""Online Knowledge Distillation: a teacher whose small modules learn with the student.

Exploring and Enhancing the Transfer of Distribution in Knowledge Distillation for
Autoregressive Language Models, Rao et al. 2024, arXiv 2409.12512.

Per step and token, with p_ta the adapted teacher, q the student, y the gold token:

    student  L_s = w KL(p_ta || q)                              Eq. 17 (there w = 1)
    module   L_t = alpha KL(q || p_ta) + (1 - alpha) CE(y; p_ta)          Eq. 16

Each loss moves its own parameters only; nothing is sampled. The paper's L_KL(a, b)
is KL(b || a): its first argument is the one that is fitted.
"""

from okd_jax.errors import UserError
from okd_jax.losses import cross_entropy
from okd_jax.methods.method import (
  Method,
  check_share,
  check_temperature,
  diagnostics,
  find_divergence,
  stop_gradient,
  token_sums,
)

UPDATES = {
  # Algorithm 1: both distributions are computed once, then both trees move.
  "simultaneous": (("student", "adapter"),),
  # The module moves first and the student is pulled to the updated teacher, as in
  # PromptKD (Kim et al. 2024, arXiv 2402.12842). Costs two passes.
  "sequential": (("adapter",), ("student",)),
}


def build(
  *,
  divergence: str,
  teacher_divergence: str,
  teacher_kl_weight: float,
  student_kl_weight: float,
  temperature: float,
  beta: float,
  update: str,
) -> Method:
  """The sum of both losses; one gradient of it is both separate gradients.

  Args:
    divergence: the student's, from the adapted teacher (target) to the student.
    teacher_divergence: the module's, from the student (target) to the adapted
      teacher, so that 'forward_kl' is the paper's KL(q || p_ta).
    teacher_kl_weight: alpha. Nothing in L_t remembers the base teacher, so values
      above 0.75 let the adapted teacher drift away with the student (METHODS: at 1
      it collapsed in every run).
    student_kl_weight: w, the rest is cross-entropy on gold (the paper's Figure 9).
    temperature: of both divergences, each times T^2.
    beta: of either divergence where it is jensen_shannon.
    update: 'simultaneous' or 'sequential'.
  """
  check_share("method.teacher_kl_weight", teacher_kl_weight)
  check_share("method.student_kl_weight", student_kl_weight)
  check_temperature(temperature)
  if update not in UPDATES:
    raise UserError(f"method.update={update!r} must be one of {', '.join(UPDATES)}")
  student_distance = find_divergence("method.divergence", divergence, temperature, beta)
  module_distance = find_divergence(
    "method.teacher_divergence", teacher_divergence, temperature, beta
  )

  def token_loss(logits, labels):
    student, teacher = logits["student"], logits["teacher"]
    student_d = student_distance(stop_gradient(teacher), student)
    student_ce = cross_entropy(student, labels)
    module_d = module_distance(stop_gradient(student), teacher)
    module_ce = cross_entropy(teacher, labels)
    student_loss = _mix(student_kl_weight, student_d, student_ce)
    module_loss = _mix(teacher_kl_weight, module_d, module_ce)
    metrics = {
      "divergence": student_d,
      "student_loss": student_loss,
      "module_divergence": module_d,
      "module_loss": module_loss,
    }
    metrics |= diagnostics(logits, labels, student_ce)
    return student_loss + module_loss, metrics

  def loss(models, params, frozen, batch, key):
    outputs = {
      "student": models.student(params["student"], batch, key),
      "teacher": models.teacher(frozen, params["adapter"], batch),
    }
    return token_sums(models, token_loss, outputs, batch)

  return Method(loss=loss, teacher="adapted", updates=UPDATES[update])


def _mix(weight: float, distance, ce):
  """weight * distance + (1 - weight) * ce, leaving out a term of weight 0."""
  if weight in (0, 1):
    return distance if weight else ce
  return weight * distance + (1 - weight) * ce
