"""Whether a run is finished: its report is there, and all else is as it left it."""

import logging
from pathlib import Path

from okd_jax.errors import UserError
from okd_jax.run import seal
from okd_jax.runtime import agreement, checksums
from okd_jax.runtime.files import aside, read_json
from okd_jax.runtime.workdir import Workdir, barrier, writes

_log = logging.getLogger(__name__)


def write(workdir: Workdir) -> None:
  """Keeps the digests of what the run has left."""
  if writes():
    workdir.write_json(workdir.finished, {"files": _digests(workdir)})


def whole(workdir: Workdir) -> bool:
  """Whether nothing is left to do; all processes call it.

  What is not as the run left it is told of, and set aside where it is a folder: the
  last checkpoint makes it again.

  Raises:
    UserError: if there is no checkpoint to make it from.
  """
  if not workdir.report.exists():
    return False
  wrong = _wrong(workdir) if writes() else []
  if not agreement.any_of(bool(wrong)):
    return True
  if not seal.steps(workdir.checkpoints):
    raise UserError(
      f"{workdir.path}: not all is as the finished run left it, and there is no "
      "checkpoint to make it from; name another workdir to run anew"
    )
  for folder in sorted({name.partition("/")[0] for name in wrong if "/" in name}):
    if (workdir.path / folder).exists():
      _log.warning("set aside as %s", aside(workdir.path / folder))
  barrier("what is damaged is set aside")
  return False


def _wrong(workdir: Workdir) -> list[str]:
  """The files that are gone or others than the run left, each told of."""
  if not workdir.finished.exists():
    if not seal.steps(workdir.checkpoints):
      return []  # of before there were digests
    _log.warning("%s is gone: the run's end is made again", workdir.finished)
    return [workdir.finished.name]
  try:
    left = dict(read_json(workdir.finished)["files"])
  except (UserError, KeyError, TypeError, ValueError):
    _log.warning("%s is damaged: the run's end is made again", workdir.finished)
    return [workdir.finished.name]
  found = _digests(workdir)
  wrong = [name for name in left if found.get(name) != left[name]]
  for name in wrong:
    what = "not as the run left it" if name in found else "gone"
    _log.warning("%s is %s: it is made again", workdir.path / name, what)
  return wrong


def _digests(workdir: Workdir) -> dict[str, str]:
  return {
    path.relative_to(workdir.path).as_posix(): checksums.of_file(path)
    for place in workdir.left
    for path in _files(place)
  }


def _files(place: Path) -> list[Path]:
  if place.is_file():
    return [place]
  return sorted(path for path in place.rglob("*") if path.is_file())
