"""The numbers that steer a method: constant, or moving linearly over the run."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from okd_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Linear:
  """A knob that is `start` at the first step and `end` at the last."""

  start: float | None  # None: the method's own
  end: float

  def __call__(self, progress: float | Float[Array, ""]) -> float | Float[Array, ""]:
    """Its value at a share of the run, 0 to 1."""
    return self.start + (self.end - self.start) * progress


Knob = float | int | Linear


def progress(step: Int[Array, ""], steps: int) -> Float[Array, ""]:
  """Which share of a run of so many steps is over at a step counted from 0."""
  return jnp.clip(step / max(steps - 1, 1), 0, 1)


def knobs_at(
  knobs: Mapping[str, Knob], progress: float | Float[Array, ""]
) -> dict[str, Any]:
  """The value of each knob at a share of the run, 0 at the first step, 1 at the last.

  Constant knobs stay Python numbers, so that a loss can leave out what they switch off;
  moving ones are traced.
  """
  return {
    name: knob(progress) if isinstance(knob, Linear) else knob
    for name, knob in knobs.items()
  }


def at_start(knobs: Mapping[str, Knob]) -> dict[str, float]:
  """The value of each knob at the first step."""
  return {k: v.start if isinstance(v, Linear) else v for k, v in knobs.items()}


def ends(knob: Knob) -> tuple[float, float]:
  """The smallest interval that holds all values the knob takes, as (first, last)."""
  return (knob.start, knob.end) if isinstance(knob, Linear) else (knob, knob)


def never(knob: Knob) -> bool:
  """Whether a weight is 0 throughout."""
  return not any(ends(knob))


def check_share(key: str, knob: Knob) -> None:
  """Raises a UserError unless 0 <= knob <= 1 throughout."""
  if not all(0 <= value <= 1 for value in ends(knob)):
    raise UserError(f"{show(key, knob)} must lie between 0 and 1")


def check_positive(key: str, knob: Knob) -> None:
  """Raises a UserError unless knob > 0 throughout."""
  if not all(0 < value < float("inf") for value in ends(knob)):
    raise UserError(f"{show(key, knob)} must be above 0")


def check_weight(key: str, knob: Knob) -> None:
  """Raises a UserError unless knob >= 0 throughout."""
  if not all(0 <= value < float("inf") for value in ends(knob)):
    raise UserError(f"{show(key, knob)} must be at least 0")


def check_choice(key: str, value: str, allowed: Any) -> None:
  """Raises a UserError unless `value` is one of those allowed."""
  if value not in allowed:
    raise UserError(f"{key}={value!r} must be one of {', '.join(allowed)}")


def check_least(key: str, value: float, least: float) -> None:
  """Raises a UserError unless value >= least; of NaN, too."""
  if not value >= least:
    raise UserError(f"{key}={value} must be at least {least}")


def check_idle(knobs: Any, needed: str, *names: str) -> None:
  """Raises a UserError if a knob was set that has no effect.

  Args:
    knobs: a dataclass of knobs.
    needed: the settings that these knobs are read with, in words.
    names: of the fields that must have their defaults.
  """
  defaults = {field.name: field.default for field in dataclasses.fields(knobs)}
  for name in names:
    value = getattr(knobs, name)
    if value != defaults[name]:
      shown = show(f"method.{name}", value)
      raise UserError(f"{shown} has no effect here: it needs {needed}")


def show(key: str, knob: Any) -> str:
  """'key=value', of a moving knob with both ends."""
  if isinstance(knob, Linear):
    return f"{key}={knob.start} moving to {knob.end}"
  return f"{key}={knob}"
