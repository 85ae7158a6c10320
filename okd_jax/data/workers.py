"""Other processes that turn raw rows into tokens.

They are started as commands of their own: `multiprocessing` would fork a process whose
JAX has threads, or run the user's script a second time.

`python -m okd_jax.data.workers` reads jobs from its standard input and writes what
becomes of them to its standard output; nobody but `start` does that.
"""

import contextlib
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO, Any

from okd_jax.errors import UserError

_ENVIRONMENT = {"TOKENIZERS_PARALLELISM": "false", "JAX_PLATFORMS": "cpu"}


class Worker:
  """A process that applies one function to whatever it is sent."""

  def __init__(self, make: Callable[..., Callable[[Any], Any]], arguments: Sequence):
    self._process = subprocess.Popen(
      [sys.executable, "-m", "okd_jax.data.workers"],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      env={**os.environ, **_ENVIRONMENT, "PYTHONPATH": os.pathsep.join(sys.path)},
      process_group=0,  # what Ctrl-C means to it, whoever started it says
    )
    self.busy = False
    self._write((make, arguments))

  def send(self, item: Any) -> None:
    self._write(item)
    self.busy = True

  def _write(self, item: Any) -> None:
    with contextlib.suppress(BrokenPipeError):  # `receive` tells of it
      _put(self._process.stdin, item)

  def receive(self) -> Any:
    """What became of what was sent last; whatever the function raised."""
    self.busy = False
    try:
      result, error = _get(self._process.stdout)
    except EOFError:
      code = self._process.wait()
      raise UserError(
        f"a process that tokenises ended with status {code}; set data.num_proc=1 to do "
        "without it"
      ) from None
    if error is not None:
      raise error
    return result

  def stop(self) -> None:
    self._process.kill()
    self._process.wait()
    self._process.stdin.close()
    self._process.stdout.close()


def mapped(
  make: Callable[..., Callable[[Any], Any]],
  arguments: Sequence,
  items: Iterable[Any],
  count: int,
) -> Iterator[Any]:
  """`make(*arguments)` of each item, in order, by so many processes.

  No more items are read ahead than there are processes.
  """
  workers = [Worker(make, arguments) for _ in range(count)]
  try:
    turn = 0
    for item in items:
      worker = workers[turn % count]
      if worker.busy:
        yield worker.receive()
      worker.send(item)
      turn += 1
    for i in range(turn, turn + count):
      if workers[i % count].busy:
        yield workers[i % count].receive()
  finally:
    for worker in workers:
      worker.stop()


def _put(pipe: IO[bytes], item: Any) -> None:
  raw = pickle.dumps(item, pickle.HIGHEST_PROTOCOL)
  pipe.write(len(raw).to_bytes(8, "little") + raw)
  pipe.flush()


def _get(pipe: IO[bytes]) -> Any:
  head = pipe.read(8)
  if len(head) < 8:
    raise EOFError
  return pickle.loads(pipe.read(int.from_bytes(head, "little")))


def _serve() -> None:
  """Answers jobs until there are no more."""
  answers = os.fdopen(os.dup(1), "wb")
  os.dup2(2, 1)  # whatever a library prints is no answer
  make, arguments = _get(sys.stdin.buffer)
  work = make(*arguments)
  while True:
    try:
      item = _get(sys.stdin.buffer)
    except EOFError:
      return
    try:
      result, error = work(item), None
    except Exception as caught:  # whoever sent the job raises it
      result, error = None, caught
    _put(answers, (result, error))


if __name__ == "__main__":
  _serve()
