"""Every method by name. A new one is a file, a line here, a config and its tests."""

import functools
import inspect
from collections.abc import Callable, Mapping

from okd_jax.errors import UserError
from okd_jax.methods import (
  clda,
  distillm2,
  ensemble,
  fdistill,
  kd,
  minillm,
  mixkd,
  okd,
  online,
  onpolicy,
  promptkd,
  rlkd,
  sft,
  uld,
)
from okd_jax.methods.base.knobs import DIVERGENCES, SHAPE, Linear
from okd_jax.methods.base.method import Method, Models, apply_functions
from okd_jax.methods.base.sequences import SAMPLING

METHODS: dict[str, Callable[..., Method]] = {
  "clda": clda.build,
  "distillm": onpolicy.build_distillm,
  "distillm2": distillm2.build,
  "ensemble": ensemble.build,
  "fdistill": fdistill.build,
  "gkd": onpolicy.build_gkd,
  "imitkd": onpolicy.build_imitkd,
  "kd": kd.build,
  "minillm": minillm.build,
  "mixkd": mixkd.build,
  "okd": okd.build,
  "promptkd": promptkd.build,
  "rlkd": rlkd.build,
  "seqkd": onpolicy.build_seqkd,
  "sft": sft.build,
  "skd": onpolicy.build_skd,
} | {
  name: functools.partial(kd.build, divergence=divergence)
  for name, divergence in kd.NAMED.items()
}


def build(name: str, knobs: Mapping[str, object], module: str = "") -> Method:
  """The method `name`, with those of the knobs that it takes.

  `module` is adapter.kind: naming one lets a teacher learn that would be frozen.

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
  builder = METHODS[name]
  if knobs.get("cross_tokenizer"):
    uld.check(name, knobs, module)
    builder = uld.build
  used = _parameters(builder)
  online_knobs = [*online.KNOBS, *SHAPE] if module else []
  moving = {k: v for k, v in knobs.get("end", {}).items() if v is not None}

  def values(names):
    return {k: Linear(knobs[k], moving[k]) if k in moving else knobs[k] for k in names}

  method = builder(**values(used))
  if module and method.teacher == "none":
    raise UserError(f"adapter.kind={module}: {name} has no teacher that could learn")
  if module and method.teacher == "frozen":
    method = online.wrap(method, **values(online_knobs))
  if module and method.teacher == "several":
    method = online.wrap_several(method, **values(online_knobs))
  unused = sorted(set(moving) - {*method.knobs, "sampled_share"})
  if "sampled_share" in moving and "sampled_share" not in used:
    unused = ["sampled_share"]
  if unused:
    raise UserError(
      f"method.end.{unused[0]}: here {name} reads no such number; it reads "
      f"{', '.join(method.knobs) or 'none'}"
    )
  return method


def used_knobs(name: str) -> list[str]:
  """The configuration keys under `method` that method `name` reads."""
  return _parameters(METHODS[name])


def _parameters(builder: Callable) -> list[str]:
  """The configuration keys under `method` that a builder takes."""
  bound = builder.keywords if isinstance(builder, functools.partial) else {}
  kd_knobs = inspect.signature(kd.build).parameters
  groups = {
    "shape": DIVERGENCES[bound["divergence"]][1].values() if bound else SHAPE,
    "sampling": [k for k in SAMPLING if k != "sampled_share"],
    "on_policy": [k for k in kd_knobs if k not in ("divergence", "shape")],
  }
  groups["on_policy"] += [*SAMPLING, *SHAPE]
  used = []
  for parameter in inspect.signature(builder).parameters.values():
    if parameter.kind is parameter.VAR_KEYWORD:
      used += groups[parameter.name]
    elif parameter.name not in bound:
      used.append(parameter.name)
  return used


__all__ = ["METHODS", "Method", "Models", "apply_functions", "build", "used_knobs"]
