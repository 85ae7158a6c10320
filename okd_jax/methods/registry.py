"""Every method by name, its knobs and builder; and how somebody else's joins them."""

import dataclasses
import difflib
import hashlib
import importlib.util
import sys
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from okd_jax.errors import UserError
from okd_jax.methods import (
  clda,
  distillm,
  distillm2,
  ensemble,
  fdistill,
  gkd,
  imitkd,
  kd,
  minillm,
  mixkd,
  okd,
  online,
  online_module,
  onpolicy,
  promptkd,
  rlkd,
  seqkd,
  sft,
  skd,
  uld,
)
from okd_jax.methods.base import DIVERGENCES, Linear, Method
from okd_jax.methods.base.divergences import shape_knobs

_NOT_KNOBS = ("name", "file", "end", "cross_tokenizer")  # of the section `method`
_FILE_MODULE = "okd_jax_method_file"


@dataclasses.dataclass(frozen=True)
class Builder:
  """Makes a method of its knobs, a frozen dataclass that checks itself."""

  knobs: type
  build: Callable[[Any], Method]

  def __call__(self, **knobs: Any) -> Method:
    """The method with these knobs, all others at their defaults."""
    return self.build(self.knobs(**knobs))


METHODS: dict[str, Builder] = {
  "clda": Builder(okd.Knobs, clda.build),
  "distillm": Builder(distillm.Knobs, distillm.build),
  "distillm2": Builder(distillm2.Knobs, distillm2.build),
  "ensemble": Builder(ensemble.Knobs, ensemble.build),
  "fdistill": Builder(fdistill.Knobs, fdistill.build),
  "gkd": Builder(gkd.Knobs, gkd.build),
  "imitkd": Builder(onpolicy.Knobs, imitkd.build),
  "kd": Builder(kd.Knobs, kd.build),
  "minillm": Builder(minillm.Knobs, minillm.build),
  "mixkd": Builder(mixkd.Knobs, mixkd.build),
  "okd": Builder(okd.Knobs, okd.build),
  "promptkd": Builder(promptkd.Knobs, promptkd.build),
  "rlkd": Builder(rlkd.Knobs, rlkd.build),
  "seqkd": Builder(seqkd.Knobs, seqkd.build),
  "sft": Builder(sft.Knobs, sft.build),
  "skd": Builder(skd.Knobs, skd.build),
} | {name: Builder(kd.named(name), kd.build) for name in kd.NAMED}
_OURS = tuple(METHODS)


def register(name: str, knobs: type) -> Callable[[Callable], Callable]:
  """A decorator that makes `build(knobs) -> Method` known as method.name=NAME.

  Args:
    name: its name; not that of a method of this package.
    knobs: a frozen dataclass, every field with a default; `__post_init__` raises a
      `UserError` for values out of range.
  """
  if name in _OURS:
    raise UserError(f"there is a method {name!r} already; choose another name")
  bare = [f.name for f in dataclasses.fields(knobs) if not _has_default(f)]
  if bare:
    raise UserError(f"method {name!r}: its knob {bare[0]} needs a default")

  def note(build: Callable[[Any], Method]) -> Callable[[Any], Method]:
    METHODS[name] = Builder(knobs, build)
    return build

  return note


def load_file(path: str) -> None:
  """Runs a Python file that registers methods or divergences, once until it changes.

  Raises:
    UserError: if there is no such file, or it fails.
  """
  place = Path(path).expanduser().resolve()
  if not place.is_file():
    raise UserError(f"method.file={path}: there is no such file")
  source = place.read_bytes()
  name = f"{_FILE_MODULE}_{hashlib.sha256(bytes(place) + source).hexdigest()[:16]}"
  if name in sys.modules:
    return
  spec = importlib.util.spec_from_file_location(name, place)
  module = importlib.util.module_from_spec(spec)
  sys.modules[name] = module
  try:
    spec.loader.exec_module(module)
  except UserError as error:
    del sys.modules[name]
    raise UserError(f"method.file={path}: {error}") from error
  except Exception as error:  # whatever somebody else's code raises
    del sys.modules[name]
    kind = type(error).__name__
    raise UserError(f"method.file={path} fails with {kind}: {error}") from error


def build(name: str, knobs: Mapping[str, Any], adapter: str = "") -> Method:
  """The method `name`, with those of the knobs that it reads.

  Args:
    name: a key of METHODS.
    knobs: by their keys below `method`, any number of them: what is missing has its
      default. `knobs['end']`, if there, maps a knob to the value it reaches at the last
      step (None: it stays as it is).
    adapter: adapter.kind: naming one lets teachers learn that would be frozen.

  Raises:
    UserError: for an unknown name, a knob out of range, or one that differs from its
      default although nothing here reads it.
  """
  method, read = _made(name, knobs, adapter)
  for key in _unread(method, read, knobs):
    raise UserError(_why_unread(key, name, knobs, method))
  return method


def unread(name: str, knobs: Mapping[str, Any], adapter: str = "") -> list[str]:
  """The knobs, 'end.KNOB' among them, that are set to no effect; `build` refuses them.

  None where the method cannot be made at all.
  """
  try:
    return _unread(*_made(name, knobs, adapter), knobs)
  except UserError:
    return []


def _made(name: str, knobs: Mapping[str, Any], adapter: str) -> tuple[Method, set[str]]:
  """(the method, the keys of the knobs that it reads)."""
  builder = find(name)
  if knobs.get("cross_tokenizer"):
    uld.check(name, knobs, adapter)
    builder = Builder(uld.Knobs, uld.build)
  values = {k: v for k, v in knobs.items() if k not in _NOT_KNOBS}
  for key, end in _moving(knobs).items():
    values[key] = Linear(values.get(key, defaults().get(key)), end)
  own = _read(builder.knobs, values)
  method, read = builder.build(own), _reads(own)
  if adapter and not (method.taught and method.reads_teacher):
    raise UserError(f"adapter.kind={adapter}: {name} here has no teacher in its loss")
  if adapter and not method.adapts:
    module = _read(online_module.Knobs, values)
    method, read = online.wrap(method, module), read | _reads(module)
  return method, read


def _moving(knobs: Mapping[str, Any]) -> dict[str, float]:
  return {k: v for k, v in knobs.get("end", {}).items() if v is not None}


def find(name: str) -> Builder:
  """The builder of this name; else a UserError that suggests the nearest one."""
  if name not in METHODS:
    near = difflib.get_close_matches(name, METHODS, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UserError(
      f"method.name={name!r} is unknown; {hint}use one of {', '.join(sorted(METHODS))}"
    )
  return METHODS[name]


def used_knobs(name: str) -> list[str]:
  """The configuration keys under `method` that method `name` can read."""
  cls = METHODS[name].knobs
  fields = [f.name for f in dataclasses.fields(cls) if f.init]
  if "shape" not in fields:
    return fields
  fields.remove("shape")
  settled = getattr(cls, "divergence", "")  # one by name has no such knob
  free = "divergence" in fields
  shapes = (
    shape_knobs()
    if free
    else {s.key: s for s in DIVERGENCES[settled].arguments.values()}
  )
  return [*fields, *shapes]


def defaults() -> dict[str, Any]:
  """The default of every knob that any method reads, by its key."""
  found = {key: shape.default for key, shape in shape_knobs().items()}
  for cls in (*(b.knobs for b in METHODS.values()), online_module.Knobs, uld.Knobs):
    for field in dataclasses.fields(cls):
      if field.init and field.name != "shape":
        found[field.name] = _default(field)
  return found


def _read(cls: type, values: Mapping[str, Any]) -> Any:
  """The knobs that `cls` reads, of these values."""
  fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
  given = {name: values[name] for name in fields.keys() & values.keys()}
  for name, value in given.items():
    if isinstance(value, Linear) and not _may_move(fields[name]):
      raise UserError(
        f"method.end.{name}: method.{name} keeps its value, it cannot move"
      )
  if "shape" in fields:
    given["shape"] = {k: values[k] for k in shape_knobs() if k in values}
  return cls(**given)


def _may_move(field: dataclasses.Field) -> bool:
  """Whether a knob may be a `Linear`; of an annotation in quotes nobody knows."""
  return isinstance(field.type, str) or Linear in typing.get_args(field.type)


def _reads(knobs: Any) -> set[str]:
  names = {field.name for field in dataclasses.fields(knobs) if field.init}
  return names | set(getattr(knobs, "shape", ()))


def _unread(method: Method, read: set[str], knobs: Mapping[str, Any]) -> list[str]:
  """Keys of knobs that were set, or move, to no effect; unknown ones first."""
  known = defaults()
  given = {k: v for k, v in knobs.items() if k not in _NOT_KNOBS}
  numbers = {*method.numbers, "sampled_share"} & read
  return [
    *(key for key in given if key not in known),
    *(f"end.{key}" for key in sorted(_moving(knobs)) if key not in numbers),
    *(
      key
      for key, value in given.items()
      if key in known and key not in read and not _same(value, known[key])
    ),
  ]


def _why_unread(key: str, name: str, knobs: Mapping[str, Any], method: Method) -> str:
  if key.startswith("end."):
    return (
      f"method.{key}: here {name} reads no such number; it reads "
      f"{', '.join(method.numbers) or 'none'}"
    )
  if key not in defaults():
    near = difflib.get_close_matches(key, defaults(), n=1, cutoff=0.5)
    hint = f"; did you mean method.{near[0]}?" if near else ""
    return f"method.{key} is no knob of any method{hint}"
  return f"method.{key}={knobs[key]}: {name} here does not read it; {who_reads(key)}"


def _same(value: Any, default: Any) -> bool:
  return value == default or (value in ((), []) and default in ((), []))


def who_reads(key: str) -> str:
  """In words, what a knob is for."""
  shaping = [n for n, d in DIVERGENCES.items() if key in _keys(d.arguments)]
  if shaping:
    return f"it shapes the divergence {' or '.join(shaping)} (method.divergence)"
  names = [name for name in sorted(METHODS) if key in used_knobs(name)]
  text = f"it is read by {', '.join(names)}"
  if key in {field.name for field in dataclasses.fields(online_module.Knobs)}:
    text += ", and by any method with adapter.kind"
  return text


def _keys(arguments: Mapping[str, Any]) -> set[str]:
  return {shape.key for shape in arguments.values()}


def _has_default(field: dataclasses.Field) -> bool:
  missing = dataclasses.MISSING
  return field.default is not missing or field.default_factory is not missing


def _default(field: dataclasses.Field) -> Any:
  missing = dataclasses.MISSING
  return field.default_factory() if field.default is missing else field.default
