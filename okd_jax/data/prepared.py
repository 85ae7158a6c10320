"""Tokenised rows in a folder that people name, made before the runs that read them.

    DIR/train, DIR/eval  rows as `rows.write` leaves them

DIR may be local or wherever fsspec writes to: gs://, s3://, memory://.
"""

import datetime
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import fsspec

from okd_jax.data import kept, rows
from okd_jax.data.kept import Making
from okd_jax.data.limits import Counts, summary
from okd_jax.data.rows import Rows
from okd_jax.data.shard import Shard
from okd_jax.data.values import cause, short
from okd_jax.errors import UserError
from okd_jax.runtime import files

_log = logging.getLogger("okd_jax")

PARTS = ("eval", "train")  # as they are written: where train is, all is there
# What must be as in the run that reads them; their data, code and libraries need not.
_SAME = ("tokenizer", "template", "teacher_template", "form", "parse", "others")
_MANY = ("data", "code", "versions", "others")


def write(
  output: str, part: str, shards: Sequence[Shard], making: Making, processes: int
) -> bool:
  """Makes the rows of one part, whole or not at all; False where they are there.

  Raises:
    UserError: if others are there, a row cannot be used, or nothing can be written.
  """
  folder = f"{output}/{part}"
  about = making.about() | {"data": [[s.name, s.digest()] for s in shards]}
  try:
    if "://" in output:
      new = not _there(folder, about)
      return new and _upload(folder, shards, making, about, processes)
    own = files.local(folder)
    own.parent.mkdir(parents=True, exist_ok=True)
    with kept.alone(own.with_name(f".{part}.lock")):
      if _there(folder, about):
        return False
      with files.replacing(own, kept.OURS) as partial:
        kept.write(partial, shards, making, about, processes)
  except (OSError, ImportError) as error:
    raise UserError(f"{folder}: cannot be written ({cause(error)})") from error
  return True


def _upload(
  folder: str,
  shards: Sequence[Shard],
  making: Making,
  about: Mapping[str, Any],
  processes: int,
) -> bool:
  """Makes the rows here and brings them there, what says that they are there last."""
  with tempfile.TemporaryDirectory() as here:
    kept.write(Path(here), shards, making, about, processes)
    system, path = fsspec.url_to_fs(folder)
    system.makedirs(path, exist_ok=True)
    for name in rows.FILES:
      system.put_file(f"{here}/{name}", f"{path}/{name}")
  return True


def _there(folder: str, about: Mapping[str, Any]) -> bool:
  """Whether the rows that are to be made are there; a UserError if it is others."""
  if not holds(folder):
    return False
  found = rows.read_about(folder)
  if changed := list(_differences(found, about, list(about))):
    raise UserError(
      f"{folder} holds rows that were made otherwise ({'; '.join(changed)}); name "
      "another --output"
    )
  return True


def holds(folder: str) -> bool:
  """Whether rows are there, whole.

  Raises:
    UserError: if nobody can tell.
  """
  try:
    system, path = fsspec.url_to_fs(rows.place(folder))
    return system.exists(f"{path}/{rows.FILES[-1]}")
  except (OSError, ValueError, ImportError) as error:
    raise UserError(f"{folder}: cannot be read ({cause(error)})") from error


def read(output: str, part: str, making: Making) -> tuple[Rows, dict[str, Any]]:
  """The rows of one part, and what is known of them all, as `kept.keep` gives them.

  Raises:
    UserError: if there are none, or they were made otherwise than by `making`, whatever
      their data.
  """
  folder = f"{output}/{part}"
  if not holds(folder):
    raise UserError(
      f"data.prepared={output}: there are no rows in {folder}; python -m "
      "okd_jax.prepare writes them"
    )
  about = rows.read_about(folder)
  if changed := list(_differences(about, making.about(), _SAME)):
    raise UserError(
      f"data.prepared={output}: {part} was made otherwise than this run asks for "
      f"({'; '.join(changed)}); prepare it anew, or put back what has changed"
    )
  try:
    counts = Counts(**about["counts"])
    _log.info("%s: %s", folder, summary(counts, making.form))
    _log.info("%s was made of %s", folder, ", ".join(_origin(about)))
    about["largest"], about["kinds"]  # that whoever reads them finds them
  except (KeyError, TypeError) as error:
    raise UserError(f"{folder}/{rows.FILES[-1]} is damaged ({error})") from error
  return rows.open_rows(folder), about


def day_of(output: str) -> datetime.date | None:
  """The day that the chat template wrote in the rows, None where it wrote none."""
  for part in PARTS:
    if holds(f"{output}/{part}"):
      if written := rows.read_about(f"{output}/{part}").get("day"):
        return datetime.date.fromisoformat(written)
  return None


def _origin(about: Mapping[str, Any]) -> Iterator[str]:
  """The sources and libraries of some rows, for people to read."""
  first, *others = about["sources"]
  yield f"{first} and {len(others)} more" if others else first
  yield from (f"{name} {version}" for name, version in about["versions"].items())


def _differences(
  there: Mapping[str, Any], here: Mapping[str, Any], keys: Sequence[str]
) -> Iterator[str]:
  """What differs under some keys, each in a few words."""
  for key in keys:
    one, other = there.get(key), here[key]
    if one == other:
      continue
    if isinstance(one, dict) and isinstance(other, dict):
      for name in sorted(one | other):
        was, now = (x.get(name) for x in (one, other))
        # A template may lie elsewhere as long as it says the same.
        if was != now and not (name in there and there[name] == here[name]):
          yield f"{name}={short(was)} there, {short(now)} here"
    else:
      yield f"{'other' if key in _MANY else 'another'} {key.replace('_', ' ')}"
