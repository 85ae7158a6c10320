"""When a run stops, alone and with others, and that it hears of it everywhere."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import jax
import pytest
import small
from commands import ROOT, environment

from okd_jax.errors import UserError
from okd_jax.run import distill, stop
from okd_jax.runtime import agreement, cli


@contextmanager
def nothing_changes():
  before = [signal.getsignal(number) for number in stop.SIGNALS]
  threads = threading.active_count()
  yield
  assert [signal.getsignal(number) for number in stop.SIGNALS] == before
  assert threading.active_count() == threads


@pytest.mark.parametrize(
  "number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=str
)
def test_alone_a_signal_counts_at_once(number, status, capsys):
  """And is told in one line, with the status that shells know it by."""
  with nothing_changes(), pytest.raises(SystemExit) as left, stop.Signalled() as asked:
    agreed = stop.Agreement(asked)
    assert not agreed.ask()
    asked.check()
    # As `timeout` does it: the process, then its group.
    os.kill(os.getpid(), number)
    os.kill(os.getpid(), number)
    assert agreed.ask() == number
    asked.check()
  assert left.value.code == status
  name = signal.Signals(number).name
  assert capsys.readouterr().err == (
    f"stopped by {name}; the same command goes on from here\n"
  )


def test_whoever_asks_nothing_is_not_stopped():
  with nothing_changes(), stop.Signalled() as asked:
    assert list(asked.heard("abc")) == ["a", "b", "c"]
  with nothing_changes(), pytest.raises(UserError), stop.Signalled():
    raise UserError("something else")


def test_between_two_items_it_is_heard():
  asked, seen = stop.Stop(), []
  with pytest.raises(stop.Stopped):
    for item in asked.heard(range(5)):
      seen.append(item)
      asked.number = int(signal.SIGINT) if item == 1 else 0
  assert seen == [0, 1]


_HANGS = """
import os, signal, sys, time
from okd_jax.run.stop import Signalled
with Signalled() as stop:
  print("ready", flush=True)
  sum(x for x in iter(lambda: stop.number + 1, 0))  # never looks at its own number
"""


@pytest.mark.slow
@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM], ids=str)
def test_a_second_signal_ends_at_once(second):
  """Whatever the main thread does, such as compile for minutes."""
  process = subprocess.Popen(
    [sys.executable, "-c", _HANGS],
    cwd=ROOT,
    env=environment(),
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  assert process.stdout.readline() == "ready\n"
  process.send_signal(signal.SIGTERM)
  time.sleep(1.5)
  assert process.poll() is None
  process.send_signal(second)
  assert process.wait(timeout=20) == 128 + second
  assert process.communicate()[1] == ""


def test_with_others_the_answer_is_one_step_old(monkeypatch):
  """All processes get it at the same step, whoever was asked to stop."""
  asked = stop.Stop()
  agreed = stop.Agreement(asked)
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  assert not agreed.ask()
  asked.number = int(signal.SIGTERM)
  assert not agreed.ask()
  asked.number = 0
  assert agreed.ask() == signal.SIGTERM
  assert not agreed.ask()
  asked.check()
  asked.number = int(signal.SIGTERM)
  with pytest.raises(stop.Stopped):
    asked.check()


def test_any_device_of_any_process_is_heard():
  assert int(agreement.largest(15)) == 15 and int(agreement.largest(0)) == 0


def test_a_command_that_has_nothing_to_save_says_one_line(capsys, monkeypatch):
  def interrupted(_):
    raise KeyboardInterrupt

  with pytest.raises(SystemExit) as left:
    cli.run(interrupted)
  assert left.value.code == 130 and capsys.readouterr().err == "interrupted\n"


class At(stop.Stop):
  """Comes true when it is asked for the n-th time; counts how often it was."""

  def __init__(self, n=0):
    self.n, self.asked = n, 0

  @property
  def number(self):
    self.asked += 1
    return int(signal.SIGTERM) if self.asked == self.n else 0


@pytest.mark.slow
def test_a_run_stopped_anywhere_goes_on_to_the_same_figures(tmp_path):
  """Blocks chosen, answers beforehand, evaluations, steps: between any two batches."""
  changes = {"train.steps": 2, "checkpoint.every": 10, "eval.batch_size": 8}
  changes |= {"method.name": "seqkd", "adapter.kind": "blocks", "eval.limit": 16}
  changes |= {"eval.generate_limit": 8, "eval.max_new_tokens": 2}
  changes |= {"method.max_new_tokens": 2, "method.seqkd_ratio": 0.5}
  count = At()
  [whole] = distill.run(small.config(**changes), tmp_path / "whole", stop=count)
  stops, n = 0, 0
  while True:
    n += 1 + n // 3  # more and more of the run lies between two stops
    try:
      [cut] = distill.run(small.config(**changes), tmp_path / "cut", stop=At(n))
    except stop.Stopped:
      stops += 1
      continue
    break
  assert stops > 5 and count.asked > 20
  assert cut.figures == whole.figures
