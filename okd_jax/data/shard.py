"""What a source is read in: shards, one for each of its files or data sets."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from okd_jax.data.values import FORMS_HELP, cause
from okd_jax.errors import UserError

Row = tuple[object, str]  # what was read, and where
Read = Callable[[], Iterable[Row]]

_DIGITS = 16


@dataclasses.dataclass(frozen=True)
class Shard:
  """One file or data set of a source.

  Attributes:
    name: what people call it.
    rows: reads its rows from the first on, a few at a time. A UserError names what
      cannot be read, and a shard that holds no rows at all.
    digest: a short hash of what it holds.
  """

  name: str
  rows: Callable[[], Iterator[Row]]
  digest: Callable[[], str]


def make_shard(name: str, read: Read, digest: Callable[[], str]) -> Shard:
  """A shard that is an error if `read` finds no rows."""
  return Shard(name, functools.partial(_filled, name, read), digest)


def _filled(name: str, read: Read) -> Iterator[Row]:
  empty = True
  for row in read():
    empty = False
    yield row
  if empty:
    raise UserError(f"{name}: holds no records; {FORMS_HELP}")


def digest_of_files(paths: Iterable[Path]) -> str:
  """A hash of what files hold, whatever they are called.

  Raises:
    UserError: for a file that cannot be read.
  """
  found = hashlib.sha256()
  for path in paths:
    try:
      with path.open("rb") as file:
        found.update(hashlib.file_digest(file, "sha256").digest())
    except OSError as error:
      raise UserError(f"{path}: cannot be read ({cause(error)})") from error
  return found.hexdigest()[:_DIGITS]


def digest_of_text(parts: Iterable[str]) -> str:
  """A hash of some texts in their order."""
  found = hashlib.sha256()
  for part in parts:
    content = part.encode("utf-8", "surrogatepass")
    found.update(len(content).to_bytes(8, "little") + content)
  return found.hexdigest()[:_DIGITS]
