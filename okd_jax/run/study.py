"""The runs of a study: each is trained and measured, one process after the other."""

import logging
import statistics
import subprocess
import time
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from okd_jax import models
from okd_jax.analysis import pair
from okd_jax.analysis.plots import History, read_history
from okd_jax.config.players import STUDENT
from okd_jax.config.study import Job, Study
from okd_jax.data import load_records
from okd_jax.data.sources import source_list
from okd_jax.errors import UserError
from okd_jax.evaluation.held_out import Options
from okd_jax.evaluation.sets import evaluate_sets
from okd_jax.run import distill
from okd_jax.run.stop import Stop
from okd_jax.runtime.files import read_json
from okd_jax.runtime.machine import machine, versions
from okd_jax.runtime.workdir import Workdir

_log = logging.getLogger(__name__)

MEASURED = "measured.json"


def done(job: Job) -> bool:
  """Whether a job's results are all there."""
  workdir = Workdir(job.workdir)
  return workdir.report.exists() and (not job.arm or _measured(job).exists())


def measured(job: Job) -> dict[str, Any]:
  """What `run` found of a run that is done."""
  return read_json(_measured(job))


def _measured(job: Job) -> Any:
  return job.workdir / MEASURED


def run(study: Study, job: Job, stop: Stop) -> None:
  """Trains one run and measures it; goes on where it was.

  Raises:
    UserError: for whatever is wrong with the configuration, a model or the data.
    Stopped: if `stop` came true, everything being saved.
  """
  distill.run(job.config, job.workdir, stop)
  if not job.arm:
    return
  stop.check()
  found = _training(job) | _beside_teacher(study, job) | _answers(study, job)
  Workdir(job.workdir).write_json(MEASURED, found)


def run_all(
  jobs: Sequence[Job], command: Sequence[str], stop: Stop, at_once: int
) -> None:
  """Starts a process for each job that is not done, `at_once` at a time.

  Stages come first, one by one, since runs begin with them.

  Args:
    command: what starts one, --run=NAME still missing.

  Raises:
    UserError: if one fails; the others are stopped.
    Stopped: if `stop` came true; the processes have saved everything.
  """
  stages = [job for job in jobs if not job.arm and not done(job)]
  runs = [job for job in jobs if job.arm and not done(job)]
  told = _Told(len(jobs), sum(map(done, jobs)))
  _start(stages, command, stop, 1, told)
  _start(runs, command, stop, at_once, told)


class _Told:
  """Says which run begins, how many there are and how long the rest may take."""

  def __init__(self, total: int, done: int):
    self._total, self._done, self._old = total, done, done
    self._began = time.monotonic()

  def begins(self, job: Job, beside: int) -> None:
    text = f"[{self._done + beside + 1}/{self._total}] {job.name}, in {job.workdir}"
    if new := self._done - self._old:
      spent = time.monotonic() - self._began
      left = (self._total - self._done) * spent / new
      text += f"; about {tqdm.format_interval(left)} left"
    _log.info("%s", text)

  def ended(self) -> None:
    self._done += 1


def _start(
  jobs: Sequence[Job], command: Sequence[str], stop: Stop, at_once: int, told: _Told
) -> None:
  waiting, running = list(jobs), {}
  try:
    while waiting or running:
      while waiting and len(running) < at_once:
        job = waiting.pop(0)
        told.begins(job, len(running))
        running[job.name] = (job, _spawn(job, command, alone=at_once == 1))
      for name, (job, process) in list(running.items()):
        if process.poll() is None:
          continue
        del running[name]
        stop.check()
        if process.returncode:
          raise UserError(_failure(job, process.returncode, alone=at_once == 1))
        told.ended()
      stop.check()
      time.sleep(0.2)
  finally:
    for _, process in running.values():
      process.terminate()
    for _, process in running.values():
      process.wait()


def _spawn(job: Job, command: Sequence[str], *, alone: bool) -> subprocess.Popen:
  """One process; of several at once each writes to its own log."""
  arguments = [*command, f"--run={job.name}"]
  if alone:
    return subprocess.Popen(arguments, stdout=subprocess.DEVNULL)
  job.workdir.mkdir(parents=True, exist_ok=True)
  with (job.workdir / "log.txt").open("ab") as log:
    return subprocess.Popen(arguments, stdout=log, stderr=log)


def _failure(job: Job, status: int, *, alone: bool) -> str:
  where = "see above" if alone else f"see {job.workdir / 'log.txt'}"
  return (
    f"{job.name} ended with status {status} ({where}); the same command goes on with "
    "what is missing"
  )


# What is measured


def _training(job: Job) -> dict[str, Any]:
  """From metrics.jsonl: the last scores, the curve of all, and what a step cost."""
  history = read_history(job.workdir)
  seconds = seconds_a_step(history)
  final = dict(history.evals[history.final])
  cost = Workdir(job.workdir).cost
  tokens = [row["tokens"] for row in history.train.values() if "tokens" in row]
  return {
    "final": final,
    "start": dict(history.evals.get(0, {})),
    "teacher": dict(history.teacher),
    "curve": [{"step": step} | dict(row) for step, row in history.evals.items()],
    "steps": max(history.train),
    "step_s": seconds,
    "tokens": round(statistics.fmean(tokens) * max(history.train)) if tokens else None,
    "peak": read_json(cost) if cost.exists() else None,
    "machine": machine() | {"jax": versions()["jax"]},
  }


def seconds_a_step(history: History) -> float | None:
  """The mean over a run; steps that wait for a compilation are left out.

  Those are the first one, and the first after each resumption: they have a row of
  their own, where others stand for several steps.
  """
  steps = list(history.train)
  covered = {b: b - a for a, b in zip([0, *steps], steps, strict=False)}
  usual = max(covered.values(), default=0)
  rows = [
    (n, history.train[step]["step_s"])
    for step, n in covered.items()
    if n == usual and "step_s" in history.train[step]
  ]
  if not rows or usual == 1 and len(rows) < 2:
    return None
  rows = rows[1:] if usual == 1 else rows
  return sum(n * s for n, s in rows) / sum(n for n, _ in rows)


def _beside_teacher(study: Study, job: Job) -> dict[str, Any]:
  """What `okd_jax.analyze` finds of the student, the frozen and the adapted teacher."""
  config, path = job.config, job.config.teacher.path
  if path in ("", STUDENT):  # a teacher at random, several, or the student itself
    return {"analysis": None}
  options = pair.Options(
    template=config.data.template,
    max_length=config.data.max_length,
    max_prompt_length=config.data.max_prompt_length,
    limit=config.eval.limit,
    length=study.excess,
    batch_size=config.eval.batch_size,
  )
  result = distill.Result(job.workdir, {})
  found = pair.analyse(
    result.student,
    models.load(path),
    result.adapter,
    load_records(study.held_out, columns=study.columns),
    options,
    models.load(job.judge) if job.judge else None,
  )
  return {"analysis": found}


def _answers(study: Study, job: Job) -> dict[str, Any]:
  """The answers' scores on every set, as MiniLLM and OKD measure them."""
  if not study.sets:
    return {"sets": {}}
  keys = {"protocol": True, "template": job.config.data.template}
  options = Options(**keys | dict(study.protocol), answers=str(job.workdir / "answers"))
  records = {name: load_records(source_list(x)) for name, x in study.sets.items()}
  student = models.load(job.workdir / "student")
  return {"sets": dict(evaluate_sets(student, records, options))}
