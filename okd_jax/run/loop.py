"""The loop: dispatch step n, read the metrics of n-1, checkpoint, evaluate."""

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from jaxtyping import PyTree

from okd_jax.data import PAD_ID, train_loader
from okd_jax.evaluation import figures
from okd_jax.evaluation.tokens import STUDENT, TEACHER
from okd_jax.run import about, beforehand, nonfinite
from okd_jax.run.batches import Batches
from okd_jax.run.build import Run
from okd_jax.run.checkpoint import Checkpoints
from okd_jax.run.evaluator import Evaluator
from okd_jax.run.nonfinite import NotFinite
from okd_jax.run.progress import Progress
from okd_jax.run.state import TrainState
from okd_jax.run.step import compile_step
from okd_jax.run.stop import Agreement, Stopped
from okd_jax.run.trace import Trace
from okd_jax.runtime import metrics, sharding
from okd_jax.runtime.workdir import Workdir
from okd_jax.teachers import trunk

_log = logging.getLogger(__name__)


class Place(NamedTuple):
  """Where a run stands: its state after `step` steps, and the loader behind it."""

  state: TrainState
  step: int
  loader: Iterator


class Evaluations:
  """Scores: found, written down and told to the batches.

  scores: the student's by step, those of the run's earlier parts among them.
  """

  def __init__(
    self,
    run: Run,
    workdir: Workdir,
    writer: metrics.Writer,
    batches: Batches,
  ):
    self._run, self._settings, self._steps = run, run.settings.eval, run.plan.steps
    self._evaluator = Evaluator(run)
    self._writer, self._batches = writer, batches
    self._samples = about.Samples(run, workdir)
    self.scores = {row["step"]: row for row in writer.kept if row["kind"] == "eval"}

  def teachers(self, params: Mapping[str, PyTree]) -> None:
    """Scores the frozen teachers, which are whole, as they are at the first step."""
    found = self._evaluator.teachers(params)
    for name, scores in found.items():
      nonfinite.check_scores(f"teacher {name}", scores, _trees(self._run, params))
      self._writer.write(0, "teacher", scores, name=name if len(found) > 1 else "")
      self._samples.teacher(name, self._evaluator.said.get((TEACHER, name), {}))

  def go_on_with(self, run: Run, kept: trunk.Kept) -> None:
    """From now on the teacher is the top of itself that `run` has."""
    self._run, self._evaluator = run, Evaluator(run, kept.eval)

  def due(self, step: int) -> bool:
    every = self._settings.every
    wanted = step in (0, self._steps) or bool(every and step % every == 0)
    return wanted and step not in self.scores

  def __call__(self, step: int, params: Mapping[str, PyTree]) -> dict[str, float]:
    scores = self._evaluator(params)
    if not step:
      nonfinite.check_scores("the student", scores, _trees(self._run, params))
    self._samples.student(step, self._evaluator.said.get((STUDENT, ""), {}))
    self._writer.write(step, "eval", scores)
    self.scores[step] = scores
    self._batches.observe(scores["loss"])
    return scores

  def stalled(self) -> bool:
    """Whether eval.patience has run out."""
    return figures.stalled(self.scores, self._settings.best, self._settings.patience)

  def say_stalled(self) -> None:
    best, patience = self._settings.best, self._settings.patience
    _log.info("%s has not improved in %d evaluations: stopped early", best, patience)


def train(
  run: Run,
  workdir: Workdir,
  checkpoints: Checkpoints,
  kept: trunk.Kept | None,
  *,
  config: Mapping[str, Any],
  profile: bool = False,
) -> tuple[TrainState, int]:
  """Trains to the end; (the state that is to be exported, its step).

  Args:
    kept: where the teacher's trunk is kept, if it is; config: for trackers to show.

  Raises:
    UserError: for what is not finite, in a step or before the first one.
    Stopped: if the run's `stop` came true, everything being saved.
  """
  kept = kept and _whole(run, kept)
  batches = Batches(run, beforehand.answers(run, workdir), kept)
  place = _start(run, checkpoints, batches)
  about.write(run, workdir, place.step)
  writer = _writer(run, workdir, place.step if checkpoints.steps() else -1, config)
  judged = beforehand.with_answers(run, workdir)
  try:
    evaluations = Evaluations(judged, workdir, writer, batches)
    run = _begin(run, evaluations, checkpoints, batches, kept, place)
    run.stop.check()  # before anything is compiled
    trace = Trace(workdir.profile if profile else None, place.step, run.plan.steps)
    with Progress(run, writer, place.step) as progress, trace:
      state, step = _loop(
        run, place, checkpoints, batches, evaluations, progress, trace
      )
    run.stop.check()
    state, chosen = checkpoints.best(run.plan.abstract, run.mesh, (state, step))
    writer.write(step, "export", {"exported_step": chosen})
  finally:
    writer.close()
  return state, chosen


def _begin(
  run: Run,
  evaluations: Evaluations,
  checkpoints: Checkpoints,
  batches: Batches,
  kept: trunk.Kept | None,
  place: Place,
) -> Run:
  """Evaluates before the first step, or what a signal had cut off.

  Returns:
    The run that goes on: without the teacher's lower layers where nobody needs them.
  """
  state, step, loader = place
  if step == 0:
    evaluations.teachers(state.params)
  if kept and kept.replaces:
    run = run.only_top()
    _log.info("teacher.trunk: the teacher's lower layers leave the devices")
    evaluations.go_on_with(run, kept)
  if evaluations.due(step):
    scores = evaluations(step, state.params)
    if step:
      checkpoints.save(step, state, loader, scores, batches.state())
  return run


def _whole(run: Run, kept: trunk.Kept) -> trunk.Kept:
  """The trunk with what is still missing of it computed."""
  where = run.mesh, kept
  kept = trunk.complete(run.cast, run.data, run.settings, *where, run.stop.heard)
  seen, rows = run.plan.steps * run.settings.train.batch_size, len(run.data.packs)
  if seen < 2 * rows:
    _log.warning(
      "%s: the run sees its %d rows %.1f times; a trunk pays from the second time on",
      kept.train.name,
      rows,
      seen / rows,
    )
  return kept


def _writer(
  run: Run, workdir: Workdir, after: int, config: Mapping[str, Any]
) -> metrics.Writer:
  """Writes the figures that come after a step."""
  settings = run.settings.train
  return metrics.Writer(
    workdir.path,
    after,
    tensorboard=settings.tensorboard,
    wandb=settings.wandb,
    config=config,
  )


def _start(run: Run, checkpoints: Checkpoints, batches: Batches) -> Place:
  """The newest checkpoint, the batches set to it; or step 0."""
  loader = run.data.stream or _loader(run)
  if not checkpoints.steps():
    return Place(run.init(), 0, loader)
  state, step, drawn = checkpoints.restore(
    run.plan.abstract, loader, run.mesh, batches.state()
  )
  if drawn:
    batches.restore(drawn)
  _log.info("resuming at step %d of %d", step, run.plan.steps)
  return Place(state, step, loader)


def _loader(run: Run) -> Iterator:
  settings = run.settings
  return train_loader(
    run.data.train,
    batch_size=settings.train.batch_size,
    length=settings.data.max_length,
    pad_id=PAD_ID,
    packs=run.data.packs,
    teacher_length=run.data.teacher_length,
    seed=settings.train.seed,
    own=sharding.own_rows(settings.train.batch_size, run.mesh),
  )


def _loop(
  run: Run,
  place: Place,
  checkpoints: Checkpoints,
  batches: Batches,
  evaluations: Evaluations,
  progress: Progress,
  trace: Trace,
) -> tuple[TrainState, int]:
  """Trains to the last step, or to where patience ends: (state, step), all saved."""
  state, step, loader = place
  programs, frozen, pending = _Programs(run), run.cast.frozen, None
  agreement = Agreement(run.stop)
  while step < run.plan.steps and not evaluations.stalled():
    trace.begin(step + 1, state)
    rows = next(loader)
    batch, drawn = batches.batch(step, state.params, rows)
    train_step, new = programs.at(step)
    state, values = train_step(state, frozen, batch)
    step += 1
    if pending:
      _read(pending, run, state, checkpoints, progress)
    pending = (step, rows["all_rows"], values, drawn, new)
    stopping = agreement.ask()
    due = evaluations.due(step) and not stopping
    if stopping or due or step % run.settings.checkpoint.every == 0:
      # Never save beyond a step that was not finite.
      _read(pending, run, state, checkpoints, progress)
      pending = scores = None
      if due:
        scores, stopping = _scored(evaluations, step, state, progress)
      checkpoints.save(step, state, loader, scores, batches.state())
    if pending is None and (stopping := stopping or agreement.ask()):
      checkpoints.wait()
      raise Stopped(stopping)
  if step < run.plan.steps:
    evaluations.say_stalled()
  checkpoints.wait()
  return state, step


def _read(
  pending: tuple,
  run: Run,
  state: TrainState,
  checkpoints: Checkpoints,
  progress: Progress,
) -> None:
  """Reads a step; a UserError with all that can be told if it is not finite."""
  try:
    progress.read(*pending)
  except NotFinite as found:
    checkpoints.wait()
    where, trees = run.data.where(found.rows), _trees(run, state.params)
    raise nonfinite.error(found, where, trees, checkpoints.steps()) from None


def _trees(run: Run, params: Mapping[str, PyTree]) -> dict[str, PyTree]:
  """All weights that take part in a step, by what people call them."""
  frozen = {
    f"the teacher {name}" if len(run.cast.teachers) > 1 else "the teacher": tree
    for name, tree in run.cast.frozen.items()
    if name != STUDENT
  }
  return frozen | {f"the {name}": tree for name, tree in params.items()}


def _scored(
  evaluations: Evaluations, step: int, state: TrainState, progress: Progress
) -> tuple[dict[str, float] | None, int]:
  """(the scores, 0), or (None, the signal) where the run is to stop in the middle.

  The state is saved in either case; what goes on from it evaluates first.
  """
  try:
    with progress.paused():
      scores = evaluations(step, state.params)
  except Stopped as stopped:
    return None, stopped.number
  progress.show_scores(scores)
  return scores, 0


class _Programs:
  """The training step, and the one in which adapters are held; compiled when needed."""

  def __init__(self, run: Run):
    self._run, self._made = run, {}

  def at(self, step: int) -> tuple[Callable, bool]:
    """(the program for the step after `step`, whether it is new and compiles first)."""
    run = self._run
    learns = run.settings.adapter.learns(step, run.plan.steps)
    learns = learns or not run.method.adapts
    new = learns not in self._made
    if new:
      self._made[learns] = _compiled(run, learns)
    return self._made[learns], new


def _compiled(run: Run, learns: bool) -> Callable:
  plan = run.plan
  return compile_step(
    run.method,
    plan.models,
    plan.optimizers,
    run.settings.train.microbatches,
    plan.steps,
    plan.abstract,
    run.mesh,
    learns,
  )
