"""What an online module learns: the loss of a teacher's adapter, whatever its method.

Per token, with p the frozen teacher, p_ta the adapted one, q the student, y the gold
token (arXiv 2409.12512, Eq. 16; the anchor, weighed by gamma, is ours):

    L_t = alpha KL(q || p_ta) + (1 - alpha) CE(y; p_ta) + gamma KL(p || p_ta)

Nothing but the anchor remembers the base teacher, so that at alpha = 1 every student is
a fixed point and the adapted teacher collapses.
"""

import dataclasses
import logging
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from okd_jax.data.batch import Batch
from okd_jax.errors import UserError
from okd_jax.losses import Output, TokenLoss, cross_entropy, forward_kl
from okd_jax.methods.base import (
  Knob,
  Linear,
  Logits,
  Method,
  Models,
  Now,
  Params,
  check_share,
  check_weight,
  combine,
  stop_gradient,
)
from okd_jax.methods.base.divergences import ShapedKnobs, bind
from okd_jax.methods.base.knobs import ends, never

_log = logging.getLogger(__name__)

# Above this share of the student's pull the adapted teacher follows the student away
# from what it knew (drift .15 at .5, .46 at .75, 2.95 at 1: BUILD_NOTES.md).
_UNSAFE_ALPHA = 0.75
# Of an anchor that is moved: where it starts, its rate and its bounds.
_FIRST_ANCHOR, _ANCHOR_RATE, _ANCHORS = 0.3, 0.05, (1e-3, 1e3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Knobs(ShapedKnobs):
  """What the loss of an adapter reads, whatever the student's own loss is.

  teacher_divergence: from the student (target) to the adapted teacher, so that
    'forward_kl' is the paper's KL(q || p_ta).
  teacher_kl_weight: alpha; above 0.75 without an anchor it warns.
  anchor_weight: gamma; above 0 it needs the frozen teacher's logits as well.
  drift_target: KL(p || p_ta) in nats that gamma is moved to hold (`_hold`); 0: it is
    not. It begins at `anchor_weight`, or at 0.3 where that is 0.
  temperature: of the divergence, which is multiplied by T^2; the anchor's is 1.
  """

  teacher_divergence: str = "forward_kl"
  teacher_kl_weight: Knob = 0.25
  anchor_weight: Knob = 0.0
  drift_target: float = 0.0

  def __post_init__(self):
    super().__post_init__()
    check_share("method.teacher_kl_weight", self.teacher_kl_weight)
    check_weight("method.anchor_weight", self.anchor_weight)
    check_weight("method.drift_target", self.drift_target)
    if self.drift_target and isinstance(self.anchor_weight, Linear):
      raise UserError(
        f"method.drift_target={self.drift_target} moves method.anchor_weight itself; "
        "leave out method.end.anchor_weight"
      )
    pulls = ends(self.teacher_kl_weight), ends(self.anchor_weight)
    if not self.drift_target and any(
      a > _UNSAFE_ALPHA and not g for a, g in zip(*pulls, strict=True)
    ):
      _log.warning(
        "method.teacher_kl_weight above %s lets the adapted teacher collapse onto the "
        "student; set method.anchor_weight (0.3 is a good start)",
        _UNSAFE_ALPHA,
      )

  def named_divergences(self) -> dict[str, str]:
    own = {"method.teacher_divergence": self.teacher_divergence}
    return super().named_divergences() | own

  @property
  def anchored(self) -> bool:
    """Whether the frozen teacher has a part in the loss."""
    return bool(self.drift_target) or not never(self.anchor_weight)

  def module_numbers(self) -> dict[str, Knob]:
    """The numbers that the adapter's loss reads, by key, but for one that is held."""
    found = {
      "teacher_kl_weight": self.teacher_kl_weight,
      "temperature": self.temperature,
    } | self.shape
    return found if self.drift_target else found | {"anchor_weight": self.anchor_weight}

  def held(self, method: Method) -> Method:
    """The method, whose anchor's weight is moved where there is a target of drift."""
    if not self.drift_target:
      return method

    def carry(carried: Now, metrics: Now, progress: Float[Array, ""]) -> dict[str, Any]:
      rest = method.carry(carried, metrics, progress)
      return {**rest, **_hold(self.drift_target, carried, metrics)}

    carried = {**method.carried, "anchor_weight": self.anchor_weight or _FIRST_ANCHOR}
    return dataclasses.replace(method, carried=carried, carry=carry)


def build_loss(knobs: Knobs) -> TokenLoss:
  """L_t, what moves an adapter.

  It reads logits 'student', 'teacher' (adapted) and, with an anchor, 'base'.
  """
  distance = bind(knobs.teacher_divergence)
  anchored = knobs.anchored

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
  base: bool,
) -> dict[str, Output]:
  """{'teacher': this one, adapted; where it is wanted also 'base': the frozen one}."""
  teacher, adapter = models.teachers[name], params["adapter"][name]
  if not base:
    return {"teacher": teacher.apply(frozen[name], adapter, batch)}
  adapted, plain = teacher.both(frozen[name], adapter, batch)
  return {"teacher": adapted, "base": plain}


def _hold(target: float, carried: Now, metrics: Now) -> dict[str, Float[Array, ""]]:
  """The anchor's weight after a step: it grows where the drift is above its target.

  log gamma += rate (drift / target - 1), a step of at most the rate: dual ascent on the
  constraint drift <= target, gamma being its multiplier. Of several adapted teachers
  the mean drift counts; in steps in which no module learns nothing is known of it.
  """
  drifts = [v for k, v in metrics.items() if k == "drift" or k.startswith("drift_")]
  if not drifts:
    return {"anchor_weight": carried["anchor_weight"]}
  error = jnp.clip(sum(drifts) / len(drifts) / target - 1, -1.0, 1.0)
  moved = carried["anchor_weight"] * jnp.exp(_ANCHOR_RATE * error)
  return {"anchor_weight": jnp.clip(moved, *_ANCHORS)}
