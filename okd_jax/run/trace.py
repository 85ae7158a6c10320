"""A trace of some steps in the middle of a run, for Perfetto and TensorBoard."""

import logging
from pathlib import Path

import jax
from jaxtyping import PyTree

_log = logging.getLogger("okd_jax")

# Of the steps since the start: compilation and whatever else comes once are over.
_FIRST, _LAST = 3, 7


class Trace:
  """Traces the 3rd to the 7th step after `step`, the last one of a shorter run.

  A context for the loop: however that is left, the trace is written. Nothing is traced
  without a folder.
  """

  def __init__(self, folder: Path | None, step: int, steps: int):
    self._folder = folder
    self._first, self._last = min(step + _FIRST, steps), min(step + _LAST, steps)
    self._annotation, self._traced = None, range(0)

  def __enter__(self):
    return self

  def begin(self, step: int, state: PyTree) -> None:
    """Step `step` begins here, and the one before it, whose `state` this is, ends."""
    if self._folder is None or not self._first <= step <= self._last + 1:
      return
    self._end_step()
    if step > self._last:
      jax.block_until_ready(state)  # so that the last step is whole, too
      self._stop()
      return
    if step == self._first:
      jax.profiler.start_trace(_own(self._folder), create_perfetto_trace=True)
    self._traced = range(self._first, step + 1)
    self._annotation = jax.profiler.StepTraceAnnotation("train", step_num=step)
    self._annotation.__enter__()

  def __exit__(self, *_: object) -> None:
    self._end_step()
    self._stop()

  def _end_step(self) -> None:
    if self._annotation:
      self._annotation.__exit__(None, None, None)
      self._annotation = None

  def _stop(self) -> None:
    if not self._traced:
      return
    steps, self._traced = self._traced, range(0)
    jax.profiler.stop_trace()
    folder = _own(self._folder)
    newest = max(
      folder.rglob("perfetto_trace.json.gz"), key=lambda p: p.stat().st_mtime
    )
    _log.info(
      "profile of steps %d to %d: open %s at https://ui.perfetto.dev, or run "
      "tensorboard --logdir=%s (pip install tensorboard xprof)",
      steps[0],
      steps[-1],
      newest,
      folder,
    )


def _own(folder: Path) -> Path:
  """This process's folder: jax refuses to trace several into one for Perfetto."""
  if jax.process_count() == 1:
    return folder
  return folder / f"process-{jax.process_index()}"
