"""Checkpoints: state, data position and RNG together, through Orbax's v1 API.

A checkpoint appears under its step's number only once it is whole; what a kill left
half-written is never seen again. Each is sealed (`run.seal`): nothing is taken that is
not, to the last bit, what was written.
"""

import contextlib
import dataclasses
import errno
import logging
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh
from orbax.checkpoint import v1 as ocp

from okd_jax.data.position import Moving, Position
from okd_jax.errors import UserError
from okd_jax.run import seal
from okd_jax.runtime import agreement, checksums, files, mirror
from okd_jax.runtime.sharding import shardings
from okd_jax.runtime.workdir import barrier, writes

_log = logging.getLogger(__name__)
Place = Path | epath.Path
_NONE = "no checkpoint below {} can be read; move the folder away to start the run anew"
_policies = ocp.training.preservation_policies


class Checkpoints:
  """The checkpoints of one run, below `folder`; use `opened` to have one closed.

  Keeps the newest `keep` and, if `best` is given, the one whose metrics it scores
  highest. With `beside` each says what its run was made from, and has copies of the
  workdir's small files.
  """

  def __init__(
    self,
    folder: Place,
    keep: int,
    best: Callable[[Mapping[str, float]], float] | None = None,
    read_only: bool = False,
    beside: seal.Beside | None = None,
  ):
    if keep < 1:
      raise UserError(f"checkpoint.keep={keep} must be at least 1")
    policies = [_policies.LatestN(keep)]
    if best:
      policies.append(
        _policies.BestN(get_metric_fn=best, n=1, keep_checkpoints_without_metrics=False)
      )
    self._best, self._beside = best, beside
    self._metrics = _metrics(folder)
    if not read_only:
      _leave_unreadable(folder, self._metrics)
    self._folder = epath.Path(folder.absolute() if isinstance(folder, Path) else folder)
    self._checkpointer = None
    if not read_only:  # it would sweep away what a run is just writing
      self._checkpointer = ocp.training.Checkpointer(
        self._folder,
        save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
        preservation_policy=_policies.AnyPreservationPolicy(policies),
        cleanup_tmp_directories=True,
      )

  def steps(self) -> list[int]:
    """The steps that have a whole checkpoint, ascending."""
    if self._checkpointer is None:
      return sorted(self._metrics)
    return [checkpoint.step for checkpoint in self._checkpointer.checkpoints]

  def best_step(self) -> int:
    """The step whose metrics score highest; the newest where none were scored."""
    return self._by_score()[0]

  def _by_score(self) -> list[int]:
    """The steps, the best first; behind those that were scored the newest."""
    steps = self.steps()
    scored = [step for step in steps if self._best and self._metrics.get(step)]
    scored.sort(key=lambda step: self._best(self._metrics[step]), reverse=True)
    return scored + [step for step in reversed(steps) if step not in scored]

  def save(
    self,
    step: int,
    state: Any,
    data: Moving,
    metrics: Mapping[str, float] | None,
    sampler: Any = None,
  ) -> None:
    """Starts to save; the writing goes on in the background.

    `data` is the loader's iterator, whose position is saved; `sampler` a tree of
    arrays, what sampled text needs to go on.

    Raises:
      UserError: if this one or the one before it cannot be written.
    """
    if self._beside:
      self._beside.check()
    parts = {"state": _as_tree(state)} | ({"sampler": sampler} if sampler else {})
    position, sums = Position(data), checksums.begun(parts)
    sealing = seal.Sealing(sums, data.get_state(), metrics, self._beside)
    mirror.push()  # figures of earlier steps are there before the checkpoint is
    with self._written():
      started = self._checkpointer.save_checkpointables_async(
        step,
        parts | {"data": position, seal.NAME: sealing},
        overwrite=True,
        metrics=metrics,
      )
    if started is None:
      raise RuntimeError(f"the checkpoint of step {step} was not written")
    self._metrics[step] = metrics
    if mirror.copies_checkpoints():
      self.wait()
      mirror.push()

  def restore(
    self, state: Any, data: Moving, mesh: Mesh, sampler: Any = None
  ) -> tuple[Any, int, Any]:
    """(state, step, sampler) of the newest readable checkpoint; sets `data` to it.

    `state` is abstract, `sampler` what `save` got or its like. A damaged checkpoint is
    reported and the one before it taken; so are the workdir's small files.

    Raises:
      UserError: if there is none, or none can be read.
    """
    found, step, damaged = self._first_whole(
      reversed(self.steps()), state, data, mesh, sampler
    )
    self._leave(damaged)
    self._put_back(step)
    return _filled(state, found["state"]), step, found.get("sampler")

  def best(
    self, state: Any, mesh: Mesh, now: tuple[Any, int] | None = None
  ) -> tuple[Any, int]:
    """(state, step) that score highest; where that is damaged, the next best.

    now: the state at hand and its step, which then need not be read.

    Raises:
      UserError: if none can be read.
    """
    if now and now[1] == self.best_step():
      return now
    found, step, damaged = self._first_whole(self._by_score(), state, None, mesh, None)
    if damaged:
      _log.warning("the checkpoint of step %d is taken in its place", step)
    return _filled(state, found["state"]), step

  def restore_step(self, step: int, state: Any, mesh: Mesh) -> Any:
    """The state of exactly this step, placed by the sharding rules.

    Raises:
      UserError: if it is damaged.
    """
    try:
      found, *_ = self._first_whole([step], state, None, mesh, None)
    except UserError as error:
      others = ", ".join(str(other) for other in self.steps() if other != step)
      raise UserError(
        f"{self._folder / str(step)} is damaged; other steps: {others or 'none'}"
      ) from error
    return _filled(state, found["state"])

  def _first_whole(
    self, steps: Iterable[int], state: Any, data: Any, mesh: Mesh, sampler: Any
  ) -> tuple[dict[str, Any], int, list[int]]:
    """(what was restored, its step, the damaged ones before it); all processes call."""
    damaged = []
    for step in steps:
      restored, reason = None, "another process cannot read it"
      try:
        restored = self._load(step, state, data, mesh, sampler)
      except Exception as error:  # Orbax raises many kinds for a damaged file
        reason = str(error).split("\n")[0][:200]
      # All take it, or none does: states of two steps would mix without a word.
      if not agreement.any_of(restored is None):
        return restored, step, damaged
      damaged.append(step)
      _log.warning("checkpoint of step %d is damaged (%s)", step, reason)
    raise UserError(_NONE.format(self._folder))

  def _leave(self, damaged: list[int]) -> None:
    """Sets steps aside: Orbax takes none below its newest."""
    if not damaged:
      return
    barrier("checkpoints tried")
    if writes():
      for step in damaged:
        _set_aside(self._folder / str(step))
    barrier("checkpoints set aside")
    self._checkpointer.reload()

  def _put_back(self, step: int) -> None:
    sealed = seal.read(self._folder / str(step))
    if sealed and self._beside:
      seal.put_back(self._beside.workdir, self._folder / str(step), sealed, fixed=False)

  def _load(
    self, step: int, state: Any, data: Any, mesh: Mesh, sampler: Any
  ) -> dict[str, Any]:
    sealed = seal.read(self._folder / str(step))
    abstract = jax.tree.map(
      lambda leaf, sharding: jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=sharding
      ),
      _as_tree(state),
      _as_tree(shardings(state, mesh)),
    )
    wanted = {"state": abstract} | ({} if data is None else {"data": Position(data)})
    if sampler:
      wanted["sampler"] = sampler
    found = ocp.load_checkpointables(self._folder / str(step), wanted)
    if sealed is None:
      _log.warning("checkpoint of step %d has no checksums: it is taken as it is", step)
      return found
    arrays = {name: found[name] for name in ("state", "sampler") if name in found}
    for name, total in checksums.of(arrays).items():
      if sealed.arrays.get(name) != total:
        raise seal.Damaged(f"array {name} is not as it was written")
    return found

  def wait(self) -> None:
    """Returns when everything is on disk.

    Raises:
      UserError: if it cannot be written.
    """
    with self._written():
      self._checkpointer.wait()

  @contextlib.contextmanager
  def _written(self) -> Iterator[None]:
    """Says in a sentence that there is no room."""
    try:
      yield
    except Exception as error:  # Orbax raises many kinds
      reason = _no_room(error)
      if not reason:
        raise
      whole = seal.newest(self._folder)
      last = f"that of step {whole[0].name} is whole" if whole else "there is none yet"
      raise UserError(
        f"a checkpoint below {self._folder} could not be written ({reason}); {last}; "
        "make room, and the same command goes on"
      ) from None

  def close(self) -> None:
    """Returns when everything is on disk; nothing can be saved afterwards."""
    if self._checkpointer is not None:
      with self._written():
        self._checkpointer.close()


def _as_tree(state: Any) -> Any:
  """What is saved of a state: a dict, without fields that hold nothing.

  So a checkpoint from before a field was added is read as long as the run has no use
  for the field.
  """
  if not dataclasses.is_dataclass(state):
    return state
  return {name: value for name, value in vars(state).items() if jax.tree.leaves(value)}


def _filled(state: Any, saved: Any) -> Any:
  """A state of this kind with what was saved."""
  return state.replace(**saved) if dataclasses.is_dataclass(state) else saved


def _metrics(folder: Place) -> dict[int, Mapping[str, float] | None]:
  """The metrics of the checkpoints that are whole as far as small files say, by step.

  Raises:
    UserError: if there are checkpoints, and none is.
  """
  found, steps = {}, seal.steps(folder)
  for step in steps:
    try:
      found[step] = seal.metrics_of(folder / str(step))
    except seal.Damaged as error:
      _log.warning("checkpoint of step %d is damaged (%s)", step, error)
  if steps and not found:
    raise UserError(_NONE.format(folder))
  return found


def _leave_unreadable(folder: Place, whole: Collection[int]) -> None:
  """Sets aside those whose small files are damaged: Orbax would not even start."""
  barrier("checkpoints looked at")
  if writes():
    for step in seal.steps(folder):
      if step not in whole:
        _set_aside(folder / str(step))
  barrier("checkpoints set aside")


def _is_news(record: logging.LogRecord) -> bool:
  """Not of a full disk: each of Orbax's threads tells of it in a traceback."""
  return not (record.exc_info and _no_room(record.exc_info[1]))


def _no_room(error: BaseException | None) -> str:
  """What an error says of a full disk or a quota, '' if nothing."""
  while error is not None:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
      return os.strerror(error.errno)
    if found := re.search("No space left on device|Disk quota exceeded", str(error)):
      return found[0]
    error = error.__cause__ or error.__context__
  return ""


def _set_aside(path: Place) -> None:
  """Renames a checkpoint, so that nothing is lost."""
  _log.warning("set aside as %s", files.aside(path))


@contextlib.contextmanager
def opened(
  folder: Place,
  keep: int,
  best: Callable[[Mapping[str, float]], float] | None = None,
  read_only: bool = False,
  beside: seal.Beside | None = None,
) -> Iterator[Checkpoints]:
  """Checkpoints that are flushed and closed on the way out."""
  orbax = logging.getLogger("absl")
  orbax.addFilter(_is_news)
  try:
    checkpoints = Checkpoints(folder, keep, best, read_only, beside)
    try:
      yield checkpoints
    finally:
      checkpoints.close()
  finally:
    orbax.removeFilter(_is_news)
