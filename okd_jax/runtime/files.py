"""Files and folders that appear whole or not at all, and JSON that is checked."""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from okd_jax.errors import UserError

DEPTH = 100  # of JSON
_DEEP = f"it is nested more than {DEPTH} levels deep"


def local(path: str | os.PathLike) -> Path:
  """A path as people write it: a ~ at its front is their home.

  Raises:
    UserError: for what no file can be called, or the home of nobody.
  """
  name = os.fspath(path)
  try:
    if b"\0" in os.fsencode(name):
      raise UserError(f"{name!r} cannot be a path: it holds a NUL byte")
    return Path(path).expanduser()
  except UnicodeEncodeError as error:
    raise UserError(f"{name!r} cannot be a path: {error.reason}") from error
  except RuntimeError:
    raise UserError(
      f"{name}: there is no such user; write ./{name} for a file of that name"
    ) from None


def cache_folder() -> Path:
  """Where this project keeps what can be made again."""
  return local(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "okd_jax"


def write_text(path: str | os.PathLike, text: str) -> None:
  """Writes beside `path`, then takes its place; makes the folder if it must."""
  write_bytes(path, text.encode())


def write_bytes(path: str | os.PathLike, content: bytes) -> None:
  """As `write_text`."""
  path = local(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f".{path.name}.tmp")
  temporary.write_bytes(content)
  os.replace(temporary, path)


def write_json(path: str | os.PathLike, value: Any, sort_keys: bool = False) -> None:
  """Writes JSON; with sorted keys equal values give equal bytes."""
  write_text(path, json.dumps(value, indent=2, sort_keys=sort_keys) + "\n")


def parse_json(text: str) -> Any:
  """What JSON says, if it is not nested so deeply that whoever walks it would fall.

  Raises:
    ValueError: if it is no JSON, or deeper than `DEPTH` lists and objects.
  """
  try:
    value = json.loads(text)
  except RecursionError:
    raise ValueError(_DEEP) from None
  level, depth = [value], 0
  while level and text.count("[") + text.count("{") > DEPTH:
    level = [x for v in level if isinstance(v, list | dict) for x in _inside(v)]
    depth += 1
    if depth > DEPTH:
      raise ValueError(_DEEP)
  return value


def _inside(value: list | dict) -> Iterable[Any]:
  return value.values() if isinstance(value, dict) else value


def read_json(path: str | os.PathLike) -> dict[str, Any]:
  """The object in a JSON file.

  Raises:
    UserError: if there is no such file, or no object in it.
  """
  path = local(path)
  try:
    value = parse_json(path.read_text("utf-8"))
  except FileNotFoundError:
    raise UserError(f"{path} does not exist") from None
  except (ValueError, OSError) as error:
    raise UserError(f"{path} is no readable JSON file: {error}") from error
  if not isinstance(value, dict):
    raise UserError(f"{path} holds no JSON object")
  return value


def aside(path: Any) -> Any:
  """Renames a file or folder to damaged-NAME, or damaged-NAME-2, …; where it is now.

  path: a `Path` or an `epath.Path`.
  """
  names = (f"damaged-{path.name}{n}" for n in ["", *(f"-{i}" for i in range(2, 1000))])
  free = next(place for place in map(path.with_name, names) if not place.exists())
  path.rename(free)
  return free


def remove_folder(folder: Path) -> None:
  """Removes a folder and what it holds; one that is not there is no error."""
  shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def replacing(folder: str | os.PathLike, ours: re.Pattern) -> Iterator[Path]:
  """A new folder that takes the place of `folder` once the block has ended well.

  Raises:
    UserError: if `folder` holds a file whose name `ours` does not match: it would
      be lost.
  """
  folder = local(folder).absolute()
  _refuse_foreign(folder, ours)
  partial, old = (folder.with_name(f".{folder.name}.{x}") for x in ("partial", "old"))
  for leftover in (partial, old):  # of a killed run
    shutil.rmtree(leftover, ignore_errors=True)
  partial.mkdir(parents=True)
  try:
    yield partial
  except BaseException:
    shutil.rmtree(partial, ignore_errors=True)
    raise
  if folder.exists():
    folder.rename(old)
  partial.rename(folder)
  shutil.rmtree(old, ignore_errors=True)


def _refuse_foreign(folder: Path, ours: re.Pattern) -> None:
  if not folder.exists():
    return
  if not folder.is_dir():
    raise UserError(f"{folder} is a file; name a folder to write to")
  foreign = sorted(p.name for p in folder.iterdir() if not ours.fullmatch(p.name))
  if foreign:
    raise UserError(
      f"{folder} holds other files ({', '.join(foreign)}); "
      "name a new folder or one that was written here"
    )
