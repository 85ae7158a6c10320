"""Where a run comes from: commit and command line."""

import json
import shlex
import shutil
import subprocess
import sys
import types

import pytest

from okd_jax.runtime import machine


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
