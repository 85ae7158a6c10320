"""The tensors of a Hugging Face folder, under the names that the family's table has.

Nothing is executed: safetensors alone, no pickle. Whoever saved a model may have
wrapped it (`torch.compile`, a data-parallel module), saved it without its head, or as a
part of a larger one; the names tell.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from okd_jax.errors import UserError
from okd_jax.models.formats.families import Family
from okd_jax.runtime.files import read_json

HEAD = "lm_head.weight"
_FLOATS = ("F64", "F32", "F16", "BF16")
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

  shapes: of all that the family does not ignore.
  """

  def __init__(self, folder: Path, family: Family, part: bool = False) -> None:
    """Reads the names and shapes.

    part: whether the family's model is a part of a larger one, the rest of which does
      not matter.

    Raises:
      UserError: for files that are missing or damaged, and for quantised weights.
    """
    files = {path.name: open_safetensors(path) for path in weight_files(folder)}
    found = {name: file for file in files for name in files[file].keys()}
    self._place, self.shapes = {}, {}
    for theirs, name in table_names(found, family, part).items():
      if re.search(family.ignored, name):
        continue
      if name in self._place:
        raise UserError(
          f"{folder}: {theirs} and {self._place[name][1]} are both {name}; which is "
          "meant cannot be told"
        )
      file = found[theirs]
      header = files[file].get_slice(theirs)
      if header.get_dtype() not in _FLOATS:
        raise UserError(
          f"{folder / file}: {theirs} is {header.get_dtype()}, not one of "
          f"{', '.join(_FLOATS)}; quantised weights are not supported"
        )
      self._place[name] = files[file], theirs
      self.shapes[name] = tuple(header.get_shape())

  def read(self, name: str) -> np.ndarray:
    """One tensor."""
    file, theirs = self._place[name]
    return file.get_tensor(theirs)

  def rename(self, name: str, new: str) -> None:
    """Puts a tensor under another name."""
    self._place[new], self.shapes[new] = self._place.pop(name), self.shapes.pop(name)

  def drop(self, name: str) -> None:
    """Leaves a tensor out."""
    del self._place[name], self.shapes[name]


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
