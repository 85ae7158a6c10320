"""What a run is of and what it costs: commit, command line, seconds, memory."""

import json
import shlex
import shutil
import subprocess
import sys
import types

import pytest

from okd_jax.runtime import machine
from okd_jax.runtime.workdir import Workdir


def test_the_command_line_as_a_shell_takes_it(monkeypatch):
  words = ["python", "-m", "okd_jax.main", "--config.data.train=a b.jsonl"]
  monkeypatch.setattr(sys, "orig_argv", words)
  assert shlex.split(machine.command()) == words


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_the_commit_of_a_checkout(tmp_path, monkeypatch):
  (tmp_path / "okd_jax" / "runtime").mkdir(parents=True)
  file = tmp_path / "okd_jax" / "runtime" / "machine.py"
  file.write_text("")
  monkeypatch.setattr(machine, "__file__", str(file))

  def git(*words):
    named = ["-c", "user.name=a", "-c", "user.email=a@b"]
    done = ["git", "-C", str(tmp_path), *named, *words]
    return subprocess.run(done, check=True, capture_output=True, text=True).stdout

  git("init", "--quiet")
  assert machine.commit() == ""  # none yet
  git("add", "-A")
  git("commit", "--quiet", "-m", "one")
  git("tag", "-a", "v1", "-m", "one")
  [head] = git("rev-parse", "HEAD").split()
  assert machine.commit() == head
  file.write_text("x = 1")
  assert machine.commit() == f"{head}-dirty"


def test_the_commit_that_pip_installed(tmp_path, monkeypatch):
  monkeypatch.setattr(machine, "__file__", str(tmp_path / "a" / "b" / "machine.py"))
  said = []
  installed = types.SimpleNamespace(
    read_text=lambda name: {"direct_url.json": said[-1]}[name]
  )
  monkeypatch.setattr(machine.importlib.metadata, "distribution", lambda _: installed)
  vcs = {"vcs_info": {"vcs": "git", "commit_id": "abc"}}
  for found, commit in ((None, ""), ({"url": "file:///x"}, ""), (vcs, "abc")):
    said.append(found and json.dumps(found))
    assert machine.commit() == commit


def test_the_parts_of_a_run_add_up(tmp_path):
  own = Workdir(tmp_path)
  own.write_json(own.cost, {"seconds": 100.0, "peak_bytes": 2**60, "of": "process"})
  with machine.counted(own):
    pass
  found = json.loads(own.cost.read_text())
  assert 100 <= found["seconds"] < 200 and found["peak_bytes"] == 2**60


@pytest.mark.parametrize(
  "content", [b"", b"[]", b"5", b"\xff", b'{"of": "process"}', b'{"seconds": "x"}']
)
def test_a_damaged_file_is_told_and_begun_anew(content, tmp_path, caplog):
  own = Workdir(tmp_path)
  own.cost.write_bytes(content)
  with machine.counted(own):
    pass
  assert json.loads(own.cost.read_text())["seconds"] < 100
  assert "cost.json is damaged: what the run has cost is counted anew" in caplog.text
