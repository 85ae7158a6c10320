"""The head of a GGUF file, walked once before the `gguf` package reads it.

The package believes what a file says of itself: a list of 2^60 numbers it goes through
one by one, past the file's end. Here every length is held against what is left of the
file, and every tensor against where it would lie.

    'GGUF', version, number of tensors, number of fields
    fields:  name, type, value; a list's value is its elements' type, length, elements
    tensors: name, number of axes, sizes, type, place behind the head
"""

import math
import struct
from collections.abc import Callable
from pathlib import Path

from okd_jax.errors import UserError

_MOST = 1 << 22  # elements of a list, fields, tensors: vocabularies are smaller
_LONGEST = 1 << 24  # bytes of a text
_AXES = 4
_STRING, _LIST = 8, 9
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes


class _Walk:
  """A file's bytes, one piece behind the other."""

  def __init__(self, path: Path) -> None:
    self.file, self.left = path.open("rb"), path.stat().st_size
    self.order = "<"

  def take(self, count: int) -> bytes:
    if count > self.left:
      raise ValueError(f"it ends {count - self.left:,} bytes too early")
    self.left -= count
    return self.file.read(count)

  def number(self, kind: str) -> int:
    """One of struct's kinds: I is 4 bytes, Q is 8."""
    size = struct.calcsize(self.order + kind)
    return struct.unpack(self.order + kind, self.take(size))[0]

  def skip(self, count: int) -> None:
    if count > self.left:
      raise ValueError(f"it ends {count - self.left:,} bytes too early")
    self.left -= count
    self.file.seek(count, 1)

  def count(self, what: str, size: int, most: int = _MOST) -> int:
    """How many things follow of so many bytes each, at least."""
    found = self.number("Q")
    if found > most or found * size > self.left:
      raise ValueError(f"it says that it holds {found:,} {what}")
    return found

  def text(self) -> str:
    return self.take(self.count("bytes of text", 1, _LONGEST)).decode()


def check(path: Path, size_of: Callable[[int], tuple[int, int]]) -> None:
  """Walks through the head of a file.

  Args:
    size_of: gives, for the number of a tensor's type, the values in a block and the
      block's bytes; ValueError or KeyError for one that is none.

  Raises:
    UserError: for a file that says of itself what cannot be.
  """
  walk = _Walk(path)
  try:
    with walk.file:
      _check(walk, size_of)
  except (ValueError, KeyError, OverflowError, struct.error) as error:
    raise UserError(
      f"{path} is no readable GGUF file (damaged or cut short?): {error}"
    ) from error


def _check(walk: _Walk, size_of: Callable[[int], tuple[int, int]]) -> None:
  if walk.take(4) != b"GGUF":
    raise ValueError("it does not begin with GGUF")
  version = walk.take(4)
  walk.order = "<" if int.from_bytes(version, "little") & 0xFFFF else ">"
  tensors, fields = walk.count("tensors", 24), walk.count("fields", 13)
  for _ in range(fields):
    walk.text()
    _skip_value(walk, walk.number("I"))
  ends = [_end_of_tensor(walk, size_of) for _ in range(tensors)]
  if (end := max(ends, default=0)) > walk.left:
    raise ValueError(f"its tensors end {end - walk.left:,} bytes behind it")


def _skip_value(walk: _Walk, kind: int) -> None:
  if kind == _STRING:
    walk.text()
  elif kind != _LIST:
    walk.skip(_SIZES[kind])
  elif (inner := walk.number("I")) == _STRING:
    for _ in range(walk.count("texts", 8)):
      walk.text()
  elif inner == _LIST:
    raise ValueError("it has a list of lists")
  else:
    walk.skip(walk.count("numbers", _SIZES[inner]) * _SIZES[inner])


def _end_of_tensor(walk: _Walk, size_of: Callable[[int], tuple[int, int]]) -> int:
  """Where a tensor ends, in bytes behind the head."""
  name, axes = walk.text(), walk.number("I")
  if not 0 < axes <= _AXES:
    raise ValueError(f"{name[:80]!r} has {axes} axes")
  sizes = [walk.number("Q") for _ in range(axes)]
  block, nbytes = size_of(walk.number("I"))
  if not all(sizes) or sizes[0] % block:
    raise ValueError(f"{name[:80]!r} has the sizes {sizes}")
  return walk.number("Q") + math.prod(sizes) // block * nbytes
