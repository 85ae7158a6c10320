"""What a configuration says, typed: a frozen dataclass for each section, which checks
itself. Users write a ConfigDict; whatever is below `config` gets these.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from okd_jax.errors import UserError
from okd_jax.methods.base import TokenWeight
from okd_jax.models import even_layers, kernels

DTYPES = ("float32", "bfloat16", "float16")
INT8 = "int8"  # of a frozen teacher's kernels
# Of optimiser moments; float16 has no room for small gradients.
MOMENT_DTYPES = ("float32", "bfloat16")
SCHEDULES = ("constant", "cosine", "linear")
POLICIES = ("drop", "truncate")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Section:
  """Raises a UserError that names all that is wrong with its keys."""

  def __post_init__(self):
    if problems := list(self.problems()):
      raise UserError("; ".join(problems))

  def problems(self) -> Iterator[str]:
    """What no run could use, each in a sentence; as in the base class."""
    yield from ()


def _least(section: Any, prefix: str, **least: float) -> Iterator[str]:
  for name, bound in least.items():
    value = getattr(section, name)
    if not value >= bound:  # so that NaN is caught, too
      yield f"{prefix}.{name}={value} must be at least {bound}"


def _among(key: str, value: str, allowed: Sequence[str]) -> Iterator[str]:
  if value not in allowed:
    yield f"{key}={value!r} must be one of {', '.join(allowed)}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomModel(_Section):
  """The dimensions of a model drawn at random; hidden_size 0: none is wanted."""

  family: str = "llama"
  hidden_size: int = 0
  num_layers: int = 2
  num_heads: int = 4
  num_kv_heads: int = 0
  mlp_size: int = 0
  max_length: int = 1024
  tie_embeddings: bool = True

  @property
  def wanted(self) -> bool:
    return self.hidden_size > 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherSettings(_Section):
  """A single teacher: a model, what adapted it, what of it was stored or is kept."""

  path: str = ""
  adapter: str = ""
  cache: str = ""
  trunk: str = ""
  dtype: str = ""
  model: RandomModel = RandomModel()

  def problems(self) -> Iterator[str]:
    """What no run could use, each in a sentence; as in the base class."""
    yield from _among("teacher.dtype", self.dtype or "float32", (*DTYPES, INT8))
    if self.adapter and not self.path:
      yield "teacher.adapter adapts what teacher.path names; set it, too"
    if self.path and self.model.wanted:
      yield "set teacher.path or teacher.model.hidden_size, not both"

  @property
  def named(self) -> bool:
    """Whether there is a teacher, or what one said."""
    return bool(self.path or self.cache or self.model.wanted)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudentSettings(_Section):
  """Where the student starts."""

  path: str = ""
  layers: int = 0
  which_layers: str = "even"
  model: RandomModel = RandomModel()

  @property
  def from_teacher(self) -> bool:
    """Whether it starts from some of the teacher's layers."""
    return self.layers > 0 or bool(self._numbers)

  @property
  def _numbers(self) -> list[int]:
    """Those of which_layers, if it lists any."""
    found = self.which_layers.replace(" ", "").split(",")
    return [int(n) for n in found] if all(map(str.isdecimal, found)) else []

  def taken(self, total: int) -> list[int]:
    """The numbers of the layers to start from, of a teacher with `total`.

    Raises:
      UserError: if it lacks any of them.
    """
    wanted, numbers = self.layers, self._numbers
    if wanted > total:
      raise UserError(f"student.layers={wanted}, but the teacher has {total} layers")
    if numbers and max(numbers) >= total:
      raise UserError(
        f"student.which_layers={self.which_layers}: the teacher's layers are 0 to "
        f"{total - 1}"
      )
    match self.which_layers:
      case "top":
        return [*range(total - wanted, total)]
      case "bottom":
        return [*range(wanted)]
    return numbers or even_layers(total, wanted)

  def problems(self) -> Iterator[str]:
    """What no run could use, each in a sentence; as in the base class."""
    starts = {
      "student.path": self.path,
      "student.layers": self.from_teacher,
      "student.model.hidden_size": self.model.hidden_size,
    }
    given = [key for key, wanted in starts.items() if wanted]
    if len(given) != 1:
      yield (
        "say where the student starts by exactly one of student.path, student.layers "
        f"and student.model.hidden_size (set: {', '.join(given) or 'none'})"
      )
    yield from _least(self, "student", layers=0)
    numbers = self._numbers
    if not numbers and self.which_layers not in ("even", "top", "bottom"):
      yield (
        f"student.which_layers={self.which_layers!r} must be even, top, bottom or "
        "numbers of layers such as 0,3,7"
      )
    if self.which_layers in ("top", "bottom") and not self.layers:
      yield f"student.which_layers={self.which_layers} needs student.layers"
    if numbers and (
      sorted({*numbers}) != numbers or self.layers not in (0, len(numbers))
    ):
      yield (
        f"student.which_layers={self.which_layers} must be ascending numbers, each once"
        f", and student.layers={self.layers} 0 or how many they are"
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodSettings(_Section):
  """Which method, and its knobs, that it checks itself (`methods.build`)."""

  name: str = "okd"
  file: str = ""
  knobs: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def temperature(self) -> float:
    """At the first step."""
    return self.knobs.get("temperature", 1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterSettings(_Section):
  """The adapters of teachers that learn; their kinds check the rest."""

  kind: str = ""
  rank: int = 32
  scale: float = 1.0
  targets: Sequence[str] = ("query", "value")
  length: int = 16
  text: str = ""
  share: float = 0.25
  layers: int = 0
  teachers: Sequence[str] = ()
  lr_scale: float = 1.0
  rows: float = 1.0
  every: int = 1
  until: float = 1.0
  tokens: str = ""

  @property
  def module_tokens(self) -> TokenWeight | None:
    """Which tokens of these rows teach it; None: all."""
    return TokenWeight.read("adapter.tokens", self.tokens)

  @property
  def one_row_in(self) -> int:
    """One row in so many teaches the module."""
    return round(1 / self.rows)

  def learns(self, step: int, steps: int) -> bool:
    """Whether the module learns in the step after `step`, of so many."""
    return step % self.every == 0 and step < self.until * steps

  def problems(self) -> Iterator[str]:
    """What no run could use, each in a sentence; as in the base class."""
    yield from _least(self, "adapter", lr_scale=0, every=1)
    try:
      TokenWeight.read("adapter.tokens", self.tokens)
    except UserError as error:
      yield str(error)
    if not 0 < self.until <= 1:
      yield f"adapter.until={self.until} must be above 0 and at most 1"
    if not 0 < self.rows <= 1 or abs(1 / self.rows - self.one_row_in) > 1e-6:
      yield (
        f"adapter.rows={self.rows} must be one part of a whole: 1, 1/2, 1/4 = 0.25, "
        "1/8 = 0.125 and so on"
      )
    if not 0 < self.share <= 1:
      yield (
        f"adapter.share={self.share} must be above 0 and at most 1 (where nothing of "
        "the teacher is to learn, use method.name=kd)"
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSettings(_Section):
  """Sources and rows."""

  train: str = "embedded"
  eval: str = ""
  holdout: int = 64
  tokenizer: str = ""
  template: str = "default"
  max_length: int = 512
  max_prompt_length: int = 256
  overlong_prompt: str = "drop"
  overlong_row: str = "truncate"
  pack: bool = False

  def problems(self) -> Iterator[str]:
    """What no run could use, each in a sentence; as in the base class."""
    yield from _least(self, "data", max_length=2, max_prompt_length=1, holdout=0)
    yield from _among("data.overlong_prompt", self.overlong_prompt, POLICIES)
    yield from _among("data.overlong_row", self.overlong_row, POLICIES)

  @property
  def eval_source(self) -> str:
    """What the held-out rows are read from; '' holds out rows of `train`."""
    return self.eval or ("embedded:eval" if self.train == "embedded" else "")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSettings(_Section):
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
  tensorboard: bool = False
  wandb: str = ""

  def problems(self) -> Iterator[str]:
    """What no run could use, each in a sentence; as in the base class."""
    yield from _least(
      self, "train", steps=0, batch_size=1, loss_chunk=0, log_every=1, seed=0
    )
    yield from _among("train.dtype", self.dtype, DTYPES)
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
class OptimSettings(_Section):
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
    yield from _least(self, "optim", lr=0, clip=0, weight_decay=0, warmup_steps=0)
    yield from _among("optim.dtype", self.dtype or "float32", MOMENT_DTYPES)
    yield from _among("optim.schedule", self.schedule, SCHEDULES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointSettings(_Section):
  """How often, and how many are kept."""

  every: int = 500
  keep: int = 2

  def problems(self) -> Iterator[str]:
    """What no run could use, each in a sentence; as in the base class."""
    yield from _least(self, "checkpoint", every=1, keep=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalSettings(_Section):
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
    yield from _least(self, "eval", every=0, limit=0, batch_size=1, patience=0)
    yield from _least(self, "eval", generate_limit=0, max_new_tokens=1, temperature=0)
    if self.patience and not self.best:
      yield f"eval.patience={self.patience} needs eval.best, the metric to go by"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportSettings(_Section):
  """The student's folder."""

  dtype: str = "float32"

  def problems(self) -> Iterator[str]:
    """What no run could use, each in a sentence; as in the base class."""
    yield from _among("export.dtype", self.dtype, DTYPES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshSettings(_Section):
  """Sizes of the mesh's axes; the devices at hand check them."""

  data: int = -1
  fsdp: int = 1
  tensor: int = 1


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


def _sections(config: ConfigDict, names: Sequence[str]) -> dict[str, Any]:
  """The typed sections of these names; a UserError lists what is wrong in all."""
  found, problems = {}, []
  for name in names:
    values = config[name].to_dict()
    if "model" in values:
      values["model"] = RandomModel(**values["model"])
    try:
      found[name] = _SECTIONS[name](**values)
    except UserError as error:
      problems.append(str(error))
  if problems:
    raise UserError("; ".join(problems))
  return found
