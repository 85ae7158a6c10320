"""What a configuration says, typed: a frozen dataclass for each section, which checks
itself. Users write a ConfigDict; whatever is below `config` gets these.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from okd_jax.config.bounds import beyond
from okd_jax.config.players import (
  INT8,
  AdapterSettings,
  StudentSettings,
  TeacherSettings,
)
from okd_jax.config.section import DTYPES, Section, among, least
from okd_jax.data import columns
from okd_jax.data.limits import POLICIES, TURNS, Form
from okd_jax.data.sources import source_list
from okd_jax.errors import UserError
from okd_jax.models import kernels

# Of optimiser moments; float16 has no room for small gradients.
MOMENT_DTYPES = ("float32", "bfloat16")
SCHEDULES = ("constant", "cosine", "linear")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodSettings(Section):
  """Which method, and its knobs, that it checks itself (`methods.build`)."""

  name: str = "okd"
  file: str = ""
  knobs: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def temperature(self) -> float:
    """At the first step."""
    return self.knobs.get("temperature", 1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSettings(Section):
  """Sources and rows."""

  train: Any = "embedded"  # text, or a list of it; likewise eval
  eval: Any = ""
  columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
  holdout: int = 64
  holdout_seed: int = 0
  tokenizer: str = ""
  template: str = "default"
  max_length: int = 512
  max_prompt_length: int = 256
  overlong_prompt: str = "drop"
  overlong_row: str = "truncate"
  pack: bool = False
  turns: str = "all"
  teacher_template: str = ""
  max_teacher_length: int = 0
  chat_template: str = ""
  num_proc: int = 0
  prepared: str = ""
  stream: bool = False

  def problems(self) -> Iterator[str]:
    """What no run could use, each in a sentence; as in the base class."""
    yield from least(self, "data", max_length=2, max_prompt_length=1, holdout=0)
    yield from least(self, "data", holdout_seed=0, max_teacher_length=0, num_proc=0)
    yield from among("data.turns", self.turns, TURNS)
    yield from among("data.overlong_prompt", self.overlong_prompt, POLICIES)
    yield from among("data.overlong_row", self.overlong_row, POLICIES)
    yield from columns.problems(self.columns)
    for name in ("train", "eval"):
      given = getattr(self, name)
      parts = [given] if isinstance(given, str) else given
      if not (isinstance(parts, list | tuple) and all(map(_is_text, parts))):
        yield f"data.{name}={given!r} must be text, or a list of paths and dataset ids"

  @property
  def form(self) -> Form:
    """How records become rows to train on."""
    names = [field.name for field in dataclasses.fields(Form)]
    return Form(**{name: getattr(self, name) for name in names})

  @property
  def renames(self) -> dict[str, str]:
    """The columns that go by other names, as `load_records` takes them."""
    return {ours: theirs for ours, theirs in self.columns.items() if theirs}

  @property
  def sources(self) -> list[str]:
    """What is trained on."""
    return source_list(self.train)

  @property
  def eval_sources(self) -> list[str]:
    """What the held-out rows are read from; none holds out rows of `sources`."""
    # Of prepared rows data.train says nothing, and it may well be the default.
    embedded = self.sources == ["embedded"] and not (self.prepared or self.stream)
    return source_list(self.eval) or (["embedded:eval"] if embedded else [])


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSettings(Section):
  """Steps, batches, precision, trackers."""

  steps: int = 0
  epochs: float = 1.0
  batch_size: int = 8
  microbatches: int = 1
  seed: int = 0
  dtype: str = "float32"
  remat: bool = False
  attention: str = ""
  dropout: float = 0.0
  loss_chunk: int = 0
  log_every: int = 10
  on_nonfinite: str = "stop"
  tensorboard: bool = False
  wandb: str = ""

  @property
  def skips(self) -> int:
    """How many updates may be left out because something is not finite."""
    if self.on_nonfinite == "stop":
      return 0
    return int(self.on_nonfinite.removeprefix("skip:"))

  def problems(self) -> Iterator[str]:
    """What no run could use, each in a sentence; as in the base class."""
    if not re.fullmatch(r"stop|skip:[1-9][0-9]{0,8}", self.on_nonfinite):
      yield (
        f"train.on_nonfinite={self.on_nonfinite!r} must be 'stop', or 'skip:N' with N "
        "from 1 up, to leave out up to N updates"
      )
    yield from least(
      self, "train", steps=0, batch_size=1, loss_chunk=0, log_every=1, seed=0
    )
    yield from among("train.dtype", self.dtype, DTYPES)
    if self.attention not in ("", *kernels.KERNELS):
      yield (
        f"train.attention={self.attention!r} must be one of "
        f"{', '.join(kernels.KERNELS)} or empty"
      )
    if not self.steps and not self.epochs > 0:
      yield "set train.steps or train.epochs above 0"
    if not 0 <= self.dropout < 1:
      yield f"train.dropout={self.dropout} must lie in [0, 1)"


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimSettings(Section):
  """AdamW and its schedule."""

  lr: float = 5e-4
  end_lr: float = 1e-7
  schedule: str = "cosine"
  warmup_steps: int = 0
  weight_decay: float = 1e-2
  clip: float = 1.0
  b1: float = 0.9
  b2: float = 0.999
  eps: float = 1e-8
  dtype: str = ""

  def problems(self) -> Iterator[str]:
    """What no run could use, each in a sentence; as in the base class."""
    yield from least(self, "optim", lr=0, clip=0, weight_decay=0, warmup_steps=0)
    yield from among("optim.dtype", self.dtype or "float32", MOMENT_DTYPES)
    yield from among("optim.schedule", self.schedule, SCHEDULES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointSettings(Section):
  """How often, how many are kept, and which are gone on from."""

  every: int = 500
  keep: int = 2
  any_version: bool = False

  def problems(self) -> Iterator[str]:
    """What no run could use, each in a sentence; as in the base class."""
    yield from least(self, "checkpoint", every=1, keep=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalSettings(Section):
  """What is measured on held-out rows, how often, and what it decides."""

  every: int = 500
  limit: int = 0
  batch_size: int = 8
  generate: bool = True
  generate_limit: int = 0
  max_new_tokens: int = 128
  temperature: float = 0.0
  best: str = ""
  patience: int = 0

  def problems(self) -> Iterator[str]:
    """What no run could use, each in a sentence; as in the base class."""
    yield from least(self, "eval", every=0, limit=0, batch_size=1, patience=0)
    yield from least(self, "eval", generate_limit=0, max_new_tokens=1, temperature=0)
    if self.patience and not self.best:
      yield f"eval.patience={self.patience} needs eval.best, the metric to go by"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportSettings(Section):
  """The student's folder."""

  dtype: str = "float32"
  license: str = ""

  def problems(self) -> Iterator[str]:
    """What no run could use, each in a sentence; as in the base class."""
    yield from among("export.dtype", self.dtype, DTYPES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshSettings(Section):
  """Sizes of the mesh's axes; the devices at hand check them.

  teacher: how frozen teachers lie under fsdp.
  """

  data: int = -1
  fsdp: int = 1
  tensor: int = 1
  teacher: str = "auto"

  @property
  def sizes(self) -> dict[str, int]:
    """By axis."""
    return {"data": self.data, "fsdp": self.fsdp, "tensor": self.tensor}

  def problems(self) -> Iterator[str]:
    yield from among("mesh.teacher", self.teacher, ("auto", "replicate", "fsdp"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """A configuration whose keys are right one by one; `run.checks` asks the rest.

  teachers: paths of several teachers by name; empty where there is a single one.
  """

  teacher: TeacherSettings
  teachers: Mapping[str, str]
  student: StudentSettings
  method: MethodSettings
  adapter: AdapterSettings
  data: DataSettings
  train: TrainSettings
  optim: OptimSettings
  checkpoint: CheckpointSettings
  eval: EvalSettings
  export: ExportSettings
  mesh: MeshSettings

  @property
  def teacher_dtype(self) -> str:
    """Of the frozen weights, of those that are not quantised."""
    own = "" if self.quantizes else self.teacher.dtype
    return own or self.train.dtype

  @property
  def quantizes(self) -> bool:
    """Whether the kernels of frozen layers are int8."""
    return self.teacher.dtype == INT8


_SECTIONS = {
  field.name: field.type
  for field in dataclasses.fields(Settings)
  if field.name not in ("teachers", "method")
}


def check_values(config: ConfigDict) -> None:
  """Raises a UserError for values that no run could use, whatever its models."""
  _sections(config, [name for name in _SECTIONS if name not in ("teacher", "student")])


def settings(config: ConfigDict) -> Settings:
  """The typed settings of a resolved configuration.

  Raises:
    UserError: that names every key whose value no run could use.
  """
  found = _sections(config, list(_SECTIONS))
  knobs = config.method.to_dict()
  name, file = knobs.pop("name"), knobs.pop("file")
  method = MethodSettings(name=name, file=file, knobs=knobs)
  teachers = {name: config.teachers[name] for name in sorted(config.teachers)}
  return Settings(method=method, teachers=teachers, **found)


def _is_text(value: object) -> bool:
  return isinstance(value, str)


def _sections(config: ConfigDict, names: Sequence[str]) -> dict[str, Any]:
  """The typed sections of these names; a UserError lists what is wrong in all."""
  found, problems = {}, []
  for name in names:
    try:
      found[name] = _section(_SECTIONS[name], config[name].to_dict())
    except UserError as error:
      problems.append(str(error))
  if problems:
    raise UserError("; ".join(problems))
  for name in [*names, "method"]:
    problems += beyond(name, config[name].to_dict())
  if problems:
    raise UserError("; ".join(problems))
  return found


def _section(cls: type[Section], values: Mapping[str, Any]) -> Section:
  """A section, with those inside it."""
  inner = {
    field.name: _section(field.type, values[field.name])
    for field in dataclasses.fields(cls)
    if dataclasses.is_dataclass(field.type)
  }
  return cls(**{**values, **inner})
