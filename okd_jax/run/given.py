"""Rows that came from Python, written to the file that their run reads."""

import datetime
import itertools
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from okd_jax.data.values import cause, short, type_name
from okd_jax.errors import UserError
from okd_jax.runtime.workdir import Workdir, barrier, writes

_DATES = datetime.date | datetime.time  # a datetime is a date, too


def data_sources(data: Any, place: Path, folder: str, name: str) -> str | list[str]:
  """What data.train or data.eval says of some data; of rows, where they are written.

  Args:
    data: a source or a list of them, or rows: any iterable of dicts, that is read once
      and never held as a whole.
    place: the run's workdir.
    folder: of it, where rows are written to.
    name: 'train' or 'eval'.

  Raises:
    UserError: for what is no data, rows that cannot be written, and rows that are not
      those of the run in `place`.
  """
  if isinstance(data, str):
    return data
  if isinstance(data, os.PathLike):
    return _text([os.fspath(data)])
  if isinstance(data, Mapping) or hasattr(data, "columns"):
    raise UserError(
      f"the {name} data is a table or several parts; give its rows, such as "
      "frame.to_dict('records') or parts['train']"
    )
  if not isinstance(data, Iterable):
    raise UserError(f"the {name} data is {type_name(data)}, not rows or a path")
  rows = iter(data)
  first = next(rows, None)
  if first is None:
    raise UserError(f"the {name} data holds no rows")
  rows = itertools.chain([first], rows)
  if isinstance(first, str | os.PathLike):
    return _text(_paths(rows, name))
  path = place / folder / f"{name}.jsonl"
  _keep(_lines(rows, name), path, place, name)
  return _text([str(path)])


def _paths(rows: Iterable[Any], name: str) -> list[str]:
  found = list(rows)
  if wrong := [one for one in found if not isinstance(one, str | os.PathLike)]:
    raise UserError(
      f"the {name} data has paths and {type_name(wrong[0])}; give either paths or rows"
    )
  return [os.fspath(one) for one in found]


def _text(sources: Sequence[str]) -> str | list[str]:
  """Sources as on a command line, unless a name has a comma."""
  return list(sources) if any("," in one for one in sources) else ",".join(sources)


def _keep(lines: Iterator[bytes], path: Path, place: Path, name: str) -> None:
  """Writes the lines, or finds that a run which has begun has the same.

  Every process reads them all, so that all of them fail if one row is bad.
  """
  if Workdir(place).config.exists() and path.exists():
    same = _holds(path, lines)
    barrier(f"{name} data read")
    if not same:
      raise UserError(
        f"{place} holds a run with other {name} data than what is given here; name "
        "another workdir"
      )
    return
  barrier(f"{name} data to be written")
  if writes():
    _write(path, lines)
  else:
    for _ in lines:
      pass
  barrier(f"{name} data given")


def _holds(path: Path, lines: Iterator[bytes]) -> bool:
  with path.open("rb") as file:
    return all(own == given for own, given in itertools.zip_longest(file, lines))


def _write(path: Path, lines: Iterator[bytes]) -> None:
  """Beside the file first, so that it appears whole or not at all."""
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(f".{path.name}.tmp")
  try:
    with partial.open("wb") as file:
      file.writelines(lines)
    os.replace(partial, path)
  finally:
    partial.unlink(missing_ok=True)


# Rows as JSON


def _lines(rows: Iterable[Any], name: str) -> Iterator[bytes]:
  for i, row in enumerate(rows, 1):
    where = f"row {i} of the {name} data"
    if not isinstance(row, Mapping):
      raise UserError(f"{where} is {type_name(row)}, not a dict")
    try:
      text = json.dumps(_plain(row, where, ""), ensure_ascii=False)
      yield text.encode() + b"\n"
    except (ValueError, RecursionError) as error:  # half a surrogate pair, a circle
      raise UserError(f"{where} is no record ({cause(error)})") from error


def _plain(value: Any, where: str, key: str) -> Any:
  """A value as JSON has it: arrays as lists, dates as text; what is not there as null.

  key: its place in the row, for messages.
  """
  if isinstance(value, np.ndarray | np.generic):
    value = value.tolist()
  if isinstance(value, Mapping):
    for name in value:
      if not isinstance(name, str):
        raise UserError(f"{where} is no record: its key {short(name)} is no text")
    inside = f"{key}." if key else ""
    return {k: _plain(v, where, inside + k) for k, v in value.items()}
  if isinstance(value, list | tuple):
    return [_plain(v, where, f"{key}[{i}]") for i, v in enumerate(value)]
  if isinstance(value, float):
    return value if math.isfinite(value) else None  # what pandas puts for nothing
  if isinstance(value, _DATES):
    return value.isoformat()
  if isinstance(value, bytes | bytearray):
    raise UserError(
      f"{where} is no record: {key!r} is bytes; decode it, or leave the column out"
    )
  if value is None or isinstance(value, str | int):
    return value
  raise UserError(
    f"{where} is no record: {key!r} is {type_name(value)}; turn it into text, numbers "
    "or lists, or leave the column out"
  )
