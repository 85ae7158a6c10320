"""One run at a time in a workdir; who was killed does not stand in the way."""

import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from okd_jax.errors import UserError
from okd_jax.runtime import lock


@pytest.fixture(autouse=True)
def quick(monkeypatch):
  monkeypatch.setattr(lock, "_BEAT", 0.05)
  monkeypatch.setattr(lock, "_SILENT", 0.6)
  monkeypatch.setattr(lock, "_DYING", 0.5)
  monkeypatch.setattr(lock, "_SETTLED", 0.02)


def left(folder, **changes):
  """A workdir whose lock says something else than this process would."""
  said = lock._who() | {"since": "2026-01-01 00:00:00", "mark": "m", "beat": 3}
  folder.mkdir(exist_ok=True)
  (folder / ".lock").write_text(json.dumps(said | changes))
  return folder


def test_a_second_run_is_refused_and_told_of_the_first(tmp_path):
  with lock.held(tmp_path / "run") as check:
    check()
    words = (
      f"another run works in it .process {os.getpid()} on {socket.gethostname()}, s"
    )
    with pytest.raises(UserError, match=words):
      with lock.held(tmp_path / "run"):
        pass
    assert (tmp_path / "run/.lock").exists()
  assert not (tmp_path / "run").exists()  # there was nothing else in it
  with lock.held(tmp_path / "run"):
    (tmp_path / "run/metrics.jsonl").touch()
  assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]


def test_a_killed_run_of_this_machine_goes_on_at_once(tmp_path, caplog):
  """Whether its number is nobody's now or somebody else's."""
  caplog.set_level("INFO", logger="okd_jax")
  killed = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
  began = lock._began(killed.pid)
  assert began
  killed.kill()
  for there in (
    {"process": killed.pid, "began": began},  # not even waited for
    {"process": os.getppid(), "began": "1"},
    {"process": os.getpid()},
  ):
    with lock.held(left(tmp_path, **there)):
      pass
    assert "left by a run that was killed" in caplog.text
    caplog.clear()
  killed.wait()


def test_one_that_lives_here_is_refused_at_once(tmp_path):
  parent = {"process": os.getppid(), "began": lock._began(os.getppid())}
  with pytest.raises(UserError, match="another run works in it"):
    with lock.held(left(tmp_path, **parent)):
      pass


def test_on_another_machine_its_beat_tells(tmp_path, caplog):
  """No clock and no number of a process is compared."""
  folder, ended = left(tmp_path, machine="other", host="other"), threading.Event()

  def beats():
    beat = 10
    while not ended.wait(0.05):
      beat += 1
      left(folder, machine="other", host="other", beat=beat)

  thread = threading.Thread(target=beats)
  thread.start()
  try:
    with pytest.raises(UserError, match="on other, since 2026-01-01 00:00:00"):
      with lock.held(folder):
        pass
  finally:
    ended.set()
    thread.join()
  caplog.set_level("INFO", logger="okd_jax")
  with lock.held(folder):
    assert "a run of another machine" in caplog.text


@pytest.mark.parametrize("content", ["", "[]", "5", "{", "\x00"])
def test_a_damaged_lock_is_waited_for_like_a_strangers(content, tmp_path):
  (tmp_path / ".lock").write_text(content)
  with lock.held(tmp_path):
    assert json.loads((tmp_path / ".lock").read_text())["process"] == os.getpid()


def test_a_run_that_was_given_up_writes_nothing_more(tmp_path):
  """A machine that slept for an hour, and finds another run in its place."""
  with lock.held(tmp_path) as check:
    left(tmp_path, machine="other", host="other")
    until = time.monotonic() + 20
    with pytest.raises(UserError, match="has taken it over .process .* on other"):
      while time.monotonic() < until:
        check()
        time.sleep(0.02)
  assert json.loads((tmp_path / ".lock").read_text())["host"] == "other"


def test_a_place_that_cannot_be_written(tmp_path):
  (tmp_path / "file").touch()
  with pytest.raises(UserError, match="file/run: cannot be written"):
    with lock.held(tmp_path / "file/run"):
      pass
