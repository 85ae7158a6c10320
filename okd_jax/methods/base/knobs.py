"""The numbers that steer a method: constant, or moving linearly over the run."""

import dataclasses
import logging
from collections.abc import Callable, Mapping
from typing import Any

from okd_jax import losses
from okd_jax.errors import UserError

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Linear:
  """A knob that is `start` at the first step and `end` at the last."""

  start: float
  end: float

  def __call__(self, progress):
    """Its value at a share of the run, 0 to 1."""
    return self.start + (self.end - self.start) * progress


Knob = float | Linear

# Each divergence, and which knob is which of its arguments.
DIVERGENCES: dict[str, tuple[Callable, dict[str, str]]] = {
  "forward_kl": (losses.forward_kl, {}),
  "reverse_kl": (losses.reverse_kl, {}),
  "jensen_shannon": (
    losses.jensen_shannon,
    {"beta": "beta", "normalize": "normalize"},
  ),
  "skew_forward_kl": (losses.skew_forward_kl, {"alpha": "skew"}),
  "skew_reverse_kl": (losses.skew_reverse_kl, {"alpha": "skew"}),
  "total_variation": (losses.total_variation, {}),
  "adaptive_kl": (losses.adaptive_kl, {"head_mass": "head_mass"}),
  "weighted_kl": (losses.weighted_kl, {"weight": "forward_share"}),
  "alpha_beta": (losses.alpha_beta, {"alpha": "ab_alpha", "beta": "ab_beta"}),
}
# What a builder that takes any divergence gets as **shape.
SHAPE = tuple(
  dict.fromkeys(k for _, names in DIVERGENCES.values() for k in names.values())
)


def find_divergence(key: str, name: str, shape: Mapping[str, Any]) -> Callable:
  """The divergence that the configuration key `key` names, ready to be called as

    distance(p_logits, q_logits, temperature=…, **other_knobs) -> [B, C]

  It picks what it needs from the other knobs, which hold those of `shape`.

  Raises:
    UserError: for an unknown name, or a knob of this divergence out of range.
  """
  if name not in DIVERGENCES:
    raise UserError(
      f"{key}={name!r} is no divergence; use one of {', '.join(DIVERGENCES)}"
    )
  function, names = DIVERGENCES[name]
  for knob in names.values():
    _SHAPE_CHECKS[knob](f"method.{knob}", shape[knob])
  if name == "alpha_beta" and not shape["ab_alpha"] + shape["ab_beta"]:
    raise UserError("method.ab_alpha=0.0 and method.ab_beta=0.0: one must be above 0")
  if name == "jensen_shannon" and not shape["normalize"]:
    if any(0 < beta < 0.05 or 0.95 < beta < 1 for beta in ends(shape["beta"])):
      _log.warning(
        "%s: so near the end the Jensen-Shannon divergence is almost 0 and trains "
        "almost nothing; set method.normalize=True",
        _show("method.beta", shape["beta"]),
      )

  def distance(p_logits, q_logits, *, temperature, **knobs):
    own = {argument: knobs[knob] for argument, knob in names.items()}
    return function(p_logits, q_logits, temperature, **own)

  return distance


def own_shape(shape: Mapping[str, Any], *names: str) -> dict[str, Any]:
  """Those of the knobs in `shape` that one of these divergences reads."""
  used = {knob for name in names for knob in DIVERGENCES[name][1].values()}
  return {knob: shape[knob] for knob in shape if knob in used}


def among_top_k(distance: Callable, k: int) -> Callable:
  """`distance` between the teacher's k likeliest tokens and one bucket for the rest.

  Keeps what holds for an f-divergence: never above the distance between the whole
  distributions, and equal to it once k reaches the vocabulary.
  """

  def sparse(p_logits, q_logits, *, temperature, **knobs):
    top = losses.top_k(p_logits, k, temperature)
    p, q = losses.buckets(top, q_logits, temperature)
    return temperature**2 * distance(p, q, temperature=1.0, **knobs)

  return sparse


def ends(knob: Knob) -> tuple[float, float]:
  """The smallest interval that holds all values the knob takes, as (first, last)."""
  return (knob.start, knob.end) if isinstance(knob, Linear) else (knob, knob)


def check_share(key: str, knob: Knob) -> None:
  """Raises a UserError unless 0 <= knob <= 1 throughout."""
  if not all(0 <= value <= 1 for value in ends(knob)):
    raise UserError(f"{_show(key, knob)} must lie between 0 and 1")


def check_positive(key: str, knob: Knob) -> None:
  """Raises a UserError unless knob > 0 throughout."""
  if not all(0 < value < float("inf") for value in ends(knob)):
    raise UserError(f"{_show(key, knob)} must be above 0")


def check_weight(key: str, knob: Knob) -> None:
  """Raises a UserError unless knob >= 0 throughout."""
  if not all(0 <= value < float("inf") for value in ends(knob)):
    raise UserError(f"{_show(key, knob)} must be at least 0")


def _check_beta(key: str, knob: Knob) -> None:
  check_share(key, knob)
  if isinstance(knob, Linear) and not all(0 < value < 1 for value in ends(knob)):
    raise UserError(
      f"{_show(key, knob)}: the Jensen-Shannon divergence jumps at 0 and 1 (they mean "
      "the plain KLs), so a schedule must stay between them"
    )


def _check_skew(key: str, knob: Knob) -> None:
  if not all(0 <= value < 1 for value in ends(knob)):
    raise UserError(f"{_show(key, knob)} must be at least 0 and below 1")


def _check_constant(key: str, knob: Knob) -> None:
  if isinstance(knob, Linear):
    raise UserError(f"{_show(key, knob)}: this knob cannot move")
  check_weight(key, knob)


def _show(key: str, knob: Knob) -> str:
  if isinstance(knob, Linear):
    return f"{key}={knob.start} moving to {knob.end}"
  return f"{key}={knob}"


_SHAPE_CHECKS = {
  "beta": _check_beta,
  "normalize": lambda key, knob: None,
  "skew": _check_skew,
  "head_mass": check_share,
  "forward_share": check_share,
  "ab_alpha": _check_constant,
  "ab_beta": _check_constant,
}
