"""Short runs give the losses, figures and weights they gave: see golden_losses.py.

On the machine that wrote the file to the last bit, elsewhere to 1e-3.
"""

import json
import math
import subprocess
import sys

import exact_losses
import golden_losses
import pytest
from commands import ROOT, environment

HALF = len(golden_losses.VARIANTS) // 2
NAMES = list(golden_losses.VARIANTS)


def compare(names):
  done = subprocess.run(
    [sys.executable, "tests/golden_losses.py", *names],
    cwd=ROOT,
    env=environment(),
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stdout + done.stderr[-2000:]
  assert [line.split(":")[0] for line in done.stdout.splitlines()] == names


def test_the_file_has_every_variant():
  kept = json.loads(golden_losses.GOLDEN.read_text())["runs"]
  assert set(kept) == set(NAMES)
  assert all(len(run["loss"]) == 20 and run["exported"] for run in kept.values())


@pytest.mark.slow
def test_the_projects_own_method():
  compare(["okd"])


@pytest.mark.slow
@pytest.mark.parametrize("names", [NAMES[:HALF], NAMES[HALF:]], ids=["first", "second"])
def test_all_variants(names):
  compare(names)


@pytest.mark.parametrize(
  "changes, same_machine, words",
  [
    ({}, True, ""),
    ({"loss": [1.0, 2.0001]}, True, "loss differ, losses from step 2"),
    ({"loss": [1.0, 2.0001]}, False, ""),
    ({"loss": [1.0, 2.1]}, False, "losses differ from step 2"),
    ({"exported": {}}, True, "exported differ"),
  ],
)
def test_what_counts_as_a_difference(changes, same_machine, words):
  kept = {"loss": [1.0, 2.0], "eval": {"loss": 1.5}, "exported": {"student": "a"}}
  assert golden_losses.difference(kept, kept | changes, same_machine) == words


def test_a_hundred_losses_are_those_of_the_file():
  """To the last bit, of this version of JAX; reliability 8. See exact_losses.py."""
  done = subprocess.run(
    [sys.executable, "tests/exact_losses.py"],
    cwd=ROOT,
    env=environment(),
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.stdout == "equal\n", done.stdout + done.stderr[-2000:]


def test_a_loss_that_moved_is_told_with_what_to_do():
  kept = [value.hex() for value in (1.0, 2.0, 3.0)]
  assert exact_losses.difference(kept, kept) == ""
  moved = [(1.0).hex(), math.nextafter(2.0, 3.0).hex(), (3.5).hex()]
  told = exact_losses.difference(kept, moved)
  assert told.startswith("2 of 3 losses have moved, first that of step 2: 2.0 there")
  assert "tests/exact_losses.py --write" in told
  with pytest.raises(ValueError, match="shorter"):
    exact_losses.difference(kept, kept[:2])
