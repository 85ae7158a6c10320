"""What every section of a configuration is: a frozen dataclass that checks itself."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from okd_jax.errors import UserError

DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
  """Raises a UserError that names all that is wrong with its keys."""

  def __post_init__(self):
    if problems := list(self.problems()):
      raise UserError("; ".join(problems))

  def problems(self) -> Iterator[str]:
    """What no run could use, each in a sentence; as in the base class."""
    yield from ()


def least(section: Any, prefix: str, **bounds: float) -> Iterator[str]:
  """A sentence for each field that is below its bound, or not a number."""
  for name, bound in bounds.items():
    value = getattr(section, name)
    if not value >= bound:  # so that NaN is caught, too
      yield f"{prefix}.{name}={value} must be at least {bound}"


def among(key: str, value: str, allowed: Sequence[str]) -> Iterator[str]:
  """A sentence if the value is none of those that are allowed."""
  if value not in allowed:
    yield f"{key}={value!r} must be one of {', '.join(allowed)}"
