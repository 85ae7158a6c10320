"""Which shards a source stands for: files, folders, patterns; hub ids go to `hub`."""

import functools
import glob
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from okd_jax.data import embedded, hub
from okd_jax.data.arrow_rows import read_arrow, read_parquet
from okd_jax.data.csv_rows import read_csv
from okd_jax.data.json_rows import read_json, read_lines
from okd_jax.data.shard import (
  Row,
  Shard,
  digest_of_files,
  digest_of_text,
  make_shard,
)
from okd_jax.data.unpack import PACKED, whole
from okd_jax.data.values import FORMS_HELP, decode
from okd_jax.errors import UserError
from okd_jax.runtime.files import local

_log = logging.getLogger("okd_jax")


def shards(source: str, streamed: bool = False) -> list[Shard]:
  """The shards of one source, whatever it is, in the order that they are read.

  source: a file, a folder, a pattern such as 'data/**/*.jsonl', a hub id, 'embedded'.
  streamed: whether what lies on the hub is read there, and not fetched as a whole.

  Raises:
    UserError: if there is no such source, or no data in a folder.
  """
  path = local(source)
  base, split = hub.split_of(source)
  if path.is_file():
    return [_of_file(path)]
  if base == "embedded":
    return [_of_embedded(source, split or "train")]
  folder = path if path.is_dir() else local(base)
  if folder.is_dir():
    return _of_folder(folder, "" if folder == path else split)
  if glob.has_magic(base):  # and not source: a split may be train[:10]
    return [_of_file(found) for found in _matching(source, path)]
  # Some can only have been meant as a path, and the hub is not asked for them.
  if base.startswith((".", "/", "~")) or base.endswith((*_READERS, *PACKED)):
    raise UserError(f"{source}: no such file or folder")
  return hub.streamed_shards(source) if streamed else hub.hub_shards(source)


def _read_text(path: Path) -> Iterator[Row]:
  content = whole(path)
  if not content.strip():
    raise UserError(f"{path}: the file is empty; {FORMS_HELP}")
  yield {"text": decode(content, str(path))}, str(path)


_TEXTS: dict[str, Callable[[Path], Iterator[Row]]] = {
  ".jsonl": read_lines,
  ".ndjson": read_lines,
  ".json": read_json,
  ".csv": read_csv,
  ".tsv": functools.partial(read_csv, delimiter="\t"),
  ".txt": _read_text,
}
_READERS = _TEXTS | {".parquet": read_parquet, ".arrow": read_arrow}
_KINDS = (
  f"{', '.join(_TEXTS)} (each also with {' or '.join(PACKED)}), .parquet or .arrow"
)


def _of_file(path: Path) -> Shard:
  reader = _reader(path)
  if not reader:
    raise UserError(f"{path}: not a known kind of data file; use {_KINDS}")
  digest = functools.partial(digest_of_files, [path])
  return make_shard(str(path), functools.partial(reader, path), digest)


def _reader(path: Path) -> Callable[[Path], Iterator[Row]] | None:
  """What reads a file of this name."""
  suffix = path.suffix.lower()
  if suffix in PACKED:
    return _TEXTS.get(path.with_suffix("").suffix.lower())
  return _READERS.get(suffix)


def _of_embedded(source: str, split: str) -> Shard:
  read = functools.partial(embedded.rows, split)
  read()  # there may be no such split
  return make_shard(source, read, functools.partial(_digest_of_embedded, split))


def _digest_of_embedded(split: str) -> str:
  return digest_of_text(repr(row) for row in embedded.rows(split))


def _matching(source: str, pattern: Path) -> list[Path]:
  """The files that a pattern stands for, by name."""
  paths = [Path(name) for name in glob.glob(str(pattern), recursive=True)]
  files = sorted({path for path in paths if path.is_file()})
  if not files:
    raise UserError(f"{source}: no file has a name like that")
  return _wanted(files)


def _of_folder(folder: Path, split: str) -> list[Shard]:
  """Shards of a folder: one that `save_to_disk` wrote, or one of data files."""
  names = {path.name for path in folder.iterdir()}
  if "dataset_dict.json" in names or {"dataset_info.json", "state.json"} <= names:
    return hub.saved_shards(folder, split)
  files = _wanted(sorted(path for path in folder.iterdir() if _is_data(path)))
  if not files:
    raise UserError(
      f"{folder}: the folder holds no data file and was not written by "
      f"datasets.save_to_disk; data files are {_KINDS}"
    )
  wanted = re.compile(re.escape(split or "train") + r"([^a-zA-Z].*)?")
  chosen = [path for path in files if wanted.fullmatch(path.name)]
  if split and not chosen:
    raise UserError(
      f"{folder}: no data file of split {split!r}; found "
      + ", ".join(path.name for path in files)
    )
  if chosen and len(chosen) < len(files):
    _log.info(
      "data: %s: reading %s alone; name a file, or FOLDER:SPLIT, for the others",
      folder,
      ", ".join(path.name for path in chosen),
    )
  return [_of_file(path) for path in chosen or files]


def _is_data(path: Path) -> bool:
  return path.is_file() and _reader(path) is not None


def _wanted(found: Sequence[Path]) -> list[Path]:
  """Files but for those that lie there by accident, which are told of.

  Hidden files are a file manager's or a killed writer's, and a file beside its own .gz
  or .zst is the same rows again.
  """
  kept, bare = [], {path for path in found if path.suffix.lower() not in PACKED}
  for path in found:
    plain = path if path in bare else path.with_suffix("")
    twin = next((plain.with_name(plain.name + x) for x in PACKED), None)
    if path.name.startswith("."):
      _log.info("data: %s is hidden: left out", path)
    elif path != plain and plain in bare:
      _log.info(
        "data: %s stands beside the file without %s: left out", path, path.suffix
      )
    elif path != plain and path != twin and twin in found:
      _log.info("data: %s stands beside its %s: left out", path, twin.suffix)
    else:
      kept.append(path)
  return kept
