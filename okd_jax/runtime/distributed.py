"""Several processes as one run: how they find each other, and how they end together.

JAX's multi-controller runtime does the work; SLURM, Kubernetes, Open MPI or a TPU pod
starts the processes, or flags say who they are.

Notable features:
  each process tells all others that it is alive, in the key-value store that JAX keeps
    at process 0; one that falls silent, or ends with an error, takes the others down
    with a sentence that names it, where a collective would wait for ever;
  nothing of it is there in a run of one process.
"""

import atexit
import contextlib
import ctypes
import functools
import importlib.util
import itertools
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax._src import distributed  # its key-value store has no public name
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from okd_jax.errors import UserError

LOST = 1  # exit status where another process has ended
_BEAT = 1.0  # seconds from one sign of life to the next
_SILENCE = 20.0  # without one a process is taken for dead
# Of launchers: how many processes there are, beside which one this is.
_SIZES = {
  "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK",
  "PMI_SIZE": "PMI_RANK",
  "WORLD_SIZE": "RANK",
}
_MEET = 600  # seconds that processes wait for one another before they connect
_NOT_ALL = "start all of them within five minutes, with the same command"
_ALIVE, _ENDED = "okd_jax/alive", "okd_jax/ended"
_DONE = "done"
_LONGEST = 500  # characters of an error, as the others hear it
_log = logging.getLogger("okd_jax")
_handlers: list[Any] = []  # of C


@contextlib.contextmanager
def joined(
  coordinator: str = "", processes: int = 0, process: int = -1
) -> Iterator[None]:
  """Joins the processes of a run for the block, before any device is touched.

  Without arguments it asks the environment. However the block ends, the others hear of
  it: after an error they end as well, within seconds.

  Args:
    coordinator: HOST:PORT of process 0.
    processes: how many there are; 1 joins nobody, whatever the environment says.
    process: the number of this one, from 0.

  Raises:
    UserError: for arguments that do not fit each other, or where the others cannot be
      found.
  """
  _check(coordinator, processes, process)
  if not coordinator and processes != 1 and not detected(os.environ):
    _refuse_unjoined(os.environ)
    processes = 1
  if not coordinator and processes == 1:
    yield
    return
  if not _initialize(coordinator, processes, process) or jax.process_count() == 1:
    yield
    return
  if jax.process_index():
    _log.setLevel(logging.WARNING)  # process 0 speaks for all
  watch = _Watch(distributed.global_state.client)
  _watch_the_coordinator(watch)
  with watch:
    yield


def found() -> str:
  """Who takes part in the run, for people: '2 processes, 8 devices (TPU v5 lite)'."""
  processes, devices = jax.process_count(), jax.device_count()
  kind = jax.devices()[0].device_kind
  parts = [f"{processes} processes"] if processes > 1 else []
  parts.append(f"{devices} device{'s' * (devices > 1)} ({kind})")
  return ", ".join(parts)


@functools.cache
def connect(mesh: Mesh) -> None:
  """Has the processes of each group of a mesh's devices meet; once for every mesh.

  On CPUs, gloo connects a group when its first collective runs and gives up after 30 s.
  Processes that load and compile side by side may be further apart than that.
  """
  if jax.process_count() == 1 or jax.default_backend() != "cpu":
    return
  distributed.global_state.client.wait_at_barrier(f"okd_jax {mesh}", _MEET * 1000)
  axes = [axis for axis, size in mesh.shape.items() if size > 1]
  groups = [g for n in range(len(axes)) for g in itertools.combinations(axes, n + 1)]

  def sums(x: Float[Array, " 1"]) -> list[Float[Array, " 1"]]:
    return [jax.lax.psum(x, group) for group in groups]

  where = PartitionSpec(tuple(axes))
  ones = jax.make_array_from_callback(
    (mesh.size,), NamedSharding(mesh, where), lambda _: np.ones(1, np.float32)
  )
  call = jax.shard_map(
    sums, mesh=mesh, in_specs=where, out_specs=where, check_vma=False
  )
  jax.block_until_ready(jax.jit(call)(ones))


def detected(environment: Mapping[str, str]) -> str:
  """What started several processes, by name; '' where nothing says so.

  Raises:
    UserError: in an indexed Kubernetes job without the package that asks about it.

  >>> detected({"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "a", "SLURM_NTASKS": "2"})
  'SLURM'
  >>> detected({})
  ''
  """
  if "SLURM_STEP_NODELIST" in environment and _several(environment, "SLURM_NTASKS"):
    return "SLURM"
  if "OMPI_MCA_orte_hnp_uri" in environment:
    return "Open MPI" if _several(environment, "OMPI_COMM_WORLD_SIZE") else ""
  if "," in environment.get("TPU_WORKER_HOSTNAMES", "") or _on_tpu_vm():
    return "TPU"
  if "JOB_COMPLETION_INDEX" in environment:
    if importlib.util.find_spec("kubernetes") is None:
      raise UserError(
        "this is a pod of an indexed Kubernetes job: pip install okd-jax[k8s] to find "
        "the other pods, or give --coordinator, --processes and --process"
      )
    return "Kubernetes"
  return ""


def _refuse_unjoined(environment: Mapping[str, str]) -> None:
  """Refuses to be one of several independent runs in one workdir."""
  for size, rank in _SIZES.items():
    if rank in environment and _several(environment, size):
      raise UserError(
        f"{size}={environment[size]} says that this is one of several processes, but "
        "JAX cannot find the others; give --coordinator=HOST:PORT, --processes and "
        "--process, or --processes=1 for a run by itself"
      )


def _several(environment: Mapping[str, str], name: str) -> bool:
  return environment.get(name, "").isdigit() and int(environment[name]) > 1


def _on_tpu_vm() -> bool:
  """Whether this machine has TPUs, on which JAX asks Google's metadata for others."""
  chips = [*Path("/dev").glob("accel[0-9]*"), *Path("/dev/vfio").glob("[0-9]*")]
  return bool(chips) and importlib.util.find_spec("libtpu") is not None


def _check(coordinator: str, processes: int, process: int) -> None:
  given = f"--coordinator={coordinator} --processes={processes} --process={process}"
  if not coordinator and processes in (0, 1) and process in (-1, 0):
    return
  host, _, port = coordinator.rpartition(":")
  if not host or not port.isdigit() or not 0 < int(port) < 2**16:
    raise UserError(f"{given}: the coordinator is HOST:PORT of process 0")
  if not 0 <= process < processes:
    raise UserError(f"{given}: process is a number from 0 to processes - 1")


def _initialize(coordinator: str, processes: int, process: int) -> bool:
  """`jax.distributed.initialize`, whose errors become a sentence.

  Returns:
    False where the environment has turned out to be of one process.
  """
  # A recoverable client leaves it to `_Watch` what another one's death means.
  jax.config.update("jax_enable_recoverability", True)
  # All processes agree when to stop through `run.stop`, on any platform.
  jax.config.update("jax_enable_preemption_service", False)
  known = {}
  if coordinator:
    known = dict(
      coordinator_address=coordinator,
      num_processes=processes,
      process_id=process,
      cluster_detection_method="deactivate",
    )
  who = f"{coordinator} (process 0)" if coordinator else "the other processes"
  try:
    _at_abort(lambda: (2, f"cannot join {who}: {_NOT_ALL}"))
    jax.distributed.initialize(**known)
    _at_abort(None)
  except (RuntimeError, ValueError, OSError) as error:
    if "should be defined" in str(error):  # TPU chips, and nobody who knows of others
      return False
    why = f"{error}; {_NOT_ALL}; --processes=1 is a run by itself"
    raise UserError(f"cannot join {who}: {why}") from error
  return True


class _Watch:
  """Tells the others that this process is alive, and ends it when another one is not.

  A context. Left well, the processes part as they came, process 0 last; left by an
  error, the others hear of it.

  status: what this process ends with, once it has nothing more to do; None before.
  """

  def __init__(self, client: Any):
    self._client, self.status = client, None
    self._own, self._count = jax.process_index(), jax.process_count()
    self._seen: dict[int, tuple[str, float]] = {}
    self._beats, self._over = 0, threading.Event()
    self._answered = time.monotonic()  # by process 0, which has the store
    targets = (self._run, self._watch_the_store)
    self._threads = [threading.Thread(target=t, daemon=True) for t in targets]

  def __enter__(self) -> None:
    for thread in self._threads:
      thread.start()

  def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
    if error is None or _agreed(error):
      self._tell(_DONE)
      with contextlib.suppress(Exception):  # who has died meanwhile is not waited for
        self._client.wait_at_barrier("okd_jax done", int(_SILENCE * 1000))
    else:
      if _of_collective(error):  # another process has died: `_run` says which
        time.sleep(_SILENCE + 3 * _BEAT)
      said = " ".join(f"{kind.__name__}: {error}".split())[:_LONGEST]
      self._tell(f"{_status(error)} {said}")
    self.status = _status(error)
    self._over.set()
    for thread in self._threads:
      thread.join()
    if error is None:
      self._leave()
    else:  # the error is shown first, and a launcher's signal must not cut it off
      for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
      atexit.register(self._leave)

  def _leave(self) -> None:
    self._let_others_go_first()
    with contextlib.suppress(Exception):
      jax.distributed.shutdown()

  def _let_others_go_first(self) -> None:
    if self._own == 0:  # with which the store goes
      time.sleep(3 * _BEAT)

  def _tell(self, said: str) -> None:
    with contextlib.suppress(Exception):  # the store may be gone
      self._client.key_value_set(f"{_ENDED}/{self._own}", said)

  def _run(self) -> None:
    while not self._over.wait(_BEAT):
      try:
        self._beats += 1
        self._client.key_value_set(
          f"{_ALIVE}/{self._own}", str(self._beats), allow_overwrite=True
        )
        alive = dict(self._client.key_value_dir_get(_ALIVE))
        ended = dict(self._client.key_value_dir_get(_ENDED))
      except Exception:  # process 0 is gone: others say so
        continue
      self._answered = time.monotonic()
      self._look(alive, ended)

  def _watch_the_store(self) -> None:
    """Ends this process where process 0 neither answers nor is known to be gone.

    A machine that has lost its network says nothing, and a call to it waits.
    """
    while not self._over.wait(_BEAT):
      if time.monotonic() - self._answered > _SILENCE + 3 * _BEAT:
        self._end("process 0, which coordinates the run, does not answer")

  def _look(self, alive: Mapping[str, str], ended: Mapping[str, str]) -> None:
    now = time.monotonic()
    for i in range(self._count):
      if i == self._own:
        continue
      said = ended.get(f"{_ENDED}/{i}", "")
      if said and said != _DONE:
        status, _, why = said.partition(" ")
        self._end(f"process {i} has ended ({why})", int(status))
      beat = alive.get(f"{_ALIVE}/{i}", "")
      before, since = self._seen.get(i, (None, now))
      self._seen[i] = (beat, now if beat != before else since)
      if not said and now - self._seen[i][1] > _SILENCE:
        self._end(f"process {i} has been silent for {_SILENCE:.0f} s")

  def _end(self, why: str, status: int = LOST) -> None:
    if self._over.is_set():
      return
    _say(
      f"error: process {self._own} of {self._count} ends, since {why}; the last "
      "checkpoint is whole: start all processes again to go on from it"
    )
    self._let_others_go_first()
    os._exit(status)


def _agreed(error: BaseException) -> bool:
  """Whether this is how a run ends that all processes have agreed to stop."""
  asked = (128 + signal.SIGINT, 128 + signal.SIGTERM)
  return isinstance(error, SystemExit) and error.code in (0, None, *asked)


def _status(error: BaseException | None) -> int:
  if error is None or isinstance(error, SystemExit):
    return (error and error.code) or 0
  return 2 if isinstance(error, UserError | OSError) else 1


def _of_collective(error: BaseException) -> bool:
  return isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error)


def _say(sentence: str) -> None:
  sys.stdout.flush()
  os.write(2, (sentence + "\n").encode())


def _watch_the_coordinator(watch: _Watch) -> None:
  """From now on says why, where JAX ends this process because process 0 is gone."""
  if jax.process_index() == 0:
    return
  host, _, port = distributed.global_state.coordinator_address.rpartition(":")
  own, count = jax.process_index(), jax.process_count()

  def say() -> tuple[int | None, str]:
    """(exit status or None, sentence), as `_at_abort` wants them."""
    if watch.status is not None:
      return watch.status, ""
    if _answers(host, int(port)):
      return None, ""
    return LOST, (
      f"process {own} of {count} ends, since process 0, which coordinates the run, has "
      "ended; the last checkpoint is whole: start all processes again to go on from it"
    )

  _at_abort(say)


def _at_abort(say: Callable[[], tuple[int | None, str]] | None) -> None:
  """Has this process end in a better way where JAX aborts it; None: it aborts.

  JAX does so from a thread of its own, on which no handler of Python's runs; one of
  C's does.

  say: (exit status or None to abort, a sentence or none).
  """

  def aborted(number: int) -> None:
    status, sentence = say()
    if sentence:
      _say(f"error: {sentence}")
    if status is not None:
      os._exit(status)

  libc = ctypes.CDLL(None)
  libc.signal.restype = ctypes.c_void_p
  _handlers.append(ctypes.CFUNCTYPE(None, ctypes.c_int)(aborted))  # never collected
  libc.signal(signal.SIGABRT, _handlers[-1] if say else signal.SIG_DFL)


def _answers(host: str, port: int) -> bool:
  try:
    with socket.create_connection((host.strip("[]"), port), timeout=2):
      return True
  except OSError:
    return False
