"""Every method by name. A new one is a file, a line here, a config and its tests."""

import functools
import inspect
from collections.abc import Callable, Mapping

from okd_jax.errors import UserError
from okd_jax.methods import kd, mixkd, okd, rlkd, sft
from okd_jax.methods.knobs import DIVERGENCES, SHAPE, Linear
from okd_jax.methods.method import Method, Models, apply_functions

METHODS: dict[str, Callable[..., Method]] = {
  "kd": kd.build,
  "mixkd": mixkd.build,
  "okd": okd.build,
  "rlkd": rlkd.build,
  "sft": sft.build,
} | {
  name: functools.partial(kd.build, divergence=divergence)
  for name, divergence in kd.NAMED.items()
}


def build(name: str, knobs: Mapping[str, object]) -> Method:
  """The method `name`, with those of the knobs that it takes.

  `knobs['end']`, if there, maps a knob to the value it reaches at the last step (None:
  it stays as it is).

  Raises:
    UserError: for an unknown name, a knob out of range, or an end that `name` has no
      use for.
  """
  if name not in METHODS:
    raise UserError(
      f"method.name={name!r} is unknown; use one of {', '.join(sorted(METHODS))}"
    )
  used = used_knobs(name)
  moving = {k: v for k, v in knobs.get("end", {}).items() if v is not None}
  if unused := sorted(set(moving) - set(used)):
    raise UserError(
      f"method.end.{unused[0]}: {name} has no such knob; it has {', '.join(used)}"
    )
  return METHODS[name](
    **{k: Linear(knobs[k], moving[k]) if k in moving else knobs[k] for k in used}
  )


def used_knobs(name: str) -> list[str]:
  """The configuration keys under `method` that method `name` reads."""
  builder = METHODS[name]
  bound = builder.keywords if isinstance(builder, functools.partial) else {}
  used = []
  for parameter in inspect.signature(builder).parameters.values():
    if parameter.kind is parameter.VAR_KEYWORD:  # **shape: the divergence's own knobs
      own = DIVERGENCES[bound["divergence"]][1].values() if bound else SHAPE
      used += own
    elif parameter.name not in bound:
      used.append(parameter.name)
  return used


__all__ = ["METHODS", "Method", "Models", "apply_functions", "build", "used_knobs"]
