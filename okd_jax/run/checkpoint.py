"""Checkpoints: state, data position and RNG together, through Orbax's v1 API.

A checkpoint appears under its step's number only once it is whole; what a kill left
half-written is never seen again.
"""

import contextlib
import dataclasses
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh
from orbax.checkpoint import v1 as ocp

from okd_jax.data.position import Position
from okd_jax.errors import UserError
from okd_jax.runtime import agreement, mirror
from okd_jax.runtime.sharding import shardings
from okd_jax.runtime.workdir import barrier, writes

_log = logging.getLogger(__name__)
Place = Path | epath.Path
_policies = ocp.training.preservation_policies


class Checkpoints:
  """The checkpoints of one run, below `folder`; use `opened` to have one closed.

  Keeps the newest `keep` and, if `best` is given, the one whose metrics it scores
  highest.
  """

  def __init__(self, folder: Place, keep: int, best=None, read_only: bool = False):
    if keep < 1:
      raise UserError(f"checkpoint.keep={keep} must be at least 1")
    policies = [_policies.LatestN(keep)]
    if best:
      policies.append(
        _policies.BestN(get_metric_fn=best, n=1, keep_checkpoints_without_metrics=False)
      )
    if not read_only:
      if writes():
        _set_aside_unreadable(folder)
      barrier("checkpoints looked at")
    self._best = best
    self._checkpointer = ocp.training.Checkpointer(
      folder.absolute() if isinstance(folder, Path) else folder,
      save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
      preservation_policy=_policies.AnyPreservationPolicy(policies),
      # A reader must not sweep away what a run is just writing.
      cleanup_tmp_directories=not read_only,
    )

  def steps(self) -> list[int]:
    """The steps that have a whole checkpoint, ascending."""
    return [checkpoint.step for checkpoint in self._checkpointer.checkpoints]

  def best_step(self) -> int:
    """The step whose metrics score highest; the newest where none were scored."""
    scored = (
      [c for c in self._checkpointer.checkpoints if c.metrics] if self._best else []
    )
    if not scored:
      return self.steps()[-1]
    return max(scored, key=lambda checkpoint: self._best(checkpoint.metrics)).step

  def save(
    self, step: int, state, data, metrics: Mapping[str, float] | None, sampler=None
  ) -> None:
    """Starts to save; the writing goes on in the background.

    `data` is the loader's iterator, whose position is saved; `sampler` a tree of
    arrays, what sampled text needs to go on.
    """
    parts = {"state": _as_tree(state), "data": Position(data)} | (
      {"sampler": sampler} if sampler else {}
    )
    mirror.push()  # figures of earlier steps are there before the checkpoint is
    started = self._checkpointer.save_checkpointables_async(
      step, parts, overwrite=True, metrics=metrics
    )
    if started is None:
      raise RuntimeError(f"the checkpoint of step {step} was not written")
    if mirror.copies_checkpoints():
      self.wait()
      mirror.push()

  def restore(self, state, data, mesh: Mesh, sampler=None) -> tuple[Any, int, Any]:
    """(state, step, sampler) of the newest readable checkpoint; sets `data` to it.

    `state` is abstract, `sampler` what `save` got or its like. A damaged checkpoint is
    reported and the one before it taken.

    Raises:
      UserError: if there is none, or none can be read.
    """
    damaged = []
    for step in reversed(self.steps()):
      restored, reason = None, "another process cannot read it"
      try:
        restored = self._load(step, state, data, mesh, sampler)
      except Exception as error:  # Orbax raises many kinds for a damaged file
        reason = str(error).split("\n")[0][:200]
      # All take it, or none does: states of two steps would mix without a word.
      if agreement.any_of(restored is None):
        damaged.append(step)
        _log.warning("checkpoint of step %d is damaged (%s)", step, reason)
        continue
      self._leave(damaged)
      return _filled(state, restored["state"]), step, restored.get("sampler")
    raise UserError(
      f"no checkpoint below {self._checkpointer.directory} can be read; "
      "move the folder away to start the run anew"
    )

  def _leave(self, damaged: list[int]) -> None:
    """Sets steps aside: Orbax takes none below its newest."""
    if not damaged:
      return
    barrier("checkpoints tried")
    if writes():
      for step in damaged:
        _set_aside(epath.Path(self._checkpointer.directory) / str(step))
    barrier("checkpoints set aside")
    self._checkpointer.reload()

  def restore_step(self, step: int, state, data, mesh: Mesh):
    """The state of exactly this step, placed by the sharding rules."""
    return _filled(state, self._load(step, state, data, mesh, None)["state"])

  def _load(self, step: int, state, data, mesh: Mesh, sampler):
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
    return self._checkpointer.load_checkpointables(step, wanted)

  def wait(self) -> None:
    """Returns when everything is on disk."""
    self._checkpointer.wait()

  def close(self) -> None:
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


def _set_aside_unreadable(folder: Place) -> None:
  """Renames checkpoints whose own metadata is damaged: Orbax would not even start."""
  for path in sorted(folder.glob("[0-9]*/_CHECKPOINT_METADATA")):
    try:
      json.loads(path.read_bytes())
    except ValueError:
      _log.warning("checkpoint of step %s is damaged", path.parent.name)
      _set_aside(path.parent)


def _set_aside(path: Place) -> None:
  """Renames a checkpoint to damaged-N, or damaged-N-2, …, so that nothing is lost."""
  names = (f"damaged-{path.name}{n}" for n in ["", *(f"-{i}" for i in range(2, 1000))])
  aside = next(a for a in map(path.with_name, names) if not a.exists())
  path.rename(aside)
  _log.warning("set aside as %s", aside)


@contextlib.contextmanager
def opened(
  folder: Place, keep: int, best=None, read_only=False
) -> Iterator[Checkpoints]:
  """Checkpoints that are flushed and closed on the way out."""
  checkpoints = Checkpoints(folder, keep, best, read_only)
  try:
    yield checkpoints
  finally:
    checkpoints.close()
