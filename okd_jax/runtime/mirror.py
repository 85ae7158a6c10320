"""Workdirs on a store that is no file system: gs://, s3://, whatever fsspec opens.

A run works in a folder of this machine that is kept equal to the store's: what others
have written comes down when the processes wait for each other, what is new here goes up
then, at every checkpoint and at the end. An object appears whole or not at all. Where
both differ at the start, the store is right.

Checkpoints on gs:// do not pass through here: Orbax writes them there itself, each
process its own part. On other stores they are copied like all else, which is for runs
of one process.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
import fsspec
import jax
from etils import epath

from okd_jax.errors import UserError
from okd_jax.runtime.files import cache_folder, local, remove_folder, write_json

_ORBAX = "gs://"  # where Orbax itself writes
_CHECKPOINTS = "checkpoints"
# They say that the rest is there.
_LAST = ("_CHECKPOINT_METADATA", "finished.json", "report.html")
_log = logging.getLogger("okd_jax")
_open: list["Mirror"] = []  # written to
_read: list["Mirror"] = []


@contextlib.contextmanager
def opened(place: str) -> Iterator[Path]:
  """The folder to work in for a workdir: itself, or the copy of one on a store.

  All processes of a run call it.

  Raises:
    UserError: for a store that cannot be read.
  """
  if "://" not in place:
    yield local(place)
    return
  mirror = Mirror(place)
  if mirror.system is None:
    yield mirror.folder
    return
  with _alone(mirror):
    mirror.pull(begin=True)
    _open.append(mirror)
    try:
      yield mirror.folder
    finally:
      mirror.push()
      _open.remove(mirror)


@contextlib.contextmanager
def _alone(mirror: "Mirror") -> Iterator[None]:
  """Refuses a second run of this machine in the same copy."""
  mirror.folder.parent.mkdir(parents=True, exist_ok=True)
  lock = filelock.FileLock(f"{mirror.folder}.lock")
  try:
    lock.acquire(timeout=0)
  except filelock.Timeout:
    raise UserError(
      f"{mirror.url}: another run of this machine works in it; wait for its end"
    ) from None
  try:
    yield
  finally:
    lock.release()


def copies_checkpoints() -> bool:
  """Whether a run is open whose checkpoints go to a store by `push`."""
  return any(not mirror.url.startswith(_ORBAX) for mirror in _open)


def push() -> None:
  """Puts what is new here where it belongs; without a store nothing happens."""
  for mirror in _open:
    mirror.push()


def pull() -> None:
  """Fetches what other processes have put there."""
  for mirror in _open:
    mirror.pull()


def checkpoints_of(workdir: Path) -> "Path | epath.Path":
  """The folder of a workdir's checkpoints, which Orbax writes."""
  for mirror in [*_open, *_read]:
    if mirror.url.startswith(_ORBAX) and workdir.is_relative_to(mirror.folder):
      own = workdir.relative_to(mirror.folder)
      return epath.Path(mirror.url) / own / _CHECKPOINTS
  return workdir / _CHECKPOINTS


def original(path: Path) -> "Path | _Object":
  """A file of a workdir where it belongs: on the store, if that is of a store."""
  for mirror in _open:
    if path.is_relative_to(mirror.folder):
      own = path.relative_to(mirror.folder).as_posix()
      return _Object(mirror.system, f"{mirror._root}/{own}")
  return path


def fetched(place: str, checkpoints: bool = True) -> Path:
  """The folder itself, or a copy of one on a store as it is now, to read from.

  checkpoints: whether they are wanted, too.

  Raises:
    UserError: for a store that cannot be read, or a folder on one that is not there.
  """
  if "://" not in place:
    return local(place)
  mirror = Mirror(place, checkpoints, "read")
  if mirror.system is not None:
    mirror.pull(begin=True)
  if not mirror.folder.exists() or not any(mirror.folder.iterdir()):
    raise UserError(f"{place}: there is no such folder")
  _read.append(mirror)
  return mirror.folder


@dataclasses.dataclass(frozen=True)
class _Object:
  """A file on a store, as much of a `Path` as a small one needs."""

  system: Any
  name: str

  def read_bytes(self) -> bytes:
    self.system.invalidate_cache()
    return self.system.cat_file(self.name)

  def write_text(self, text: str) -> None:
    self.system.pipe_file(self.name, text.encode())

  def unlink(self) -> None:
    self.system.rm_file(self.name)

  def __str__(self) -> str:
    return self.system.unstrip_protocol(self.name)


@dataclasses.dataclass
class _Known:
  """A file as it was when both sides were equal: its token there, its stamp here."""

  there: str
  here: tuple[int, int]


class Mirror:
  """A folder on a store and its copy.

  url: of the folder; folder: the copy, or the folder itself where that is a file://.
  A run and those who read its folder have copies of their own.
  """

  def __init__(self, url: str, checkpoints: bool = True, use: str = "run"):
    if url.endswith("://"):
      raise UserError(f"{url} names no folder")
    self.url, self._checkpoints = url.rstrip("/"), checkpoints
    try:
      self.system, self._root = fsspec.url_to_fs(self.url)
    except (ValueError, ImportError, OSError) as error:
      raise UserError(f"{url}: cannot be opened: {error}") from error
    if "file" in _protocols(self.system):
      self.system, self.folder = None, Path(self._root)
      return
    name = hashlib.sha256(f"{self.url} {checkpoints} {use}".encode()).hexdigest()[:16]
    place = cache_folder() / "workdirs" / name
    self.folder = place / str(jax.process_index())
    self._list = place / f"{jax.process_index()}.json"
    if jax.process_count() > 1 and not self.url.startswith(_ORBAX):
      raise UserError(
        f"{url}: the checkpoints of several processes need a folder that all of them "
        "see, or gs://"
      )
    self._known = self._read_list()

  def pull(self, begin: bool = False) -> None:
    """Makes the copy equal to the store.

    begin: also where something has changed or come here meanwhile; else that stays, to
      be put there.
    """
    self.folder.mkdir(parents=True, exist_ok=True)
    there = self._there()
    if not begin and self._known and not there:
      raise UserError(f"{self.url} is gone; what was in it is in {self.folder}")
    for name, token in there.items():
      known, path = self._known.get(name), self.folder / name
      same = known and known.there == token
      if not same or not path.exists() or (begin and known.here != _stamp(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.system.get_file(f"{self._root}/{name}", str(path))
        self._known[name] = _Known(token, _stamp(path))
    for name in [name for name in self._known if name not in there]:
      (self.folder / name).unlink(missing_ok=True)
      del self._known[name]
    if begin:
      self._remove_unknown()
    self._write_list()

  def push(self) -> None:
    """Puts new and changed files there, and removes what was removed here."""
    names, own = self._here(), f".{jax.process_index()}-of-"
    wanted = [n for n in names if own in n] if jax.process_index() else names
    for name in sorted(wanted, key=lambda n: (n.startswith(_CHECKPOINTS), _is_last(n))):
      with contextlib.suppress(FileNotFoundError):  # gone since it was listed
        self._put(name)
    # What has taken their place is there by now; first goes what made them whole.
    gone = [n for n in self._known if n not in set(names)]
    for name in [] if jax.process_index() else sorted(gone, key=_is_last, reverse=True):
      with contextlib.suppress(FileNotFoundError):
        self.system.rm_file(f"{self._root}/{name}")
      del self._known[name]
    self._write_list()

  def _put(self, name: str) -> None:
    path, known = self.folder / name, self._known.get(name)
    stamp, target = _stamp(path), f"{self._root}/{name}"
    if known and known.here == stamp:
      return
    self.system.makedirs(target.rpartition("/")[0], exist_ok=True)
    self.system.put_file(str(path), target)
    self._known[name] = _Known(_token(self.system.info(target)), stamp)

  def _there(self) -> dict[str, str]:
    """{name: token} of the store's files but for checkpoints that Orbax sees to."""
    self.system.invalidate_cache()
    try:
      found = self.system.find(self._root, detail=True)
    except FileNotFoundError:
      return {}
    except OSError as error:
      raise UserError(f"{self.url}: cannot be read: {error}") from error
    names = {path[len(self._root) :].strip("/"): at for path, at in found.items()}
    return {name: _token(at) for name, at in names.items() if self._ours(name)}

  def _here(self) -> list[str]:
    files = (p for p in self.folder.rglob("*") if p.is_file())
    names = (p.relative_to(self.folder).as_posix() for p in files)
    return sorted(name for name in names if self._ours(name))

  def _ours(self, name: str) -> bool:
    """Whether a file is kept equal; hidden ones, and what Orbax is writing, are not."""
    parts = name.split("/")
    unfinished = any(part.startswith(".") or "checkpoint-tmp" in part for part in parts)
    wanted = self._checkpoints and not self.url.startswith(_ORBAX)
    return not unfinished and (wanted or _CHECKPOINTS not in parts)

  def _remove_unknown(self) -> None:
    for path in sorted(self.folder.rglob("*"), reverse=True):
      name = path.relative_to(self.folder).as_posix()
      if path.is_file() and name not in self._known:
        path.unlink()
      elif path.is_dir() and not any(path.iterdir()):
        remove_folder(path)

  def _read_list(self) -> dict[str, _Known]:
    try:
      raw = json.loads(self._list.read_text("utf-8"))
      return {n: _Known(there, tuple(here)) for n, (there, here) in raw.items()}
    except (OSError, ValueError, TypeError, AttributeError):
      return {}  # then all is fetched

  def _write_list(self) -> None:
    write_json(self._list, {n: (k.there, k.here) for n, k in self._known.items()})


def _is_last(name: str) -> bool:
  return name.rpartition("/")[2] in _LAST


def _stamp(path: Path) -> tuple[int, int]:
  found = path.stat()
  return found.st_size, found.st_mtime_ns


def _token(info: dict[str, Any]) -> str:
  """What changes with an object's contents, as far as its store says any such thing."""
  keys = ("etag", "ETag", "md5Hash", "generation", "mtime", "LastModified", "created")
  marks = [str(info[key]) for key in keys if info.get(key) is not None]
  return " ".join([str(info.get("size")), *marks[:1]])


def _protocols(system: Any) -> tuple[str, ...]:
  found = system.protocol
  return (found,) if isinstance(found, str) else tuple(found)
