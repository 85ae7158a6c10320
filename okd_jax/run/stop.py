"""When a run is to stop before its end."""

import signal

import jax

from okd_jax.runtime import agreement


class Stopped(Exception):
  """The run was asked to stop and has saved everything; the same call goes on."""


class Stop:
  """Whether the run is to stop: here never; a command's is true after a signal."""

  def __bool__(self) -> bool:
    return False

  def check(self) -> None:
    """Raises Stopped if any process is to stop; all of them call it, all is saved."""
    if agreement.any_of(bool(self)):
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


class Agreement:
  """What all processes of a run decide at the same step, without waiting for it."""

  def __init__(self, stop: Stop):
    self._stop, self._asked = stop, None

  def ask(self) -> bool:
    """Whether any process was to stop when this was called before; all of them call it.

    The answer is one call old: it was computed while the devices did their step. Of
    one process alone it is that of now.
    """
    if jax.process_count() == 1:
      return bool(self._stop)
    before, self._asked = self._asked, agreement.flag(bool(self._stop))
    return before is not None and bool(before)
