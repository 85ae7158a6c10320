"""When a run is to stop before its end."""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import jax
from jaxtyping import Array, Int

from okd_jax.runtime import agreement

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_ONE = 1.0  # seconds in which several signals count as one

Item = TypeVar("Item")


class Stopped(Exception):
  """The run was asked to stop and has saved everything; the same call goes on.

  number: of the signal that asked.
  """

  def __init__(self, number: int):
    self.number = number
    name = signal.Signals(number).name
    super().__init__(f"stopped by {name}; the same command goes on from here")


class Stop:
  """Whether the run is to stop: here never; a command's hears signals.

  number: of the signal that asks; 0 is none.
  """

  number: int = 0

  def check(self) -> None:
    """Raises Stopped if any process is to stop; all of them call it, all is saved."""
    number = self.number
    if jax.process_count() > 1:
      number = int(agreement.largest(number))
    if number:
      raise Stopped(number)

  def heard(self, items: Iterable[Item]) -> Iterator[Item]:
    """The items, with a `check` before each of them."""
    for item in items:
      self.check()
      yield item


class Signalled(Stop):
  """Hears SIGINT and SIGTERM; a second one ends the process at once.

  A context of the main thread, for commands. Left by `Stopped`, it says so in one line
  and exits with 128 + the signal's number: 130 or 143.

  What follows within a second is the same signal: `timeout` and others send it to a
  process and then to its group. The second one is heard by a thread, since Python's own
  handlers wait until the main thread is back from a compilation.
  """

  def __enter__(self):
    self._ours, python = socket.socketpair()
    python.setblocking(False)
    self._python = python
    self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
    self._wakes = signal.set_wakeup_fd(python.fileno(), warn_on_full_buffer=False)
    self._thread = threading.Thread(target=self._watch, daemon=True)
    self._thread.start()
    return self

  def _note(self, number: int, _: object) -> None:
    self.number = self.number or int(number)

  def _watch(self) -> None:
    first = None
    while byte := self._ours.recv(1):
      if byte[0] not in SIGNALS:
        continue
      if first is None:
        first = time.monotonic()
      elif time.monotonic() - first > _ONE:
        os._exit(128 + byte[0])

  def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
    signal.set_wakeup_fd(self._wakes)
    for number, before in self._before.items():
      signal.signal(number, before)
    self._python.close()
    self._thread.join()
    self._ours.close()
    if isinstance(error, Stopped):
      print(error, file=sys.stderr)
      sys.exit(128 + error.number)


class Agreement:
  """What all processes of a run decide at the same step, without waiting for it."""

  def __init__(self, stop: Stop):
    self._stop = stop
    self._asked: Int[Array, ""] | None = None

  def ask(self) -> int:
    """The signal that asked any process when this was called before; 0 is none.

    All processes call it. The answer is one call old: it was computed while the devices
    did their step. Of one process alone it is that of now.
    """
    if jax.process_count() == 1:
      return self._stop.number
    before, self._asked = self._asked, agreement.largest(self._stop.number)
    return 0 if before is None else int(before)
