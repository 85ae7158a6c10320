"""Rows of .csv and .tsv files: every cell is text, an empty one is absent.

Not by pandas or `datasets`, which read 007 as 7 and NA as nothing.
"""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

from okd_jax.data import unpack
from okd_jax.data.shard import Row
from okd_jax.data.values import FORMS_HELP, decode
from okd_jax.errors import UserError

_LONGEST = (1 << 31) - 1  # characters of a cell; Python's own limit is 131,072


def read_csv(path: Path, delimiter: str = ",") -> Iterator[Row]:
  """Rows of a table whose first line names the columns.

  Raises:
    UserError: for a header with a name missing or twice, a row with more or fewer
      cells than the header, and whatever Python's csv module refuses.
  """
  csv.field_size_limit(_LONGEST)
  table = _cells(path, csv.reader(_text(path), delimiter=delimiter, strict=True))
  names, where = next(table, ([], ""))
  if not names:
    raise UserError(f"{path}: the file is empty; {FORMS_HELP}")
  _check_names(names, where)
  for cells, where in table:
    if len(cells) != len(names):
      raise UserError(
        f"{where}: has {len(cells)} cells, but the header has {len(names)} columns; "
        "quote cells that hold the delimiter or a line break"
      )
    yield {k: v or None for k, v in zip(names, cells, strict=True)}, where


def _cells(path: Path, reader: Iterator[list[str]]) -> Iterator[tuple[list[str], str]]:
  """The cells of each row and the line that it begins on; blank lines have none."""
  while True:
    where = f"{path}:{reader.line_num + 1}"
    try:
      cells = next(reader, None)
    except csv.Error as error:
      raise UserError(
        f"{where}: not a valid row of a table ({error}); fix its quotes"
      ) from error
    if cells is None:
      return
    if cells:
      yield cells, where


def _text(path: Path) -> Iterator[str]:
  for number, line in enumerate(unpack.lines(path), 1):
    yield decode(line, f"{path}:{number}") + "\n"


def _check_names(names: Sequence[str], where: str) -> None:
  for i, name in enumerate(names):
    if not name.strip():
      raise UserError(f"{where}: column {i + 1} has no name; the first line names all")
    if name in names[:i]:
      raise UserError(f"{where}: two columns are named {name!r}; rename one of them")
