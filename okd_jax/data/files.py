"""Raw rows of files and folders, each with its place; hub ids go to `hub`."""

import gzip
import json
import logging
import pathlib
import re
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

from okd_jax.data import embedded, hub
from okd_jax.data.hub import Row
from okd_jax.errors import UserError
from okd_jax.runtime.files import local

_log = logging.getLogger("okd_jax")

FORMS_HELP = (
  "a record has 'instruction' and 'output' (and 'input'), 'prompt' and 'completion', "
  "'messages', or 'text'"
)
_LFS = b"version https://git-lfs.github.com/spec/"
_SUFFIXES = (".jsonl", ".json", ".txt")


def read_source(source: str) -> Iterable[Row]:
  """Rows of one source, whatever it is."""
  path = local(source)
  base, split = hub.split_of(source)
  if path.is_file():
    return _read_file(path)
  if base == "embedded":
    return embedded.rows(split or "train")
  folder = path if path.is_dir() else local(base)
  if folder.is_dir():
    return _read_folder(folder, "" if folder == path else split)
  # Some can only have been meant as a path, and the hub is not asked for them.
  if base.startswith((".", "/", "~")) or base.endswith((*_SUFFIXES, ".gz")):
    raise UserError(f"{source}: no such file or folder")
  return hub.read_hub(source)


def _read_file(path: pathlib.Path) -> Iterable[Row]:
  """Rows of one file, by its suffix."""
  suffixes = [suffix.lower() for suffix in path.suffixes]
  if suffixes and suffixes[-1] == ".gz":
    suffixes.pop()
  suffix = suffixes[-1] if suffixes else ""
  if suffix not in _SUFFIXES:
    raise UserError(
      f"{path}: not a known kind of data file; use {', '.join(_SUFFIXES)} "
      "(each also with .gz)"
    )
  content = _read_bytes(path)
  if content.startswith(_LFS):
    raise UserError(
      f"{path}: is a pointer of git-lfs, not the file; fetch it with git lfs pull"
    )
  if not content.strip():
    raise UserError(f"{path}: the file is empty; {FORMS_HELP}")
  if suffix == ".txt":
    return [({"text": _decode(content, str(path))}, str(path))]
  if suffix == ".json" and content.lstrip().startswith(b"["):
    rows = loads(content, str(path), "file")
    return [(row, f"{path}: record {i}") for i, row in enumerate(rows, 1)]
  return _read_lines(content, str(path))


def _read_lines(content: bytes, name: str) -> Iterator[Row]:
  """Rows of JSON lines."""
  # Not str.splitlines(): U+2028 and its like are legal inside a JSON string.
  for number, line in enumerate(content.split(b"\n"), 1):
    if line.strip():
      where = f"{name}:{number}"
      yield loads(line, where, "line"), where


def _read_bytes(path: pathlib.Path) -> bytes:
  """A file's content, unzipped if it ends in .gz, without a byte order mark."""
  try:
    content = path.read_bytes()
    if path.suffix.lower() == ".gz":
      content = gzip.decompress(content)
  except (OSError, EOFError, zlib.error) as error:
    raise UserError(f"{path}: cannot be read ({hub.cause(error)})") from error
  return content.removeprefix(b"\xef\xbb\xbf")


def _decode(content: bytes, where: str) -> str:
  try:
    return content.decode("utf-8")
  except UnicodeDecodeError as error:
    raise UserError(
      f"{where}: not UTF-8 text ({error.reason} at byte {error.start + 1}); "
      "save the file as UTF-8"
    ) from error


def loads(content: bytes, where: str, what: str) -> Any:
  """Whatever JSON says; a UserError that names where, and what is to be mended."""
  try:
    return json.loads(_decode(content, where))
  except UserError:
    raise
  except json.JSONDecodeError as error:
    cause = f"{error.msg} at column {error.colno}"
    if what == "file":
      cause = f"{error.msg} at line {error.lineno} column {error.colno}"
  except (ValueError, RecursionError) as error:  # endless digits or nesting
    cause = hub.cause(error)
  raise UserError(f"{where}: not valid JSON ({cause}); fix or remove the {what}")


def _read_folder(folder: pathlib.Path, split: str) -> Iterable[Row]:
  """Rows of a folder: one that `save_to_disk` wrote, or one of jsonl files."""
  names = {path.name for path in folder.iterdir()}
  if "dataset_dict.json" in names or {"dataset_info.json", "state.json"} <= names:
    return hub.read_saved(folder, split)
  files = _data_files(folder)
  if not files:
    raise UserError(
      f"{folder}: the folder holds no .jsonl file and was not written by "
      "datasets.save_to_disk"
    )
  wanted = re.compile(re.escape(split or "train") + r"([^a-zA-Z].*)?")
  chosen = [path for path in files if wanted.fullmatch(path.name)]
  if split and not chosen:
    raise UserError(
      f"{folder}: no jsonl file of split {split!r}; found "
      + ", ".join(path.name for path in files)
    )
  if chosen and len(chosen) < len(files):
    _log.info(
      "data: %s: reading %s alone; name a file, or FOLDER:SPLIT, for the others",
      folder,
      ", ".join(path.name for path in chosen),
    )
  return [row for path in chosen or files for row in _read_file(path)]


def _data_files(folder: pathlib.Path) -> list[pathlib.Path]:
  """The jsonl files, but for what a folder holds by accident, which is told of.

  Hidden files are a file manager's or a killed writer's, and a file beside its own .gz
  is the same rows again.
  """
  found = sorted([*folder.glob("*.jsonl"), *folder.glob("*.jsonl.gz")])
  names = {path.name for path in found}
  hidden = [path for path in found if path.name.startswith(".")]
  twice = [
    path for path in found if path.name.removesuffix(".gz") in names - {path.name}
  ]
  for path in (*hidden, *twice):
    why = "is hidden" if path in hidden else "stands beside the file without .gz"
    _log.info("data: %s %s: left out", path, why)
  return [path for path in found if path not in hidden and path not in twice]
