"""What a number, a word or a list in somebody's file may be, before it is used.

One table a kind of file says it for each of its fields: config.json's, GGUF's, an
adapter's. Bounds are those of machines, not of taste: far beyond what is published, and
small enough that nothing is built that could not be.
"""

import math
import numbers
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

WHOLE, NUMBER, SWITCH, TEXT = "a whole number", "a number", "true or false", "text"
LIST, OBJECT = "a list", "an object"
_SHOWN = 40  # characters of a value in a message


class Bound(NamedTuple):
  """What a field may hold.

  kind: one of the above; a list's elements are of the kind `of`, if that is said.
  least, most: of a number, or of a list's elements, if these are numbers.
  """

  kind: str
  least: float = -math.inf
  most: float = math.inf
  of: str = ""

  def fits(self, value: Any) -> bool:
    """Whether a value may stand there."""
    if self.kind == LIST:
      inner = self._replace(kind=self.of, of="")
      listed = isinstance(value, list | tuple)
      return listed and (not self.of or all(map(inner.fits, value)))
    if not isinstance(value, _TYPES[self.kind]):
      return False
    if self.kind in (WHOLE, NUMBER):
      # In this order: what is compared may be too large to be a float.
      within = self.least <= value <= self.most and not isinstance(value, bool)
      return within and math.isfinite(value)
    return True

  def __str__(self) -> str:
    if self.kind == LIST:
      return f"a list, each {self._replace(kind=self.of, of='')}" if self.of else LIST
    if self.kind not in (WHOLE, NUMBER) or math.isinf(self.most):
      return self.kind
    if math.isinf(self.least):
      return f"{self.kind} of at most {_plain(self.most)}"
    return f"{self.kind} from {_plain(self.least)} to {_plain(self.most)}"


def whole(least: int, most: int) -> Bound:
  """A whole number between the two, or one of them."""
  return Bound(WHOLE, least, most)


def at_most(most: int) -> Bound:
  """A whole number, of which others say how small it may be."""
  return Bound(WHOLE, most=most)


def number(least: float, most: float) -> Bound:
  """A number between the two, or one of them; no NaN."""
  return Bound(NUMBER, least, most)


def problems(
  values: Mapping[str, Any], bounds: Mapping[str, Bound], prefix: str = ""
) -> Iterator[str]:
  """A sentence for each value that is not what its bound says; null is absence.

  >>> list(problems({"rank": "8", "layers": None}, {"rank": whole(1, 64)}))
  ["rank='8' must be a whole number from 1 to 64"]
  """
  for name, bound in bounds.items():
    value = values.get(name)
    if value is not None and not bound.fits(value):
      yield f"{prefix}{name}={shown(value)} must be {bound}"


def shown(value: Any) -> str:
  """A value for a message."""
  if isinstance(value, int) and value.bit_length() > 128:
    return "a very large number"  # which Python may not even write
  text = repr(value[:_SHOWN] if isinstance(value, str | list | tuple) else value)
  return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _plain(bound: float) -> str:
  return f"{bound:,}" if isinstance(bound, int) else f"{bound:g}"


_TYPES: dict[str, type | tuple[type, ...]] = {
  WHOLE: numbers.Integral,
  NUMBER: numbers.Real,
  SWITCH: bool,
  TEXT: str,
  OBJECT: dict,
}
