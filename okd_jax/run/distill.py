"""A whole distillation: stages in order, each built, trained, exported, reported."""

import dataclasses
import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
from jaxtyping import PyTree
from ml_collections import ConfigDict

from okd_jax import models
from okd_jax.analysis import report
from okd_jax.config.stages import Stage, stages
from okd_jax.errors import UserError
from okd_jax.evaluation import figures
from okd_jax.models import Model
from okd_jax.run import about, card, checkpoint, finished, identity, room, seal
from okd_jax.run.build import Run, build
from okd_jax.run.export import (
  export_student,
  export_student_adapter,
  export_teachers,
)
from okd_jax.run.identity import growth, tell_growth
from okd_jax.run.job import check
from okd_jax.run.loop import train
from okd_jax.run.stop import Stop
from okd_jax.runtime import lock, machine
from okd_jax.runtime.workdir import MODULES, Workdir, barrier
from okd_jax.teachers import activity, saliency, trunk

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Result:
  """What a finished run left in its workdir.

  figures: of everybody who was measured, by name: 'student, step N' is the last row.
  adapter: the folder of the adapters, or of the teacher whose own blocks learned; None
    where the teachers were frozen.
  """

  workdir: Path
  figures: dict[str, dict[str, float]]

  @property
  def student(self) -> Model:
    """The student, loaded."""
    return models.load(self.workdir / "student")

  @property
  def adapter(self) -> Path | None:
    found = [self.workdir / name for name in MODULES if (self.workdir / name).exists()]
    return found[0] if found else None

  @property
  def report(self) -> Path:
    return self.workdir / "report.html"

  def __str__(self) -> str:
    """The closing table of a run, and where its results lie."""
    lines = [figures.table(self.figures), "", f"student  {self.workdir / 'student'}"]
    if self.adapter:
      lines.append(f"{self.adapter.name}  {self.adapter}")
    if (own := Workdir(self.workdir).student_adapter).exists():
      lines.append(f"its LoRA {own}")
    lines.append(f"metrics  {self.workdir / 'metrics.jsonl'}")
    return "\n".join([*lines, f"report   {self.report}"])


def run(
  config: ConfigDict, workdir: Path, stop: Stop | None = None, profile: bool = False
) -> list[Result]:
  """Trains the stages that `config` names, in order, and then the run itself.

  Whatever has finished is left alone, whatever was interrupted goes on.

  Args:
    stop: asked between batches; never by default.
    profile: leave a trace of some steps in each folder's profile/.

  Returns:
    The results in the order of the stages; the last is the run's own.

  Raises:
    UserError: for whatever is wrong with the configuration, a model or the data.
    Stopped: if `stop` came true, everything being saved.
  """
  parts = stages(config, workdir)
  stop = stop or Stop()
  for part in parts:
    try:
      check(part.config)  # of all, before the first of them is trained
    except UserError as error:
      name = part.name
      raise UserError(f"stage {name}: {error}" if name else str(error)) from error
  results = []
  with lock.held(workdir) as ours:
    _refuse_stale(parts)
    for part in parts:
      if part.name:
        _log.info("stage %s, in %s", part.name, part.workdir)
      _run_one(part, stop, profile, ours)
      results.append(Result(part.workdir, report.summary_rows(part.workdir)))
      if part.name:
        _log.info("%s", results[-1])
  return results


def _refuse_stale(parts: list[Stage]) -> None:
  """Refuses a longer stage whose result a run has begun with."""
  for i, part in enumerate(parts):
    key = growth(part.config.to_dict(), Workdir(part.workdir))
    for later in parts[i + 1 :] if key else ():
      named = {later.config.teacher.path, later.config.student.path}
      named |= {later.config.data.tokenizer, *later.config.teachers.values()}
      if str(part.workdir) in named and Workdir(later.workdir).config.exists():
        raise UserError(
          f"stage {part.name}: {key} is larger than it was, but {later.workdir} has "
          "begun with the stage as it was; name another workdir"
        )


def _run_one(part: Stage, stop: Stop, profile: bool, ours: Callable[[], None]) -> None:
  """One stage; `ours` raises once the workdir is another run's."""
  workdir = Workdir(part.workdir)
  longer = growth(part.config.to_dict(), workdir)
  if not longer and finished.whole(workdir):
    _log.info("%s is finished already; name another workdir to run anew", workdir.path)
    return
  room.try_out(workdir)
  _make_sound(workdir)
  own = build(part.config, workdir, stop)
  about.check_rows(own, workdir)
  if longer:
    tell_growth(own.settings, own.method)
  identity.check_versions(own.settings, workdir)
  stop.check()
  kept = None
  if own.settings.teacher.trunk:
    kept = trunk.opened(own.job.method, own.cast, own.data, own.settings)
  best, config = figures.score_by(own.settings.eval.best), part.config.to_dict()
  made_from = identity.of(config, own.settings, about.data_of(own))
  _begin(part, own, workdir, made_from["models"])
  beside = seal.Beside(workdir, made_from, ours)
  with (
    machine.counted(workdir),
    jax.set_mesh(own.mesh),
    checkpoint.opened(
      workdir.checkpoints, own.settings.checkpoint.keep, best, beside=beside
    ) as checkpoints,
  ):
    state, chosen = train(
      own, workdir, checkpoints, kept, config=config, profile=profile
    )
    _export(own, state.params, chosen, workdir)
  report.write(workdir)
  finished.write(workdir)
  barrier("workdir finished")  # the next stage reads it


def _export(
  own: Run, params: Mapping[str, PyTree], step: int, workdir: Workdir
) -> None:
  """Writes whatever the run was for."""
  _log.info("exporting the student of step %d", step)
  said = card.of_student(own.settings, workdir.path, step)
  export_student(own, params, workdir.student, card=said)
  if own.settings.student.adapter.kind:
    export_student_adapter(own, params, workdir.student_adapter)
  if adapter := own.cast.adapter:
    export_teachers(own, params, workdir.module(adapter.folder))


def _make_sound(workdir: Workdir) -> None:
  """Puts back what a run that goes on reads before its checkpoint, or refuses."""
  if found := seal.newest(workdir.checkpoints):
    place, sealed = found
    seal.put_back(workdir, place, sealed, fixed=True)
    seal.check_watched(workdir, sealed)


def _begin(part: Stage, own: Run, workdir: Workdir, digests: Mapping[str, str]) -> None:
  """Writes what a resumed run must find again; digests: of the models."""
  if own.settings.data.tokenizer:
    workdir.keep_folder("tokenizer", own.data.tokenizer.save_pretrained)
  workdir.remove(workdir.report)  # of the run as it was, if it is longer now
  if file := part.config.method.file:
    workdir.write_text(workdir.method, Path(file).read_text(encoding="utf8"))
  if not workdir.models.exists():
    workdir.write_json(workdir.models, digests)
  workdir.write_json(workdir.config, part.config.to_dict())
  if own.cast.choice:
    # Never without its config.json, so no run ever reads another one's.
    saliency.write(workdir.blocks, own.cast.choice)
  if own.cast.kept:
    activity.write(workdir.width, own.cast.kept)
  barrier("workdir begun")
  if not workdir.config.exists():
    raise UserError(
      f"{workdir.path}: this process does not see what process 0 has written there; "
      "name a workdir that all processes share"
    )
