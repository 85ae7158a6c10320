"""Several real processes, each with devices of its own, as one run."""

import re
import shutil
import signal
import time

import numpy as np
import pytest
from commands import ended, losses, rows, same_folder, start_several, train_several

pytestmark = pytest.mark.slow

LONG = ["--config.train.steps=60", "--config.checkpoint.every=10"]
LONG += ["--config.eval.every=0", "--config.eval.generate=False"]
WHAT = ("student", "adapter")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
  """A run of two processes that nobody stops."""
  workdir = tmp_path_factory.mktemp("runs") / "undisturbed"
  train_several(workdir, *LONG)
  return workdir


def wait_for(workdir, step, processes):
  """Returns once the figures of a step are there."""
  for _ in range(2400):
    assert all(process.poll() is None for process in processes), "it has ended"
    done = losses(workdir) if (workdir / "metrics.jsonl").exists() else {}
    if max(done, default=0) >= step:
      return
    time.sleep(0.1)
  raise AssertionError(f"step {step} was not reached")


def assert_same_end(one, other):
  assert losses(one) == losses(other)
  for name in WHAT:
    assert same_folder(one / name, other / name)


def test_sigterm_to_one_stops_all_and_two_go_on_to_the_same_bytes(
  undisturbed, tmp_path
):
  processes = start_several(tmp_path / "run", *LONG)
  wait_for(tmp_path / "run", 12, processes)
  processes[1].send_signal(signal.SIGTERM)
  for status, _, stderr in ended(processes):
    assert status == 143, stderr[-3000:]
    assert "stopped by SIGTERM; the same command goes on from here" in stderr
  cut = max(losses(tmp_path / "run"))
  saved = max(int(p.name) for p in (tmp_path / "run/checkpoints").iterdir())
  assert 12 <= cut == saved < 60
  for processes in (1, 4):  # from the same place, on other numbers of them
    other = shutil.copytree(tmp_path / "run", tmp_path / str(processes))
    train_several(other, *LONG, processes=processes)
    one, wanted = losses(other), losses(undisturbed)
    assert one.keys() == wanted.keys()
    found = np.array([one[step] - wanted[step] for step in wanted])
    assert (found[:cut] == 0).all() and np.abs(found).max() < 2e-4
  train_several(tmp_path / "run", *LONG)
  assert_same_end(undisturbed, tmp_path / "run")
  assert not [p for p in (tmp_path / "run").rglob(".*") if p.is_file()]


@pytest.mark.parametrize("victim", [1, 0])
def test_a_killed_process_takes_the_others_down_by_name(undisturbed, tmp_path, victim):
  processes = start_several(tmp_path / "run", *LONG)
  wait_for(tmp_path / "run", 25, processes)
  processes[victim].kill()
  since = time.monotonic()
  found = ended(processes)
  assert time.monotonic() - since < 60  # 30 s on a machine with nothing else to do
  assert found[victim][0] == -signal.SIGKILL
  status, _, stderr = found[1 - victim]
  assert status == 1
  last = stderr.strip().splitlines()[-1]
  assert re.match(
    rf"error: process {1 - victim} of 2 ends, since process {victim}[ ,].*"
    "start all processes again",
    last,
  )
  train_several(tmp_path / "run", *LONG)
  assert_same_end(undisturbed, tmp_path / "run")


def test_an_error_in_one_process_is_told_by_the_others(tmp_path):
  """Here the second one does not see the first one's workdir: nobody hangs."""
  last = [f"--workdir={tmp_path / 'other'}"]
  (one, _, told), (two, _, said) = ended(start_several(tmp_path / "run", last=last))
  assert two == 2 and one == 2
  last_line = said.strip().splitlines()[-1]
  assert re.match(
    r"error: .*/other: this process does not see what process 0", last_line
  )
  assert re.search("since process 1 has ended .UserError: .*does not see", told)


def test_processes_that_would_do_different_things_are_refused(tmp_path):
  """Guards wrong numbers without a word: another learning rate in one process."""
  wrong = ["--config.optim.lr=0.5"]
  for status, _, stderr in ended(start_several(tmp_path / "run", last=wrong)):
    assert status == 2
    told = stderr.strip().splitlines()[-1]
    assert re.search("process 1 has another config.optim than process 0", told), told
  assert not (tmp_path / "run/config.json").exists()


def test_all_processes_leave_a_damaged_checkpoint_alike(undisturbed, tmp_path):
  """Guards states of two steps in one run: all take the one before."""
  run = shutil.copytree(undisturbed, tmp_path / "run")
  for name in WHAT:
    shutil.rmtree(run / name)
  (run / "report.html").unlink()
  for path in (run / "checkpoints/60/state/ocdbt.process_0/d").iterdir():
    path.write_bytes(path.read_bytes()[:20])
  (one, two) = train_several(run, *LONG)
  assert "checkpoint of step 60 is damaged" in one[1] and "set aside" in one[1]
  assert "checkpoint of step 60 is damaged" in two[1]
  assert (run / "checkpoints/damaged-60").is_dir()
  assert_same_end(undisturbed, run)


@pytest.mark.parametrize(
  "mesh", [{"fsdp": 4}, {"tensor": 4}, {"data": 2, "tensor": 2}], ids=str
)
def test_any_axis_may_go_across_processes(mesh, tmp_path):
  """Two processes of two devices; against one process with one device."""
  changes = ["--config.train.dtype=float32"]
  flags = [f"--config.mesh.{axis}={size}" for axis, size in mesh.items()]
  train_several(tmp_path / "one", *changes, processes=1)
  texts = train_several(tmp_path / "run", *changes, *flags, devices=2)
  for kind, names in {"train": ["loss"], "eval": ["loss", "forward_kl"]}.items():
    for one, two in zip(
      rows(tmp_path / "one", kind), rows(tmp_path / "run", kind), strict=True
    ):
      for name in names:
        np.testing.assert_allclose(two[name], one[name], atol=2e-5, err_msg=name)
  # Process 0 speaks for all.
  assert "student, step 6" in texts[0][0] and "student" not in texts[1][0]
  assert "2 processes, 4 devices" in texts[0][1] and "loss" not in texts[1][1]
