"""When a run is to stop before its end."""

import signal


class Stopped(Exception):
  """The run was asked to stop and has saved everything; the same call goes on."""


class Stop:
  """Whether the run is to stop: here never; a command's is true after a signal."""

  def __bool__(self) -> bool:
    return False

  def check(self) -> None:
    """Raises Stopped if so; to be called when all is saved."""
    if self:
      raise Stopped


class Terminated(Stop):
  """True once SIGTERM has come; a second one ends the process at once.

  A context of the main thread, for commands.
  """

  STATUS = 128 + signal.SIGTERM

  def __enter__(self):
    self._came = False
    self._before = signal.signal(signal.SIGTERM, self._note)
    return self

  def _note(self, *_: object) -> None:
    self._came = True
    signal.signal(signal.SIGTERM, self._before)

  def __bool__(self) -> bool:
    return self._came

  def __exit__(self, *_: object) -> None:
    signal.signal(signal.SIGTERM, self._before)
