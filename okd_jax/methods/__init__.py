"""Every method by name. A new one is a file, a line here, a config and its tests."""

import inspect
from collections.abc import Callable, Mapping

from okd_jax.errors import UserError
from okd_jax.methods import kd, okd, sft
from okd_jax.methods.method import Method, Models

METHODS: dict[str, Callable[..., Method]] = {
  "kd": kd.build_kd,
  "okd": okd.build,
  "rkd": kd.build_rkd,
  "sft": sft.build,
}


def build(name: str, knobs: Mapping[str, object]) -> Method:
  """The method `name`, with those of the knobs that it takes.

  Raises:
    UserError: for an unknown name or a knob out of range.
  """
  if name not in METHODS:
    raise UserError(f"method.name={name!r} is unknown; use one of {', '.join(METHODS)}")
  return METHODS[name](**{key: knobs[key] for key in used_knobs(name)})


def used_knobs(name: str) -> list[str]:
  """The configuration keys under `method` that method `name` reads."""
  parameters = inspect.signature(METHODS[name]).parameters.values()
  return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]


__all__ = ["METHODS", "Method", "Models", "build", "used_knobs"]
