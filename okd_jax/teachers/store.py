"""Arrays for every token of a dataset, on disk: what need not be computed twice.

    DIR/made_from.json        a store is refused where that differs (`runtime.workdir`)
    DIR/00000032.safetensors  some of the rows: their numbers `rows` [n], where each one
                              ends, `ends` [n], and each array, rows joined, [T, ...]

A file appears whole or not at all and carries a checksum, so a writer that was killed
goes on with the rows that are missing. Several processes write different rows; what is
read is mapped into memory, row by row.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, Shaped
from safetensors.numpy import save_file

from okd_jax.errors import UserError
from okd_jax.models.formats.tensors import open_safetensors
from okd_jax.runtime.workdir import check_made_from, claim, made_from

# The texts of each row of a batch, by their numbers.
Texts = Sequence[Sequence[int]] | Int[np.ndarray, "B N"]

_SUM = "sha256"


class Store:
  """The arrays of the rows 0 to count - 1, as `begin` said what they are.

  key: what must equal what the folder was begun with; it may be a part of that.

  Raises:
    UserError: if the folder holds no store or one of something else, or damaged files.
  """

  def __init__(self, folder: str | os.PathLike, count: int, key: Mapping[str, Any]):
    self.folder, self.count = Path(folder), count
    if not self.folder.is_dir():
      raise UserError(f"{folder} does not exist; name a folder that holds a store")
    check_made_from(self.folder, dict(key) | {"rows": count}, "folder")
    self.about = made_from(self.folder)
    self._files, self._where = {}, {}
    self.reload()

  def reload(self) -> None:
    """Takes up the files that have come since; each is checked once."""
    for path in sorted(self.folder.glob("[0-9]*.safetensors")):
      if path.name not in self._files:
        self._add(path)

  def _add(self, path: Path) -> None:
    file = open_safetensors(path)
    tensors = {name: file.get_tensor(name) for name in file.keys()}
    if (file.metadata() or {}).get(_SUM) != _checksum(tensors):
      raise UserError(f"{path} is damaged; delete it, and what wrote it writes it anew")
    if not _fit_together(tensors):
      raise UserError(f"{path} holds arrays that do not fit together; delete it")
    ends = tensors["ends"].tolist()
    for row, start, end in zip(
      tensors["rows"].tolist(), [0, *ends[:-1]], ends, strict=True
    ):
      self._where[row] = (path.name, start, end)
    self._files[path.name] = file

  @property
  def name(self) -> str:
    return str(self.folder)

  @property
  def bytes(self) -> int:
    return sum((self.folder / name).stat().st_size for name in self._files)

  def missing(self) -> list[int]:
    """The rows that are not there yet, ascending."""
    return [row for row in range(self.count) if row not in self._where]

  def write(
    self,
    rows: Sequence[int],
    arrays: Sequence[Mapping[str, Shaped[np.ndarray, "_ ..."]]],
  ) -> None:
    """Adds a file of some missing rows, one mapping of arrays by name for each."""
    joined = {name: np.concatenate([row[name] for row in arrays]) for name in arrays[0]}
    lengths = [len(next(iter(row.values()))) for row in arrays]
    joined |= {"rows": np.array(rows), "ends": np.cumsum(lengths)}
    path = self.folder / f"{rows[0]:08d}.safetensors"
    temporary = path.with_name(f".{path.name}.tmp")
    save_file(joined, temporary, {_SUM: _checksum(joined)})
    os.replace(temporary, path)
    self._add(path)

  def read(
    self, texts: Texts, where: Bool[np.ndarray, "B L"]
  ) -> dict[str, Shaped[np.ndarray, "B L ..."]]:
    """A batch of what is stored of the texts of each row, 0 where there is none.

    where: the positions that have values, text after text.

    Raises:
      UserError: if a row is missing, or has another number of tokens.
    """
    return _spread(self.row, self.name, texts, where)

  def row(self, index: int) -> dict[str, Shaped[np.ndarray, "T ..."]]:
    """The arrays of one row by name; a UserError if it is missing."""
    if index not in self._where:
      raise UserError(f"{self.folder} lacks row {index}; let what writes it finish")
    name, start, end = self._where[index]
    file = self._files[name]
    keys = sorted({*file.keys()} - {"rows", "ends"})
    return {key: file.get_slice(key)[start:end] for key in keys}


class Memory:
  """Like `Store`, for one process and one run: nothing is written."""

  def __init__(self, count: int, name: str):
    self.count, self.name = count, name
    self._rows = {}

  @property
  def bytes(self) -> int:
    return sum(x.nbytes for row in self._rows.values() for x in row.values())

  def reload(self) -> None:
    pass

  def missing(self) -> list[int]:
    return [row for row in range(self.count) if row not in self._rows]

  def write(self, rows: Sequence[int], arrays: Sequence[Mapping[str, Any]]) -> None:
    self._rows.update(zip(rows, arrays, strict=True))

  def read(
    self, texts: Texts, where: Bool[np.ndarray, "B L"]
  ) -> dict[str, Shaped[np.ndarray, "B L ..."]]:
    return _spread(self._rows.__getitem__, self.name, texts, where)


def _spread(
  find: Callable[[int], Mapping[str, Shaped[np.ndarray, "T ..."]]],
  name: str,
  texts: Texts,
  where: Bool[np.ndarray, "B L"],
) -> dict[str, Shaped[np.ndarray, "B L ..."]]:
  """The texts' arrays at their places in a batch."""
  out: dict[str, np.ndarray] = {}
  for i, indices in enumerate(texts):
    found = [find(int(index)) for index in indices]
    for key in found[0]:
      values = np.concatenate([arrays[key] for arrays in found])
      if len(values) != where[i].sum():
        raise UserError(
          f"{name}: row {', '.join(map(str, indices))} has {len(values)} tokens there, "
          f"but {where[i].sum()} in this run"
        )
      if key not in out:
        out[key] = np.zeros((*where.shape, *values.shape[1:]), values.dtype)
      out[key][i][where[i]] = values
  return out


def begin(folder: str | os.PathLike, count: int, about: Mapping[str, Any]) -> Store:
  """The store that `about` describes, as JSON; begun if it is not there.

  Every process calls it.

  Raises:
    UserError: if the folder holds something else.
  """
  folder = Path(folder)
  if folder.exists() and not folder.is_dir():
    raise UserError(f"{folder} is a file; name an empty folder")
  folder.mkdir(parents=True, exist_ok=True)
  claim(folder, dict(about) | {"rows": count}, "folder")
  return Store(folder, count, about)


def _fit_together(tensors: Mapping[str, np.ndarray]) -> bool:
  """Whether a file's arrays are those of the rows that it names, one behind the other.

  Its checksum says that it is as somebody wrote it, and not who.
  """
  if not {"rows", "ends"} < tensors.keys():
    return False
  rows, ends = tensors["rows"], tensors["ends"]
  counts = all(x.ndim == 1 and np.issubdtype(x.dtype, np.integer) for x in (rows, ends))
  if not counts or not len(rows) or rows.shape != ends.shape or rows.min() < 0:
    return False
  rest = [x for name, x in tensors.items() if name not in ("rows", "ends")]
  # A row of which nothing is stored ends where it begins.
  ascending = ends[0] >= 0 and (np.diff(ends) >= 0).all()
  return bool(ascending) and all(x.ndim and len(x) == ends[-1] for x in rest)


def digest(parts: Iterable[bytes]) -> str:
  """SHA-256 of byte strings, each with its length, as hexadecimal digits."""
  total = hashlib.sha256()
  for part in parts:
    total.update(len(part).to_bytes(8, "little"))
    total.update(part)
  return total.hexdigest()


def _checksum(tensors: Mapping[str, np.ndarray]) -> str:
  return digest(
    part
    for name in sorted(tensors)
    for part in (name.encode(), np.ascontiguousarray(tensors[name]).tobytes())
  )
