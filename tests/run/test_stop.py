"""When a run stops, alone and with others."""

import os
import signal

import jax
import pytest

from okd_jax.run import stop
from okd_jax.runtime import agreement


def test_alone_a_signal_counts_at_once():
  with stop.Terminated() as asked:
    agreed = stop.Agreement(asked)
    assert not agreed.ask()
    asked.check()
    os.kill(os.getpid(), signal.SIGTERM)
    assert agreed.ask()
    with pytest.raises(stop.Stopped):
      asked.check()


def test_with_others_the_answer_is_one_step_old(monkeypatch):
  """All processes get it at the same step, whoever was asked to stop."""
  asked = stop.Stop()
  agreed = stop.Agreement(asked)
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(stop.Stop, "__bool__", lambda self: self is asked and wanted)
  wanted = False
  assert not agreed.ask()
  wanted = True
  assert not agreed.ask()
  wanted = False
  assert agreed.ask()
  assert not agreed.ask()
  asked.check()
  wanted = True
  with pytest.raises(stop.Stopped):
    asked.check()


def test_any_device_of_any_process_is_heard():
  assert bool(agreement.flag(True)) and not bool(agreement.flag(False))
