"""The tensors of a Hugging Face folder, under the names that the family's table has.

Nothing is executed: safetensors alone, no pickle. Whoever saved a model may have
wrapped it (`torch.compile`, a data-parallel module), saved it without its head, or as a
part of a larger one; the names tell.
"""

import io
import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors

from okd_jax.errors import UserError
from okd_jax.models.formats import parts
from okd_jax.models.formats.families import Family
from okd_jax.models.formats.parts import Bounds
from okd_jax.runtime.files import read_json

HEAD = "lm_head.weight"
_NUMPY = {
  "F64": np.dtype(np.float64),
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(jnp.bfloat16),
}
FLOATS = tuple(_NUMPY)
_SMALL = 64  # bytes
_BLOCK = 8 << 20  # bytes that are read at once
_ROWS = 1024  # that are compared at once
_COMPILED = "_orig_mod."  # torch.compile puts it anywhere


def open_safetensors(path: Path) -> safetensors.safe_open:
  """`safetensors.safe_open` for numpy; a UserError for a damaged file."""
  try:
    return safetensors.safe_open(path, framework="np")
  except (safetensors.SafetensorError, OSError) as error:
    raise UserError(
      f"{path} is no readable safetensors file (damaged or cut short?): {error}"
    ) from error


class Tensors:
  """The tensors of a folder by name, whichever of its files they are in.

  name: the folder; shapes: of all that the family does not ignore.
  """

  whole = False

  def __init__(self, folder: Path, family: Family, part: bool = False) -> None:
    """Reads the names and shapes.

    part: whether the family's model is a part of a larger one, the rest of which does
      not matter.

    Raises:
      UserError: for files that are missing or damaged, and for quantised weights.
    """
    self.name, self._place, self.shapes = str(folder), {}, {}
    files = {path.name: _File(path) for path in weight_files(folder)}
    found = {name: file for file in files for name in files[file].headers}
    for theirs, name in table_names(found, family, part).items():
      if re.search(family.ignored, name):
        continue
      if name in self._place:
        raise UserError(
          f"{folder}: {theirs} and {self._place[name][1]} are both {name}; which is "
          "meant cannot be told"
        )
      file = files[found[theirs]]
      header = file.headers[theirs]
      if header["dtype"] not in FLOATS:
        raise UserError(
          f"{file.path}: {theirs} is {header['dtype']}, not one of "
          f"{', '.join(FLOATS)}; quantised weights are not supported"
        )
      self._place[name] = file, theirs
      self.shapes[name] = tuple(header["shape"])

  def read(self, name: str, bounds: Bounds) -> np.ndarray:
    """What of a tensor lies within the bounds; no more is read of its file."""
    file, theirs = self._place[name]
    return file.read(theirs, bounds)

  def equal(self, one: str, other: str) -> bool:
    """Whether two tensors hold the same; each process of a run compares a share."""
    shape = self.shapes[one]
    if not shape or shape != self.shapes[other]:
      return False
    rows, rest = range(0, shape[0], _ROWS), tuple((0, size) for size in shape[1:])
    return all(
      np.array_equal(*(self.read(name, (block, *rest)) for name in (one, other)))
      for block in ((i, min(i + _ROWS, shape[0])) for i in _share(rows))
    )

  def rename(self, name: str, new: str) -> None:
    """Puts a tensor under another name."""
    self._place[new], self.shapes[new] = self._place.pop(name), self.shapes.pop(name)

  def drop(self, name: str) -> None:
    """Leaves a tensor out."""
    del self._place[name], self.shapes[name]


class _File:
  """A safetensors file, of which parts of tensors are read.

  A header of JSON, its length before it, says where each tensor lies; the library
  checks that, and maps files into memory as a whole, which here a reader of a part does
  not want.

  headers: of each tensor its dtype, shape and place, by name.
  """

  def __init__(self, path: Path) -> None:
    """Reads the header; a UserError if the file is damaged."""
    open_safetensors(path)
    self.path = path
    with path.open("rb") as file:
      length = int.from_bytes(file.read(8), "little")
      self.headers: dict[str, Any] = json.loads(file.read(length))
    self.headers.pop("__metadata__", None)
    self._start = 8 + length

  def read(self, name: str, bounds: Bounds) -> np.ndarray:
    """The part of a tensor within the bounds."""
    header = self.headers[name]
    dtype, shape = _NUMPY[header["dtype"]], header["shape"]
    start = self._start + header["data_offsets"][0]
    with self.path.open("rb", buffering=0) as file:
      return _read_part(file, start, dtype, shape, bounds)


def _read_part(
  file: io.FileIO, start: int, dtype: np.dtype, shape: Sequence[int], bounds: Bounds
) -> np.ndarray:
  """A part of the array at `start`, whose rows lie one behind the other.

  Pieces of rows are read one by one, but for those that are so small that a call costs
  more than its bytes: then some whole rows at once, of which they are taken.
  """
  out = np.empty(parts.sizes(bounds), dtype)
  if not out.ndim:
    _fill(file, start, out)
    return out
  (first, last), *rest = bounds
  row = math.prod(shape[1:]) * dtype.itemsize
  low, high = rest[0] if len(rest) == 1 else (0, 0)
  if (high - low) * dtype.itemsize >= _SMALL and high - low < shape[1]:
    for i in range(first, last):
      _fill(file, start + i * row + low * dtype.itemsize, out[i - first])
    return out
  step = max(1, _BLOCK // max(row, 1))
  piece = tuple(slice(*each) for each in rest)
  for i in range(first, last, step):
    block = np.empty((min(step, last - i), *shape[1:]), dtype)
    _fill(file, start + i * row, block)
    out[i - first : i - first + len(block)] = block[:, *piece]
  return out


def _fill(file: io.FileIO, start: int, array: np.ndarray) -> None:
  """Reads an array's bytes from `start` on; the header said that they are there."""
  view = memoryview(array.reshape(-1).view(np.uint8))
  done = 0
  while done < len(view):
    read = os.preadv(file.fileno(), [view[done:]], start + done)
    if not read:
      raise UserError(f"{file.name} has become shorter while it was read")
    done += read


def _share(blocks: range) -> range:
  """Those of this process."""
  return blocks[jax.process_index() :: jax.process_count()]


def table_names(names: Iterable[str], family: Family, part: bool) -> dict[str, str]:
  """{name in the files: name in the table}, of a part's own tensors alone.

  The prefix is what stands before the embedding's name, or before the first layer's
  where no embedding is stored.
  """
  plain = {name: name.replace(_COMPILED, "") for name in names}
  [embedding] = (w.name for w in family.weights if w.path == "embed/embedding")
  layer = f"{family.layers}.0."
  prefixes = _before(embedding, plain.values(), end=True)
  prefixes = prefixes or _before(layer, plain.values(), end=False)
  whole = [p for p in prefixes if any(n.startswith(p + layer) for n in plain.values())]
  prefix = min(whole or prefixes, key=len, default=None)
  if prefix is None:
    return plain
  renamed = {}
  for theirs, name in plain.items():
    if name == HEAD or name.endswith("." + HEAD):
      renamed[theirs] = HEAD
    elif name.startswith(prefix):
      renamed[theirs] = family.prefix + name.removeprefix(prefix)
    elif not part:
      renamed[theirs] = name
  return renamed


def _before(text: str, names: Iterable[str], end: bool) -> set[str]:
  """What stands before `text` in the names that have it after a dot or alone."""
  pattern = re.compile(rf"(.*\.|){re.escape(text)}" + "$" * end)
  return {match[1] for name in names if (match := pattern.match(name))}


def weight_files(folder: Path) -> list[Path]:
  """The safetensors files of a folder.

  Raises:
    UserError: if there are none, or the index names what is not in the folder.
  """
  index = folder / "model.safetensors.index.json"
  if (folder / "model.safetensors").exists():
    return [folder / "model.safetensors"]
  if index.exists():
    return [folder / name for name in _indexed(index)]
  if any(folder.glob("*.bin")):
    raise UserError(
      f"{folder} holds pickled weights only, which are not read because a pickle can "
      "run code; convert them with save_pretrained(safe_serialization=True)"
    )
  raise UserError(f"{folder} holds no weights: there is no model.safetensors")


def _indexed(index: Path) -> list[str]:
  """The files that an index names: of its own folder, and there."""
  weight_map: Any = read_json(index).get("weight_map")
  names = list(weight_map.values()) if isinstance(weight_map, dict) else []
  if not names:
    raise UserError(f"{index} names no files; its weight_map must name one a tensor")
  for name in names:
    own = isinstance(name, str) and name.endswith(".safetensors")
    if not own or Path(name).name != name:
      raise UserError(f"{index} names {name!r}, which is no file of its own folder")
  missing = [name for name in sorted(set(names)) if not (index.parent / name).exists()]
  if missing:
    raise UserError(f"{index} names files that are not there: {', '.join(missing)}")
  return sorted(set(names))
