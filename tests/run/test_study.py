"""The processes of a study: their order, failures, stops; and a whole tiny one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
import small
from commands import ROOT, call, command, environment
from ml_collections import ConfigDict

from okd_jax import models
from okd_jax.analysis.plots import History
from okd_jax.config.study import Job, Study
from okd_jax.data import load_records, make_tokenizer
from okd_jax.errors import UserError
from okd_jax.run import study as runs
from okd_jax.run.stop import Stop, Stopped

# Stands for a run: notes when it began and ended, and leaves what a run leaves.
SCRIPT = """
import pathlib, sys, time
folder, name = pathlib.Path(sys.argv[1]), sys.argv[2].removeprefix("--run=")
def note(what):
  with (folder / "notes").open("a") as notes:
    notes.write(f"{what} {name}\\n")
note("begins")
time.sleep(0.3)
if name == "bad:0":
  sys.exit(3)
place = folder / name.replace(":", "-")
place.mkdir(exist_ok=True)
(place / "report.html").touch()
(place / "measured.json").touch()
note("ended")
"""


def some(folder, *names):
  jobs = [Job(name, ConfigDict(), folder / name.replace(":", "-")) for name in names]
  return jobs, [sys.executable, "-c", SCRIPT, str(folder)]


def notes(folder):
  path = folder / "notes"
  return path.read_text().splitlines() if path.exists() else []


def test_stages_come_first_and_what_is_done_is_not_run_again(tmp_path):
  jobs, start = some(tmp_path, "stage:teacher", "kd:0", "okd:0")
  runs.run_all(jobs, start, Stop(), 1)
  names = ("stage:teacher", "kd:0", "okd:0")
  assert notes(tmp_path) == [f"{w} {n}" for n in names for w in ("begins", "ended")]
  (tmp_path / "kd-0" / "measured.json").unlink()
  runs.run_all(jobs, start, Stop(), 1)
  assert notes(tmp_path)[6:] == ["begins kd:0", "ended kd:0"]


def test_several_at_once_but_never_beside_a_stage(tmp_path):
  jobs, start = some(tmp_path, "stage:teacher", "kd:0", "okd:0", "kd:1")
  runs.run_all(jobs, start, Stop(), 2)
  found = notes(tmp_path)
  assert found[:2] == ["begins stage:teacher", "ended stage:teacher"]
  running, most = 0, 0
  for note in found:
    running += 1 if note.startswith("begins") else -1
    most = max(most, running)
  assert most == 2 and (tmp_path / "kd-1" / "log.txt").exists()


def test_a_failure_is_named_and_starts_nothing_more(tmp_path):
  jobs, start = some(tmp_path, "kd:0", "bad:0", "okd:0")
  with pytest.raises(UserError, match="bad:0 ended with status 3.*goes on with"):
    runs.run_all(jobs, start, Stop(), 1)
  assert notes(tmp_path)[-1] == "begins bad:0"


def test_a_stop_ends_the_run_that_goes_on(tmp_path):
  jobs, start = some(tmp_path, "kd:0", "okd:0")

  class AtOnce(Stop):
    @property
    def number(self):
      return signal.SIGTERM if notes(tmp_path) else 0

  with pytest.raises(Stopped):
    runs.run_all(jobs, start, AtOnce(), 1)
  time.sleep(0.6)
  assert "begins okd:0" not in notes(tmp_path)


def history(rows):
  return History({}, {}, rows, None, {})


@pytest.mark.parametrize(
  "rows, want",
  [
    # The first step waits for its compilation and stands alone.
    ({1: 9.0, 20: 0.2, 40: 0.3, 60: 0.4}, 0.35),
    ({1: 9.0, 2: 0.2, 3: 0.4}, 0.3),
    ({1: 9.0}, None),
    ({}, None),
  ],
)
def test_what_a_step_cost_leaves_compilation_out(rows, want):
  found = runs.seconds_a_step(history({s: {"step_s": v} for s, v in rows.items()}))
  assert found == want or found == pytest.approx(want)


@pytest.mark.slow
def test_a_run_is_trained_and_measured(tmp_path, monkeypatch):
  """In this process: what measured.json has, of a teacher that is a folder."""
  monkeypatch.chdir(ROOT)
  teacher = tmp_path / "teacher"
  tokenizer = make_tokenizer("bytes", load_records("embedded:eval"))
  shape = models.preset(
    "llama",
    vocab_size=len(tokenizer),
    hidden_size=32,
    num_layers=2,
    num_heads=2,
    eos_ids=(tokenizer.eos_token_id,),
  )
  models.save(teacher, models.init(shape, jax.random.key(0)), shape, tokenizer)
  changes = {
    "teacher.path": str(teacher),
    "teacher.model.hidden_size": 0,
    "student.model.hidden_size": 0,
    "student.layers": 1,
    "method.name": "okd",
    "data.eval": "embedded:eval",
    "eval.every": 2,
    "eval.limit": 6,
    "eval.generate": False,
    "train.log_every": 1,
  }
  config = small.config(**changes)
  study = Study(
    name="mine",
    about="",
    config=config,
    arms={"okd": {}},
    seeds=1,
    baseline="okd",
    sets={"docs": "embedded:eval"},
    protocol={"limit": 4, "max_new_tokens": 4, "seeds": (1, 2)},
    excess=4,
  )
  job = Job("okd:0", config, tmp_path / "run")
  assert not runs.done(job)
  runs.run(study, job, Stop())
  assert runs.done(job)
  found = runs.measured(job)
  assert found["steps"] == 4 and [row["step"] for row in found["curve"]] == [0, 2, 4]
  assert found["step_s"] > 0 and found["tokens"] > 0
  assert found["peak"]["peak_bytes"] > 1e6
  assert found["final"]["adapted_drift"] >= 0
  analysis = found["analysis"]
  assert analysis["rows"] == 6 and "adapted" in analysis
  assert analysis["exposure_bias"]["teacher"]["length"] == 4
  for name in ("loss", "forward_kl", "reverse_kl"):  # two ways to the same figure
    assert analysis["teacher"]["all"][name] == pytest.approx(
      found["final"][name], rel=1e-4
    )
  assert "rougeL" in found["sets"]["docs"]


@pytest.mark.slow
def test_the_tiny_study_killed_and_resumed(tmp_path):
  """The whole command: SIGKILL in a run, SIGTERM in another, then to its end."""
  folder = tmp_path / "tiny"
  arguments = ("--config=studies/tiny", f"--workdir={folder}", "--arms=kd; okd")

  def interrupted(when, how):
    process = subprocess.Popen(
      command("study", *arguments), cwd=ROOT, env=environment(), start_new_session=True
    )
    deadline = time.monotonic() + 500
    while not when().exists():
      assert process.poll() is None and time.monotonic() < deadline
      time.sleep(0.1)
    if how == signal.SIGKILL:
      os.killpg(process.pid, how)
    else:
      process.send_signal(how)
    return process.wait(120)

  def checkpoint(run):
    return lambda: folder / run / "checkpoints" / "30"

  assert interrupted(checkpoint("stages/start"), signal.SIGKILL) == -signal.SIGKILL
  assert interrupted(checkpoint("runs/kd/0"), signal.SIGTERM) == 143
  done = call("study", *arguments, timeout=1800)
  assert "no difference" in done.stdout or "better" in done.stdout
  study = json.loads((folder / "study.json").read_text())
  assert set(study["runs"]) == {"kd", "okd"} and len(study["runs"]["kd"]) == 2
  row = study["rows"]["okd"]
  for name in ("loss", "forward_kl", "excess", "ms_a_step", "rougeL/documentation"):
    assert row[name]["std"] is not None, name
  assert "okd" in (folder / "table.md").read_text()
  links = [f"runs/{arm}/0/report.html" for arm in ("kd", "okd")]
  page = (folder / "report.html").read_text()
  assert all(link in page and (folder / link).exists() for link in links)
  before = Path(folder / "report.html").read_bytes()
  again = call("study", *arguments)
  assert "step" not in again.stderr.split("\n")[0]
  assert (folder / "report.html").read_bytes() == before
