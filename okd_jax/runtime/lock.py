"""One run at a time in a workdir: its file .lock says who works there.

The holder counts a number in it up, every ten seconds. Whether another run still lives
is known at once where its process would be one of this machine; of other machines,
whose processes and clocks say nothing here, and on whose file systems locks cannot be
trusted, it is known by the number: one that stands still for a minute has no run.
Process 0 of a run holds the lock for all of them.
"""

import contextlib
import datetime
import json
import logging
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from okd_jax.errors import UserError
from okd_jax.runtime import agreement, files, mirror
from okd_jax.runtime.workdir import writes

NAME = ".lock"
_BEAT, _SILENT, _DYING, _SETTLED = 10.0, 60.0, 3.0, 0.2  # seconds
_log = logging.getLogger(__name__)
_own: set[str] = set()  # marks of the locks that this process holds


@contextlib.contextmanager
def held(workdir: Path) -> Iterator[Callable[[], None]]:
  """Holds a workdir's lock; yields what raises a UserError once another run has it.

  All processes of a run call it. A workdir that it makes and that stays empty is gone
  again afterwards.

  Raises:
    UserError: if another run works there, or if the folder cannot be written.
  """
  lock, reason = _Lock(workdir), None
  if writes():
    try:
      lock.take()
    except UserError as error:
      reason = error
  if agreement.any_of(reason is not None):
    raise reason or UserError(f"{workdir}: process 0 may not work in it")
  try:
    yield lock.check
  finally:
    lock.release()


class _Lock:
  def __init__(self, workdir: Path):
    self._workdir, self._new = workdir, not workdir.exists()
    self._file, self._ended = mirror.original(workdir / NAME), threading.Event()
    self._mark, self._lost, self._thread = uuid.uuid4().hex, "", None
    self._said = _who() | {"since": datetime.datetime.now().isoformat(" ", "seconds")}

  def take(self) -> None:
    """Writes down that the workdir is ours, and goes on saying so.

    Raises:
      UserError: if another run works there, or if it cannot be written.
    """
    there = self._read()
    if there is not None:
      if self._lives(there):
        raise UserError(
          f"{self._workdir}: another run works in it ({_described(there)}); wait for "
          "its end, or name another workdir"
        )
      _log.info("%s: left by a run that was killed (%s)", self._file, _described(there))
    try:
      self._write(0)
    except OSError as error:
      raise _unwritable(self._workdir, error) from error
    time.sleep(_SETTLED)  # two that begin at once: the one that has written last
    if not self._is_own(self._read()):
      raise UserError(f"{self._workdir}: another run has just begun in it")
    _own.add(self._mark)
    self._thread = threading.Thread(target=self._beats, daemon=True)
    self._thread.start()

  def check(self) -> None:
    """Raises a UserError if another run has taken the workdir over."""
    if self._lost:
      raise UserError(
        f"{self._workdir}: another run has taken it over ({self._lost}), as this one "
        "had not been heard of for a minute; nothing more is written"
      )

  def release(self) -> None:
    """Says no more, and takes the file away; the folder, too, if it stayed empty."""
    if self._thread is None:
      return
    self._ended.set()
    self._thread.join()
    _own.discard(self._mark)
    with contextlib.suppress(OSError):
      if self._is_own(self._read()):
        self._file.unlink()
      if self._new:
        self._workdir.rmdir()  # which takes empty ones alone

  def _beats(self) -> None:
    number, told = 0, False
    while not self._ended.wait(_BEAT):
      number += 1
      there = self._read()
      if there is not None and not self._is_own(there):
        self._lost = _described(there)
        _log.error("%s: another run has taken over (%s)", self._workdir, self._lost)
        return
      try:
        self._write(number)
      except OSError as error:  # a full disk: the run finds out for itself
        if not told:
          _log.warning("%s cannot be written: %s", self._file, error.strerror)
        told = True

  def _lives(self, there: dict[str, Any]) -> bool:
    """Whether the run that has written `there` may still go on."""
    if there.get("machine") == self._said["machine"]:
      number, mark = there.get("process"), there.get("mark")
      if number == os.getpid():
        return mark in _own
      return isinstance(number, int) and _stays(number, there.get("began"))
    _log.info(
      "%s: a run of another machine (%s); waiting up to %d s for a sign of its life",
      *(self._file, _described(there), _SILENT),
    )
    until = time.monotonic() + _SILENT
    while time.monotonic() < until:
      time.sleep(min(1.0, _SILENT / 10))
      if (now := self._read()) != there:
        return now is not None
    return False

  def _is_own(self, there: dict[str, Any] | None) -> bool:
    return there is not None and there.get("mark") == self._mark

  def _read(self) -> dict[str, Any] | None:
    """What the file says; nothing of its own where it is damaged, None without it."""
    try:
      said = json.loads(self._file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
      return None
    except (OSError, ValueError):
      return {}
    return said if isinstance(said, dict) else {}

  def _write(self, beat: int) -> None:
    said = self._said | {"mark": self._mark, "beat": beat}
    text = json.dumps(said, indent=2) + "\n"
    if isinstance(self._file, Path):
      files.write_text(self._file, text)
    else:
      self._file.write_text(text)


def _stays(number: int, began: Any) -> bool:
  """Whether a process of this machine is there, and still is a little later.

  One that was killed takes its time to give back its memory.
  """
  until = time.monotonic() + _DYING
  while _began(number) == began != "":
    if time.monotonic() > until:
      return True
    time.sleep(0.05)
  return False


def _who() -> dict[str, Any]:
  """This process, and the machine on which its number means something."""
  marks = [platform.node()]
  with contextlib.suppress(OSError):  # Linux has them
    marks.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    marks.append(os.readlink("/proc/self/ns/pid"))  # containers count for themselves
  number = os.getpid()
  who = {"host": platform.node(), "process": number, "began": _began(number)}
  return who | {"machine": " ".join(marks)}


def _began(number: int) -> str:
  """What tells a process from a later one of the same number; '' if there is none."""
  try:
    state, *rest = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
    return "" if state in "ZX" else rest[18]  # killed, and nobody has asked how it went
  except OSError:
    if Path("/proc/self/stat").exists():
      return ""
  try:
    os.kill(number, 0)
  except PermissionError:
    return "there"
  except OSError:
    return ""
  return "there"


def _described(there: dict[str, Any]) -> str:
  if not there:
    return "of which the file says nothing"
  found = [there.get(name, "?") for name in ("process", "host", "since")]
  return "process {} on {}, since {}".format(*found)


def _unwritable(workdir: Path, error: OSError) -> UserError:
  return UserError(
    f"{workdir}: cannot be written ({error.strerror or error}); name another workdir"
  )
