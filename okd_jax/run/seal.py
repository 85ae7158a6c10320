"""What lies in a checkpoint beside its arrays and says what they were.

    N/seal/seal.json   checksums of all arrays, the data's position, the metrics, what
                       the run was made from, digests of files; and its own digest
    N/seal/FILE        a copy of each small file of the workdir that grows with the run

It is written with the arrays, so a checkpoint that is there has one.
"""

import asyncio
import dataclasses
import functools
import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from etils import epath

from okd_jax.errors import UserError
from okd_jax.runtime import checksums, files
from okd_jax.runtime.workdir import Workdir, barrier, writes

Place = Path | epath.Path
NAME = "seal"  # of the folder, and of what Orbax saves
_FILE = "seal.json"
_METADATA = "_CHECKPOINT_METADATA"
_log = logging.getLogger(__name__)


class Damaged(Exception):
  """A checkpoint is not as it was written; the message says what of it."""


@dataclasses.dataclass(frozen=True)
class Seal:
  """What a checkpoint was when it was written.

  arrays: checksums by path; position: the loader's; identity: what the run was made
    from (`identity.of`); copies: digests of the files beside, by name; watched: those
    of files of the workdir that are too large to be copied, by path in it.
  """

  arrays: dict[str, str]
  position: Any
  metrics: dict[str, float] | None
  identity: dict[str, Any]
  copies: dict[str, str]
  watched: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Beside:
  """Of which workdir a checkpoint is, and what its run was made from.

  check: raises a UserError where no more is to be written.
  """

  workdir: Workdir
  identity: Mapping[str, Any]
  check: Callable[[], None]


class Sealing:
  """A seal as Orbax saves it; what takes time is done in the background.

  arrays: as `checksums.begun` gives them.
  """

  def __init__(
    self,
    arrays: dict[str, Any],
    position: Any,
    metrics: Mapping[str, float] | None,
    beside: Beside | None,
  ):
    self._arrays, self._beside = arrays, beside
    self._rest = {"position": position, "metrics": dict(metrics) if metrics else None}
    # Later steps write on: the copies are of now.
    kept = beside.workdir.grown if beside and writes() else ()
    self._copies = {path.name: path.read_bytes() for path in kept if path.exists()}

  async def save(self, directory: Any) -> Awaitable[None]:
    """Orbax's way to ask for it."""
    return self._save(directory)

  async def load(self, directory: Any) -> Awaitable[None]:
    """Orbax wants one; `read` reads without it."""
    raise NotImplementedError

  async def _save(self, directory: Any) -> None:
    folder = await directory.await_creation()
    if writes():
      await asyncio.to_thread(self._write, folder)

  def _write(self, folder: Place) -> None:
    for name, content in self._copies.items():
      (folder / name).write_bytes(content)
    seal = Seal(
      arrays=checksums.told(self._arrays),
      identity=dict(self._beside.identity) if self._beside else {},
      copies={name: checksums.of_bytes(c) for name, c in self._copies.items()},
      watched=digests(self._beside.workdir) if self._beside else {},
      **self._rest,
    )
    body = json.dumps(dataclasses.asdict(seal), sort_keys=True)
    digest = checksums.of_bytes(body.encode())
    (folder / _FILE).write_text(json.dumps({"sha256": digest, "seal": body}) + "\n")


def read(checkpoint: Place) -> Seal | None:
  """The seal of a checkpoint's folder; None of one from before there were seals.

  Raises:
    Damaged: if the small files in the folder are not as they were written.
  """
  handlers = _json(checkpoint / _METADATA).get("item_handlers", {})
  if NAME not in handlers and not (checkpoint / NAME).exists():
    return None
  raw = _json(checkpoint / NAME / _FILE)
  try:
    body = raw["seal"]
    sound = checksums.of_bytes(body.encode()) == raw["sha256"]
    seal = Seal(**json.loads(body)) if sound else None
  except (KeyError, TypeError, AttributeError, ValueError):
    seal = None
  if seal is None:
    raise Damaged(f"{NAME}/{_FILE} is not as it was written")
  position, metrics = checkpoint / "data/position.json", checkpoint / "metrics/metrics"
  if seal.position is not None and _json(position, object) != seal.position:
    raise Damaged("data/position.json is not as it was written")
  if seal.metrics is not None and _json(metrics) != seal.metrics:
    raise Damaged("metrics/metrics is not as it was written")
  for name in seal.copies:
    copy(checkpoint, seal, name)
  return seal


def metrics_of(checkpoint: Place) -> dict[str, float] | None:
  """The metrics that a checkpoint was saved with, None without any.

  Raises:
    Damaged: as `read` does.
  """
  sealed, path = read(checkpoint), checkpoint / "metrics/metrics"
  if sealed is not None:
    return sealed.metrics
  return _json(path) if path.exists() else None


def copy(checkpoint: Place, seal: Seal, name: str) -> bytes:
  """What a file of the workdir was when the checkpoint was written.

  Raises:
    Damaged: if the copy is another.
  """
  try:
    content = (checkpoint / NAME / name).read_bytes()
  except OSError as error:
    raise Damaged(f"{NAME}/{name} cannot be read") from error
  if checksums.of_bytes(content) != seal.copies[name]:
    raise Damaged(f"{NAME}/{name} is not as it was written")
  return content


def newest(checkpoints: Place) -> tuple[Place, Seal] | None:
  """The newest checkpoint with a whole seal, and that."""
  for step in sorted(steps(checkpoints), reverse=True):
    try:
      seal = read(checkpoints / str(step))
    except Damaged:
      continue
    if seal is not None:
      return checkpoints / str(step), seal
  return None


def steps(checkpoints: Place) -> list[int]:
  """The steps with a folder, damaged or not; none of those that were never finished."""
  if not checkpoints.is_dir():
    return []
  found = [path for path in checkpoints.iterdir() if path.name.isdecimal()]
  if "://" in str(checkpoints):  # nothing can be renamed there: this file comes last
    found = [path for path in found if (path / "commit_success.txt").exists()]
  return sorted(int(path.name) for path in found)


def put_back(workdir: Workdir, checkpoint: Place, seal: Seal, fixed: bool) -> None:
  """Makes files of the workdir again what they were at a checkpoint.

  All processes call it. It tells of what was lost or damaged; that a killed run had
  written further is nothing to tell of.

  fixed: only those that stay as they are from a run's first step on.
  """
  for path in workdir.fixed if fixed else workdir.grown:
    if not writes() or path.name not in seal.copies:
      continue
    content = copy(checkpoint, seal, path.name)
    found = path.read_bytes() if path.is_file() else None
    if found == content:
      continue
    files.write_bytes(path, content)
    if fixed or not _further(found, content):
      _log.info("%s: put back as it was at step %s", path, checkpoint.name)
  barrier("files put back")


def _further(found: bytes | None, content: bytes) -> bool:
  """Whether a file may be what it was at a checkpoint, gone on with since."""
  try:
    rewritten = isinstance(json.loads(found or b""), dict)
  except ValueError:
    rewritten = False
  return rewritten or (found or b"").startswith(content)


def check_watched(workdir: Workdir, seal: Seal) -> None:
  """Refuses files of the workdir that a run reads and that are others now.

  Raises:
    UserError: that names one.
  """
  found = digests(workdir)
  for name, digest in seal.watched.items():
    if found.get(name) != digest:
      what = "is gone" if name not in found else "is not as the run has written it"
      raise UserError(
        f"{workdir.path / name} {what}, and the run would not end as it began; put it "
        "back, or name another workdir"
      )


def digests(workdir: Workdir) -> dict[str, str]:
  """Digests of the files that are not copied, by path in the workdir."""
  return {
    path.relative_to(workdir.path).as_posix(): _digest(path, *_stamp(path))
    for path in workdir.watched
  }


def _stamp(path: Path) -> tuple[int, int]:
  found = path.stat()
  return found.st_size, found.st_mtime_ns


@functools.lru_cache(maxsize=1000)
def _digest(path: Path, size: int, modified: int) -> str:
  """Of a file as it is; once, while size and time stay."""
  return checksums.of_file(path)


def _json(path: Place, kind: type = dict) -> Any:
  try:
    value = json.loads(path.read_bytes())
  except (OSError, ValueError) as error:
    raise Damaged(f"{path.parent.name}/{path.name} cannot be read") from error
  if not isinstance(value, kind):
    raise Damaged(f"{path.parent.name}/{path.name} cannot be read")
  return value
