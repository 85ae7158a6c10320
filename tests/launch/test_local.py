"""The scripts for one machine, with real runs."""

import sys

import pytest
from commands import QUICK, losses, rows
from commands import environment as user
from launching import LAUNCH, bash

pytestmark = pytest.mark.slow


def run(script, *arguments, **changes):
  return bash(
    LAUNCH / script,
    *arguments,
    env=user() | {"PYTHON": sys.executable} | changes,
    timeout=600,
  )


def test_two_processes_train_what_one_does(tmp_path):
  """And a run that was made by two goes on with one: the same command resumes."""
  one, two = tmp_path / "one", tmp_path / "two"
  run("local.sh", "configs/debug.py", one, *QUICK)
  done = run("local_processes.sh", 2, "configs/debug.py", two, *QUICK, DEVICES="2")
  assert {line[:4] for line in done.stdout.splitlines()} <= {"[0] ", "[1] "}
  assert losses(two) == pytest.approx(losses(one), rel=1e-4)
  assert len(rows(two, "train")) == len(rows(one, "train")) == 6
  again = run("local.sh", "configs/debug.py", two, *QUICK)
  assert len(rows(two, "train")) == 6, again.stderr
