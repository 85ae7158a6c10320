"""PromptKD: a soft prompt adapts the teacher to the student, on the student's text.

Kim et al. 2024, arXiv 2402.12842; code gmkim-ai/PromptKD. At each step the student
answers; then the module moves, and the student follows the teacher so adapted:

    module   KL(p_ta || q) + c (1 - t/T) KL(p_ta || p)
    student  KL(q || p_ta)

The nearest relative of OKD: on-policy, reverse KL on both sides, and a decaying pull to
the frozen teacher in place of cross-entropy. The authors' 7 vectors start from the
embeddings of "Suppose you are a student." (`adapter.text`); by default ours do not.
"""

import jax

from okd_jax.losses import reverse_kl
from okd_jax.methods.base.knobs import Knob, Linear, check_positive, check_weight
from okd_jax.methods.base.method import (
  Method,
  diagnostics,
  gold_nll,
  is_zero,
  stop_gradient,
  token_sums,
)
from okd_jax.methods.base.sequences import make_sequences, never


def build(
  *, pull_weight: Knob, temperature: Knob, gold_weight: Knob, **sampling
) -> Method:
  """PromptKD.

  Args:
    pull_weight: c; falls to 0 at the last step unless `end.pull_weight` says otherwise.
    temperature: of the KLs between student and adapted teacher.
    gold_weight: cross-entropy on gold for the student, on top.
  """
  if not isinstance(pull_weight, Linear):
    pull_weight = Linear(pull_weight, 0.0)
  check_weight("method.pull_weight", pull_weight)
  check_positive("method.temperature", temperature)
  check_weight("method.gold_weight", gold_weight)

  def token_loss(logits, labels, *, pull_weight, temperature):
    student, teacher = logits["student"], logits["teacher"]
    base = stop_gradient(logits["base"])
    d = reverse_kl(stop_gradient(teacher), student, temperature)
    module_d = reverse_kl(stop_gradient(student), teacher, temperature)
    pull = reverse_kl(base, teacher)
    module_loss = module_d + pull_weight * pull
    metrics = {
      "divergence": d,
      "module_divergence": module_d,
      "module_loss": module_loss,
      "pull": pull,
    }
    return d + module_loss, metrics | diagnostics(logits, labels)

  def loss(models, params, frozen, batch, key, knobs):
    knobs = dict(knobs)
    gold_weight = knobs.pop("gold_weight")
    adapted, base = models.teachers(frozen, params["adapter"], batch)
    outputs = {
      "student": models.student(params["student"], batch, key),
      "teacher": adapted,
      "base": base,
    }
    value, metrics = token_sums(models, token_loss, outputs, batch, knobs)
    if "gold" in batch and not is_zero(gold_weight):
      nll = gold_nll(models, params, batch, jax.random.fold_in(key, 1))
      value, metrics = value + gold_weight * nll, metrics | {"gold_nll": nll}
    return value, metrics

  knobs = {
    "pull_weight": pull_weight,
    "temperature": temperature,
    "gold_weight": gold_weight,
  }
  sequences = make_sequences("student", **sampling, gold=not never(gold_weight))
  return Method(
    loss, "adapted", knobs, (("adapter",), ("student",)), sequences, module="prompt"
  )
