"""The sections about who takes part: teachers, the student, and adapters."""

import dataclasses
from collections.abc import Iterator, Sequence

from okd_jax.config.section import DTYPES, Section, among, least
from okd_jax.errors import UserError
from okd_jax.methods.base import TokenWeight
from okd_jax.models import adapters, even_layers

STUDENT = "student"  # teacher.path of a teacher that is the student itself
INT8 = "int8"  # of a frozen teacher's kernels


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomModel(Section):
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
class TeacherSettings(Section):
  """A single teacher: a model, what adapted it, what of it was stored or is kept."""

  path: str = ""
  adapter: str = ""
  cache: str = ""
  trunk: str = ""
  dtype: str = ""
  model: RandomModel = RandomModel()

  def problems(self) -> Iterator[str]:
    """What no run could use, each in a sentence; as in the base class."""
    yield from among("teacher.dtype", self.dtype or "float32", (*DTYPES, INT8))
    if self.adapter and not self.path:
      yield "teacher.adapter adapts what teacher.path names; set it, too"
    if self.path and self.model.wanted:
      yield "set teacher.path or teacher.model.hidden_size, not both"
    if self.itself:
      for key in ("adapter", "cache", "trunk", "dtype"):
        if getattr(self, key):
          yield (
            f"teacher.{key}={getattr(self, key)}: under teacher.path=student the "
            "teacher is what the student is; leave it out"
          )

  @property
  def itself(self) -> bool:
    """Whether the teacher is the student itself, with a module or another prompt."""
    return self.path == STUDENT

  @property
  def named(self) -> bool:
    """Whether there is a teacher, or what one said."""
    return bool(self.path or self.cache or self.model.wanted)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudentAdapterSettings(Section):
  """What is trained in place of the student's own weights; LoRA checks the rest."""

  kind: str = ""
  rank: int = 32
  scale: float = 1.0
  targets: Sequence[str] = ("query", "value")
  layers: int = 0

  def problems(self) -> Iterator[str]:
    """What no run could use, each in a sentence; as in the base class."""
    if self.kind not in ("", adapters.Lora.kind):
      yield f"student.adapter.kind={self.kind!r} must be 'lora' or empty"
    elif self.kind:
      try:
        adapters.make(**vars(self))
      except UserError as error:
        yield str(error).replace("adapter.", "student.adapter.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudentSettings(Section):
  """Where the student starts, and what of it is trained."""

  path: str = ""
  layers: int = 0
  which_layers: str = "even"
  width: float = 1.0
  frozen: str = ""
  dtype: str = ""
  adapter: StudentAdapterSettings = StudentAdapterSettings()
  model: RandomModel = RandomModel()

  @property
  def in_part(self) -> bool:
    """Whether some of it stays as it is."""
    return bool(self.frozen or self.adapter.kind)

  @property
  def from_teacher(self) -> bool:
    """Whether it starts from some of the teacher's layers, or from a part of each."""
    return self.layers > 0 or bool(self._numbers) or self.narrow

  @property
  def narrow(self) -> bool:
    """Whether it has fewer heads and MLP channels than the teacher."""
    return self.width != 1

  @property
  def _numbers(self) -> list[int]:
    """Those of which_layers, if it lists any."""
    found = self.which_layers.replace(" ", "").split(",")
    return [int(n) for n in found] if all(map(str.isdecimal, found)) else []

  def taken(self, total: int) -> list[int]:
    """The numbers of the layers to start from, of a teacher with `total`: if it does.

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
    return numbers or even_layers(total, wanted or total)

  def problems(self) -> Iterator[str]:
    """What no run could use, each in a sentence; as in the base class."""
    starts = {
      "student.path": self.path,
      "student.layers or width": self.from_teacher,
      "student.model.hidden_size": self.model.hidden_size,
    }
    given = [key for key, wanted in starts.items() if wanted]
    if len(given) != 1:
      yield (
        "say where the student starts by exactly one of student.path, student.layers "
        f"or width, and student.model.hidden_size (set: {', '.join(given) or 'none'})"
      )
    if not 0 < self.width <= 1:  # NaN, too
      yield f"student.width={self.width} must be above 0 and at most 1"
    yield from least(self, "student", layers=0)
    yield from self._problems_in_part()
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

  def _problems_in_part(self) -> Iterator[str]:
    yield from among("student.dtype", self.dtype or "float32", (*DTYPES, INT8))
    if self.frozen:
      try:
        adapters.Part(self.frozen)
      except UserError as error:
        yield str(error)
    if self.frozen and self.adapter.kind:
      yield (
        f"student.frozen={self.frozen!r}: with student.adapter.kind="
        f"{self.adapter.kind} all of the student's weights stay already; set one"
      )
    if self.dtype and not self.in_part:
      yield (
        f"student.dtype={self.dtype} is of weights that stay, and all are trained; set "
        "student.adapter.kind=lora or student.frozen, too"
      )
    elif self.dtype == INT8 and self.frozen:
      yield "student.dtype=int8 needs student.adapter.kind=lora, not student.frozen"


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterSettings(Section):
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
    yield from least(self, "adapter", lr_scale=0, every=1)
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
