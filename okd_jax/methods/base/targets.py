"""What a student learns from where it is not its teacher's distribution as it is."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from okd_jax.errors import UserError
from okd_jax.losses import log_probs, mixture
from okd_jax.methods.base.divergences import DivergenceKnobs
from okd_jax.methods.base.knobs import Knob, Linear, check_share, never, show
from okd_jax.methods.base.method import Method
from okd_jax.methods.base.token_weights import TokenWeight

_RATE, _MOMENTUM = 5e-4, 0.99  # TAID's, of its code

_Number = float | Float[Array, ""]
_Numbers = Mapping[str, Float[Array, ""]]


def towards_student(
  teacher: Float[Array, "B C V"], student: Float[Array, "B C V"], share: _Number
) -> Float[Array, "B C V"]:
  """Logits between both, so much of them the student's; constants.

  Source: TAID, Shing et al. 2025, arXiv 2501.16937, Eq. 3, with share = 1 - t.
  """
  return jax.lax.stop_gradient(share * student + (1 - share) * teacher)


def between_teachers(
  adapted: Float[Array, "B C V"],
  frozen: Float[Array, "B C V"],
  share: _Number,
  kind: str,
  temperature: _Number = 1.0,
) -> Float[Array, "B C V"]:
  """Logits of a mixture, so much of it the adapted teacher's.

  kind: 'arithmetic', of probabilities at `temperature`, at which the logits are then to
    be read; 'geometric', of their logarithms.
  """
  if kind == "geometric":
    return share * log_probs(adapted) + (1 - share) * log_probs(frozen)
  share = jnp.full(adapted.shape[:-1], share)
  shares = jnp.stack([share, 1 - share], axis=-1)
  return mixture([adapted, frozen], shares, temperature)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TargetKnobs(DivergenceKnobs):
  """What a method reads whose student learns from one teacher, token by token.

  token_weight: what a token weighs (`TokenWeight`); '' is equally much.
  student_mix: the student's own share in the logits that it learns from, TAID's 1 - t;
    below 1, as a rule falling to 0.
  student_mix_adapts: it falls faster while the divergence falls (`_adapt`).
  """

  token_weight: str = ""
  student_mix: Knob = 0.0
  student_mix_adapts: bool = False

  def __post_init__(self):
    super().__post_init__()
    TokenWeight.read("method.token_weight", self.token_weight)
    check_share("method.student_mix", self.student_mix)
    if self.student_mix_adapts and not isinstance(self.student_mix, Linear):
      raise UserError(
        f"method.student_mix_adapts: {show('method.student_mix', self.student_mix)} "
        "must move, to 0 as a rule: set method.end.student_mix"
      )
    if self.student_mix_adapts and self.student_mix.start < self.student_mix.end:
      raise UserError(
        f"method.student_mix_adapts: {show('method.student_mix', self.student_mix)} "
        "must fall: set method.end.student_mix below it"
      )

  @property
  def weighing(self) -> TokenWeight | None:
    """How the tokens are weighed; None: equally."""
    return TokenWeight.read("method.token_weight", self.token_weight)

  def mixed(self, method: Method) -> Method:
    """The method, whose loss finds 'student_mix' in `now` unless it is always 0."""
    if never(self.student_mix):
      return method
    knob = self.student_mix
    if not self.student_mix_adapts:
      knobs = {**method.knobs, "student_mix": knob}
      return dataclasses.replace(method, knobs=knobs, takes_stored=False)

    def carry(carried: _Numbers, metrics: _Numbers, progress: Float[Array, ""]):
      rest = method.carry(carried, metrics, progress)
      return {**rest, **_adapt(knob, carried, metrics, progress)}

    start = {"student_mix": knob.start, "_student_mix_gain": 0.0, "_divergence": 0.0}
    return dataclasses.replace(
      method, carried={**method.carried, **start}, carry=carry, takes_stored=False
    )


def _adapt(
  knob: Linear, carried: _Numbers, metrics: _Numbers, progress: Float[Array, ""]
) -> dict[str, Float[Array, ""]]:
  """The student's share after a step.

  With t = 1 - share and d the divergence, delta = (d_before - d) / d_before, averaged
  with momentum .99 to m: t grows by 5e-4 sigmoid(m) (1 - t), and is never behind the
  straight line of the knob, nor beyond the knob's end.

  Source: TAID, arXiv 2501.16937, Section 3.3 and Algorithm 1.
  """
  before, now = carried["_divergence"], metrics["divergence"]
  fell = jnp.where(before > 0, (before - now) / jnp.where(before > 0, before, 1), 0)
  gain = _MOMENTUM * carried["_student_mix_gain"] + (1 - _MOMENTUM) * fell
  share = carried["student_mix"] * (1 - _RATE * jax.nn.sigmoid(gain))
  share = jnp.maximum(jnp.minimum(share, knob(progress)), knob.end)
  return {"student_mix": share, "_student_mix_gain": gain, "_divergence": now}
