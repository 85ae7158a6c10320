"""The loop: dispatch step n, read the metrics of n-1, checkpoint, evaluate, export."""

import json
import logging
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
from ml_collections import ConfigDict

from okd_jax.analysis import report
from okd_jax.config import read as configuration
from okd_jax.data import PAD_ID, Example, train_loader
from okd_jax.errors import UserError
from okd_jax.evaluation.figures import COLUMNS
from okd_jax.run import build as setup
from okd_jax.run import checkpoint
from okd_jax.run.batches import Sampler, answers_beforehand
from okd_jax.run.build import Run
from okd_jax.run.evaluator import Evaluator
from okd_jax.run.export import export_run, module_folder
from okd_jax.run.progress import Progress
from okd_jax.run.step import TrainState, compile_step
from okd_jax.run.trace import Profile
from okd_jax.runtime import metrics
from okd_jax.runtime.files import write_text
from okd_jax.teachers import saliency, trunk

_log = logging.getLogger(__name__)

TERMINATED = 128 + signal.SIGTERM


def run(config: ConfigDict, workdir: Path, profile: bool = False) -> None:
  """Trains the stages that `config` names, in order, and then the run itself.

  Whatever has finished is left alone, whatever was interrupted goes on. With `profile`
  each leaves a trace of some of its steps in its folder's profile/.

  Raises:
    UserError: for whatever is wrong with the configuration, a model or the data.
    SystemExit: with status 143 after SIGTERM, everything being saved.
  """
  with _Terminated() as terminated:
    parts = list(stages(config, workdir))
    for name, part, _ in parts:
      try:
        setup.check(part)  # of all, before the first of them is trained
      except UserError as error:
        raise UserError(f"stage {name}: {error}" if name else str(error)) from error
    for name, part, folder in parts:
      if name:
        _log.info("stage %s, in %s", name, folder)
      _run_one(part, folder, terminated, profile)


def stages(config: ConfigDict, workdir: Path):
  """(name, configuration, folder) of each stage and at last of the run, name ''."""
  base = config.copy_and_resolve_references()
  # Read from the original, since a copy would bring the stages into sorted order.
  parts = {name: config.stages[name].to_dict() for name in config.stages}
  base.stages = ConfigDict()
  for name, changes in parts.items():
    part = base.to_dict()
    if "name" in changes.get("method", {}):
      # What was meant for the run's own method is not meant for this one.
      part["method"]["end"] = dict.fromkeys(part["method"]["end"])
      part["method"]["cross_tokenizer"] = part["adapter"]["kind"] = ""
    part = ConfigDict(part).lock()
    try:
      part.update(changes)
    except (AttributeError, KeyError, TypeError) as error:
      raise UserError(f"stage {name}: {str(error).splitlines()[0]}") from error
    yield name, _resolve(part, parts, workdir), workdir / "stages" / name
  yield "", _resolve(base, parts, workdir), workdir


def _resolve(config: ConfigDict, parts, workdir: Path) -> ConfigDict:
  """Puts the folders of earlier stages in the place of 'stage:NAME'."""
  for section, key in (("teacher", "path"), ("student", "path"), ("data", "tokenizer")):
    value = config[section][key]
    if value.startswith(setup.STAGE):
      name = value.removeprefix(setup.STAGE)
      if name not in parts:
        raise UserError(
          f"{section}.{key}={value!r}, but the stages are: {', '.join(parts) or 'none'}"
        )
      config[section][key] = str(workdir / "stages" / name)
  return config


def _run_one(
  config: ConfigDict, workdir: Path, terminated: "_Terminated", profile: bool
) -> None:
  if _is_finished(config, workdir):
    _log.info("%s is finished already; name another workdir for another run", workdir)
    print(summary(workdir), flush=True)
    return
  parts = setup.build(config, workdir)
  terminated.check()
  kept = trunk.opened(parts)
  if config.data.tokenizer:
    _keep_tokenizer(parts.tokenizer, workdir / "tokenizer")
  write_text(workdir / "config.json", json.dumps(config.to_dict(), indent=2) + "\n")
  if parts.choice:
    # Never without its config.json, so no run ever reads another one's.
    saliency.write(workdir / setup.CHOICE, parts.choice)
  best = metrics.score_by(config.eval.best)
  folder = workdir / "checkpoints"
  with (
    jax.set_mesh(parts.mesh),
    checkpoint.opened(folder, config.checkpoint.keep, best) as checkpoints,
  ):
    state, chosen = _train(parts, workdir, checkpoints, kept, terminated, profile)
    if chosen != parts.steps:
      state = checkpoints.restore_step(chosen, parts.abstract, None, parts.mesh)
    _log.info("exporting the student of step %d", chosen)
    export_run(parts, state.params, workdir / "student", workdir / module_folder(parts))
  report.write(workdir)
  print(summary(workdir), flush=True)


def _train(
  parts: Run, workdir: Path, checkpoints, kept, terminated, profile: bool
) -> tuple[TrainState, int]:
  """The last state, and the step of which the student is to be exported."""
  fresh = not checkpoints.steps()
  kept = trunk.prepare(parts, kept)
  sampler = Sampler(parts, _answers(parts, workdir), PAD_ID, kept)
  state, step, loader = _start(parts, checkpoints, sampler)
  writer = metrics.Writer(
    workdir,
    -1 if fresh else step,
    parts.config.train.tensorboard,
    parts.config.train.wandb,
  )
  evaluations = _Evaluations(parts, writer, sampler, metrics.read(workdir))
  if evaluations.begin(step, state.params) and step:
    # A signal had cut this step's evaluation off.
    checkpoints.save(step, state, loader, evaluations.scores[step], sampler.state())
  terminated.check()
  trace = Profile(workdir / "profile" if profile else None, step, parts.steps)
  start = state, step, loader
  with Progress(parts, writer, step) as progress, trace:
    state = _loop(
      parts, start, checkpoints, sampler, evaluations, terminated, progress, trace
    )
  terminated.check()
  chosen = checkpoints.best_step()
  writer.write(parts.steps, "export", {"exported_step": chosen})
  writer.close()
  return state, chosen


def _keep_tokenizer(tokenizer, folder: Path) -> None:
  """Saves what a resumed run must find again, whole or not at all."""
  if folder.exists():
    return
  partial = folder.with_name(".tokenizer.partial")
  tokenizer.save_pretrained(partial)
  partial.rename(folder)


def _is_finished(config: ConfigDict, workdir: Path) -> bool:
  """Whether `workdir` holds the whole run; an error if it holds another one."""
  path = workdir / "config.json"
  if not path.exists():
    return False
  saved = configuration.saved(path)
  wanted = json.loads(json.dumps(config.to_dict()))
  different = [
    f"{key}={before!r} there, {now!r} here"
    for key, before, now in _differences(saved, wanted)
  ]
  if different:
    raise UserError(
      f"{workdir} holds a run with another configuration ({'; '.join(different[:5])}); "
      "name another workdir, or the same values to go on"
    )
  return (workdir / "report.html").exists()


def _differences(a, b, prefix=""):
  """(key, value in a, value in b) wherever two nested dicts differ."""
  for key in sorted(set(a) | set(b)):
    left, right, path = a.get(key), b.get(key), prefix + key
    if isinstance(left, dict) and isinstance(right, dict):
      yield from _differences(left, right, path + ".")
    elif left != right:
      yield path, left, right


def _start(parts: Run, checkpoints, sampler) -> tuple[TrainState, int, Iterator]:
  """(state, step, loader) of the newest checkpoint, the sampler set to it; or of 0."""
  config = parts.config
  loader = train_loader(
    parts.train,
    batch_size=config.train.batch_size,
    length=config.data.max_length,
    pad_id=PAD_ID,
    packs=parts.packs,
    seed=config.train.seed,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )
  if not checkpoints.steps():
    return parts.init(), 0, loader
  state, step, sampled = checkpoints.restore(
    parts.abstract, loader, parts.mesh, sampler.state()
  )
  if sampled:
    sampler.restore(sampled)
  _log.info("resuming at step %d of %d", step, parts.steps)
  return state, step, loader


class _Evaluations:
  """The student's scores: found, written down and told to the sampler.

  scores: by step, those of the run's earlier parts among them.
  """

  def __init__(self, parts: Run, writer, sampler, rows: list[dict]):
    self._config, self._steps = parts.config.eval, parts.steps
    self._evaluator = Evaluator(parts)
    self._writer, self._sampler = writer, sampler
    self.scores = {row["step"]: row for row in rows if row["kind"] == "eval"}

  def begin(self, step: int, params) -> bool:
    """Scores the teachers, at step 0, and the student where that is still missing."""
    if step == 0:
      for role, figures in self._evaluator.teachers().items():
        self._writer.write(0, role, figures)
    due = self.due(step)
    if due:
      self(step, params)
    return due

  def due(self, step: int) -> bool:
    every = self._config.every
    wanted = step in (0, self._steps) or bool(every and step % every == 0)
    return wanted and step not in self.scores

  def __call__(self, step: int, params) -> dict[str, float]:
    scores = self._evaluator(params)
    self._writer.write(step, "eval", scores)
    self.scores[step] = scores
    self._sampler.observe(scores["loss"])
    return scores

  def stalled(self) -> bool:
    """Whether eval.patience has run out."""
    return metrics.stalled(self.scores, self._config.best, self._config.patience)


def _loop(
  parts: Run, start, checkpoints, sampler, evaluations, terminated, progress, trace
) -> TrainState:
  """Trains from start = (state, step, loader) to the last step, or to where patience
  ends; returns the final state, saved and evaluated."""
  state, step, loader = start
  train_step = _train_step(parts)
  pending = None
  while step < parts.steps and not evaluations.stalled():
    trace.begin(step + 1, state)
    batch = next(loader)
    rows = batch["row"]
    batch, figures = sampler.batch(step, state.params, batch)
    state, values = train_step(state, parts.frozen, batch)
    step += 1
    if pending:
      progress.read(*pending)
    pending = (step, rows, values, figures)
    stop = bool(terminated)
    due = evaluations.due(step) and not stop
    if stop or due or step % parts.config.checkpoint.every == 0:
      progress.read(*pending)  # never save beyond a step that was not finite
      pending = None
      scores = None
      if due:
        with progress.paused():
          scores = evaluations(step, state.params)
        progress.show_scores(scores)
      checkpoints.save(step, state, loader, scores, sampler.state())
    if terminated and pending is None:
      checkpoints.wait()
      terminated.check()
  if step < parts.steps:
    best, patience = parts.config.eval.best, parts.config.eval.patience
    _log.info("%s has not improved in %d evaluations: stopped early", best, patience)
  checkpoints.wait()
  return state


def _train_step(parts: Run):
  return compile_step(
    parts.method,
    parts.models,
    parts.optimizers,
    parts.config.train.microbatches,
    parts.steps,
    parts.abstract,
    parts.mesh,
  )


def _answers(parts: Run, workdir: Path) -> dict[str, list[Example]]:
  """What the models answered to every prompt before training, sampled or read again."""
  return {
    name: answers_beforehand(parts, name, workdir / "samples" / f"{name}.jsonl")
    for name in parts.method.sequences.beforehand
  }


class _Terminated:
  """True once SIGTERM has come; a second one ends the process at once."""

  def __enter__(self):
    self._came = False
    self._before = signal.signal(signal.SIGTERM, self._note)
    return self

  def _note(self, *_):
    self._came = True
    signal.signal(signal.SIGTERM, self._before)

  def __bool__(self):
    return self._came

  def check(self) -> None:
    """Leaves with status 143 if the signal has come; to be called when all is saved."""
    if self._came:
      _log.warning("stopped by SIGTERM; the same command goes on from here")
      sys.exit(TERMINATED)

  def __exit__(self, *_):
    signal.signal(signal.SIGTERM, self._before)


def summary(workdir: Path) -> str:
  """The closing table of a run, and where its results lie."""
  lines = [
    metrics.table(report.summary_rows(workdir), COLUMNS),
    "",
    f"student  {workdir / 'student'}",
  ]
  for folder in ("adapter", "teacher"):  # the online module, in either form
    if (workdir / folder).exists():
      lines.append(f"{folder}  {workdir / folder}")
  lines += [
    f"metrics  {workdir / 'metrics.jsonl'}",
    f"report   {workdir / 'report.html'}",
  ]
  return "\n".join(lines)
