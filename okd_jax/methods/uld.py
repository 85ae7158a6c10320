"""`kd` from a teacher with another tokenizer (method.cross_tokenizer=uld).

Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss for LLMs,
Boizard et al. 2024, arXiv 2402.12030:

    CE(y; q) + lambda sum_t sum_i |p_(i)^t - q_(i)^t|

over the first min(T_teacher, T_student) tokens of the answer, each model reading the
text in its own tokens. Both sums are divided by the student's answer tokens.
"""

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Key, Shaped

from okd_jax.data.batch import Batch
from okd_jax.errors import UserError
from okd_jax.losses import Output, align, cross_entropy, entropy, sorted_distance
from okd_jax.methods.base import (
  Knob,
  Logits,
  Loss,
  Method,
  Models,
  Now,
  Params,
  Sequences,
  check_positive,
  check_share,
  check_weight,
  combine,
  stop_gradient,
  token_sums,
)
from okd_jax.methods.base.knobs import ends

_log = logging.getLogger(__name__)


def check(name: str, knobs: Mapping[str, Any], adapter: str) -> None:
  """Raises a UserError that names all that ULD cannot go with."""
  kind = knobs["cross_tokenizer"]
  problems = []
  if kind != "uld":
    problems.append(f"{kind!r} is unknown, use uld or leave it empty")
  if name != "kd":
    problems.append(f"method.name={name} must be kd: any other needs one vocabulary")
  if knobs.get("divergence"):
    problems.append(
      f"method.divergence={knobs['divergence']} must be empty: sorted probabilities "
      "have a distance of their own"
    )
  if knobs.get("top_k"):
    problems.append(f"method.top_k={knobs['top_k']} must be 0")
  if adapter:
    problems.append(
      f"adapter.kind={adapter} must be empty: an adapter learns from the student's "
      "tokens"
    )
  if problems:
    raise UserError(f"method.cross_tokenizer={kind}: {'; '.join(problems)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Knobs:
  """What `kd` reads under method.cross_tokenizer=uld.

  kd_ratio: r.
  temperature: T of both distributions; the distance is multiplied by T^2.
  gold_weight: g.
  """

  kd_ratio: Knob = 1.0
  temperature: Knob = 1.0
  gold_weight: Knob = 0.0

  def __post_init__(self):
    check_share("method.kd_ratio", self.kd_ratio)
    check_positive("method.temperature", self.temperature)
    check_weight("method.gold_weight", self.gold_weight)
    if min(ends(self.kd_ratio)) == 1 and max(ends(self.gold_weight)) == 0:
      _log.warning(
        "method.kd_ratio=1.0 leaves no cross-entropy, and without it nothing says "
        "which token is which; set method.kd_ratio=0.6 (the paper's lambda 1.5)"
      )


def build(knobs: Knobs) -> Method:
  """loss = r ULD(p, q) + (1 - r + g) CE(y; q), over the student's answer tokens.

  ULD says how sure to be, and CE of what. The paper's lambda is r / (1 - r + g): r 0.6
  is its 1.5, r 0.5 or (r 1, g 1) are 1.
  """

  def loss(
    models: Models,
    params: Params,
    frozen: Params,
    batch: Batch,
    key: Key[Array, ""] | None,
    now: Now,
  ) -> Loss:
    outputs, aligned = _outputs(models, params, frozen, batch, key)
    labels = {"labels": batch.labels, "aligned": aligned}
    return token_sums(
      models, _token_loss, outputs, batch, now, labels, one_vocabulary=False
    )

  return Method(loss, dict(vars(knobs)), sequences=Sequences(own_tokens=True))


def _outputs(
  models: Models,
  params: Params,
  frozen: Params,
  batch: Batch,
  key: Key[Array, ""] | None,
) -> tuple[dict[str, Output], Bool[Array, "B L"]]:
  """(outputs, the teacher's at the student's positions, and whether it has one)."""
  theirs = batch.other_tokens
  teacher = models.teacher(frozen, None, theirs)
  index, aligned = align(batch.mask, theirs.mask)
  hidden = jnp.take_along_axis(teacher.hidden, index[..., None], axis=1)
  student = models.student(params["student"], batch, key)
  teacher = teacher.replace(hidden=hidden)
  return {"student": student, "teacher": teacher}, aligned


def _token_loss(
  logits: Logits,
  labels: Mapping[str, Shaped[Array, "B C"]],
  *,
  kd_ratio: Any,
  temperature: Any,
  gold_weight: Any,
):
  student, both = logits["student"], labels["aligned"]
  d = sorted_distance(logits["teacher"], student, temperature)
  d = jnp.where(both, d, 0)  # one answer has ended, and the other is beside anything
  ce = cross_entropy(student, labels["labels"])
  loss = combine((kd_ratio, d), (1 - kd_ratio + gold_weight, ce))
  return loss, {
    "divergence": d,
    "aligned": both.astype(jnp.float32),
    "student_nll": ce,
    "student_entropy": entropy(stop_gradient(student)),
  }
