"""The campaign of kills.py, in short, and how it judges."""

import json
import subprocess
import sys

import pytest
from commands import ROOT, environment
from faults import kills

CASES = [
  ({"kind": "okd", "struck": [["save", "SIGKILL"]], "problem": ""}, "| okd | 1 | 1 |"),
  ({"kind": "kd", "struck": [], "problem": "differs: losses"}, "| kd | 1 | 0 |"),
]


@pytest.mark.parametrize("one, line", CASES)
def test_the_table_counts_what_ended_identical(one, line):
  assert line in kills.table([one]).splitlines()


def row(step, **values):
  return json.dumps({"step": step, "kind": "train"} | values) + "\n"


def test_one_bit_is_a_difference(tmp_path):
  for name, loss in {"one": 0.1 + 0.2, "same": 0.1 + 0.2, "other": 0.3}.items():
    (tmp_path / name / "student").mkdir(parents=True)
    (tmp_path / name / "metrics.jsonl").write_text(row(1, loss=loss))
    (tmp_path / name / "student/model").write_bytes(b"abc")
  assert kills.differences(tmp_path / "one", tmp_path / "same") == []
  assert kills.differences(tmp_path / "one", tmp_path / "other") == ["losses"]
  (tmp_path / "same/student/model").write_bytes(b"abd")
  assert kills.differences(tmp_path / "one", tmp_path / "same") == ["student"]


def test_every_method_is_killed():
  assert set(kills.METHODS) <= set(kills.KINDS)


@pytest.mark.slow
def test_eight_killed_runs_end_as_the_undisturbed_ones():
  done = subprocess.run(
    [sys.executable, "tests/faults/kills.py", "--trials=8", "okd", "seqkd"],
    cwd=ROOT,
    env=environment(),
    capture_output=True,
    text=True,
    timeout=1800,
  )
  assert done.returncode == 0, done.stdout + done.stderr[-3000:]
  assert "8 trials, 8 identical" in done.stdout
