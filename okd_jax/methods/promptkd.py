"""PromptKD: a soft prompt adapts the teacher to the student, on the student's text.

Kim et al. 2024, arXiv 2402.12842; code gmkim-ai/PromptKD. At each step the student
answers; then the module moves, and the student follows the teacher so adapted:

    module   KL(p_ta || q) + c (1 - t/T) KL(p_ta || p)
    student  KL(q || p_ta)

The nearest relative of OKD: on-policy, reverse KL on both sides, and a decaying pull to
the frozen teacher in place of cross-entropy. The authors' 7 vectors start from the
embeddings of "Suppose you are a student." (`adapter.text`); by default ours do not.
"""

import dataclasses
from typing import Any

import jax
from jaxtyping import Array, Int, Key

from okd_jax.data.batch import Batch
from okd_jax.losses import reverse_kl
from okd_jax.methods.base import (
  Knob,
  Linear,
  Logits,
  Loss,
  Method,
  Models,
  Now,
  Params,
  TextKnobs,
  check_positive,
  check_weight,
  diagnostics,
  gold_nll,
  is_zero,
  stop_gradient,
  token_sums,
)
from okd_jax.methods.base.knobs import never


@dataclasses.dataclass(frozen=True, kw_only=True)
class Knobs(TextKnobs):
  """What `promptkd` reads.

  pull_weight: c; falls to 0 at the last step unless `end.pull_weight` says otherwise.
  temperature: of the KLs between student and adapted teacher.
  gold_weight: cross-entropy on gold for the student, on top.
  """

  pull_weight: Knob = 1.0
  temperature: Knob = 1.0
  gold_weight: Knob = 0.0

  def __post_init__(self):
    super().__post_init__()
    if not isinstance(self.pull_weight, Linear):
      object.__setattr__(self, "pull_weight", Linear(self.pull_weight, 0.0))
    check_weight("method.pull_weight", self.pull_weight)
    check_positive("method.temperature", self.temperature)
    check_weight("method.gold_weight", self.gold_weight)


def build(knobs: Knobs) -> Method:
  """The sum of both losses, in two passes; each moves its own parameters."""

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
    adapted, base = models.both(frozen, params["adapter"], batch)
    outputs = {
      "student": models.student(params["student"], batch, key),
      "teacher": adapted,
      "base": base,
    }
    value, metrics = token_sums(models, _token_loss, outputs, batch, now)
    if batch.gold is not None and not is_zero(gold_weight):
      nll = gold_nll(models, params, batch.gold, jax.random.fold_in(key, 1))
      value, metrics = value + gold_weight * nll, metrics | {"gold_nll": nll}
    return value, metrics

  numbers = {
    "pull_weight": knobs.pull_weight,
    "temperature": knobs.temperature,
    "gold_weight": knobs.gold_weight,
  }
  return Method(
    loss,
    numbers,
    adapts=True,
    adapter="prompt",
    updates=(("adapter",), ("student",)),
    sequences=knobs.sequences("student", gold=not never(knobs.gold_weight)),
  )


def _token_loss(
  logits: Logits, labels: Int[Array, "B C"], *, pull_weight: Any, temperature: Any
):
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
