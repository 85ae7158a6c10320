"""Rows of JSON files: lines, a list, or an object that holds the list.

Not by `datasets`, which knows no lines and gives every row the keys of all the others
as null: at the top always, in a tool's arguments once they were structs.
"""

from collections.abc import Iterator
from pathlib import Path

from okd_jax.data import unpack
from okd_jax.data.columns import KEYS
from okd_jax.data.shard import Row
from okd_jax.data.values import FORMS_HELP, loads
from okd_jax.errors import UserError

# Lists that a single row may hold, so that an object with one is no list of rows.
_LISTS = {"messages", "conversations", "prompt", "completion", "output", "response"}
_LISTS |= {"tools", "teacher_messages"}


def read_lines(path: Path) -> Iterator[Row]:
  """Rows of a file with a JSON value on each line; blank lines are passed over.

  Raises:
    UserError: for a line that is no JSON, or a file without any.
  """
  empty = True
  for number, line in enumerate(unpack.lines(path), 1):
    if line.strip():
      empty, where = False, f"{path}:{number}"
      yield loads(line, where, "line"), where
  if empty:
    raise UserError(f"{path}: the file is empty; {FORMS_HELP}")


def read_json(path: Path) -> Iterator[Row]:
  """Rows of a file that is a JSON list, an object that holds one, or JSON lines.

  Raises:
    UserError: for what is no JSON, or a file without any.
  """
  if not _is_one_value(path):
    yield from read_lines(path)
    return
  value = loads(unpack.whole(path), str(path), "file")
  for i, row in enumerate(_rows_in(value), 1):
    yield row, f"{path}: record {i}"


def _is_one_value(path: Path) -> bool:
  """Whether a file is one JSON value, and no lines of them."""
  full = (line for line in unpack.lines(path) if line.strip())
  first = next(full, b"").strip()
  if not first.startswith((b"[", b"{")):
    return False
  if first.startswith(b"["):
    return True
  try:
    row = loads(first, str(path), "line")
  except UserError:
    return True  # an object over several lines
  return next(full, None) is None and _rows_in(row) != [row]


def _rows_in(value: object) -> list[object]:
  """The rows in a list, or in the only list that an object holds; else the value."""
  if isinstance(value, list):
    return value
  if not isinstance(value, dict):
    return [value]
  if any(isinstance(value.get(key), str) for key in KEYS):  # a row that has lists, too
    return [value]
  held = {key: rows for key, rows in value.items() if isinstance(rows, list)}
  [(key, rows), *others] = held.items() or [("", [])]
  if others or not held or key in _LISTS or not all(isinstance(r, dict) for r in rows):
    return [value]
  return rows
