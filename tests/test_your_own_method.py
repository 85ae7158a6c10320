"""docs/your_own_method.md is what it says: its files train, resume and export."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from commands import QUICK, environment, losses, rows
from trial import LogitTrial, make_batch, make_logits

from okd_jax import export, methods, models
from okd_jax.config.describe import describe
from okd_jax.methods import registry
from okd_jax.methods.base.divergences import DIVERGENCES

PAGE = Path(__file__).parents[1] / "docs" / "your_own_method.md"
METHOD, DIVERGENCE = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)[:2]


@pytest.fixture
def own(tmp_path, monkeypatch):
  """The page's two files, whose names are forgotten after the test."""
  monkeypatch.setattr(registry, "METHODS", methods.METHODS.copy())
  monkeypatch.setattr(methods, "METHODS", registry.METHODS)
  known = dict(DIVERGENCES)
  (tmp_path / "my_method.py").write_text(METHOD)
  (tmp_path / "my_divergence.py").write_text(DIVERGENCE)
  yield tmp_path
  DIVERGENCES.clear()
  DIVERGENCES.update(known)


def test_the_method_has_forty_lines_and_its_loss(own):
  assert METHOD.count("\n") <= 40
  methods.load_file(str(own / "my_method.py"))
  (student, _, teacher), batch = make_logits(), make_batch()
  found = LogitTrial("two_sided", two_sided=0.3)(student, None, teacher, batch)[0]
  there, back = (
    LogitTrial("kd", divergence=name)(student, None, teacher, batch)[0]
    for name in ("forward_kl", "reverse_kl")
  )
  np.testing.assert_allclose(found, 0.3 * there + 0.7 * back, rtol=1e-5)


def test_the_divergence_is_renyis(own):
  """At order 1/2 it is 4 times the Bhattacharyya distance, -log sum sqrt(p q)."""
  methods.load_file(str(own / "my_divergence.py"))
  (student, _, teacher), batch = make_logits(), make_batch()
  trial = LogitTrial("kd", divergence="renyi", renyi_order=0.5)
  p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (teacher, student))
  distance = -4 * np.log(np.sqrt(p * q).sum(-1))
  mask = np.asarray(batch.mask)
  want = (distance * mask).sum() / mask.sum()
  np.testing.assert_allclose(trial(student, None, teacher, batch)[0], want, rtol=1e-4)


def test_an_edited_file_is_read_again(own):
  """In a notebook it is edited while the process goes on."""
  file = own / "my_method.py"
  methods.load_file(str(file))
  file.write_text(METHOD.replace("two_sided: Knob = 0.5", "two_sided: Knob = 0.25"))
  methods.load_file(str(file))
  assert methods.defaults()["two_sided"] == 0.25


def test_help_lists_its_knobs(own):
  shown = describe(str(own / "my_method.py"))
  assert "--config.method.two_sided=0.5\n      it is read by two_sided" in shown


@pytest.mark.slow
def test_it_is_trained_killed_resumed_and_exported(own):
  """As a user does, from a folder of his own, with a knob that moves."""

  def command(workdir):
    flags = ["--config=debug", f"--workdir={workdir}", *QUICK]
    flags += ["--config.method.file=my_method.py", "--config.method.name=two_sided"]
    flags += ["--config.method.end.two_sided=0.9"]
    return [sys.executable, "-m", "okd_jax.main", *flags]

  options = {"cwd": own, "env": environment(), "stderr": subprocess.PIPE, "text": True}
  subprocess.run(command("whole"), check=True, timeout=300, **options)
  process = subprocess.Popen(command("cut"), stdout=subprocess.DEVNULL, **options)
  deadline = time.monotonic() + 200
  while not (own / "cut" / "checkpoints" / "2").exists():
    assert process.poll() is None and time.monotonic() < deadline
    time.sleep(0.01)
  process.kill()
  process.communicate()
  done = subprocess.run(command("cut"), check=True, timeout=300, **options)
  assert "resuming at step" in done.stderr
  assert losses(own / "cut") == losses(own / "whole")
  moved = [row["method.two_sided"] for row in rows(own / "whole", "train")]
  np.testing.assert_allclose(moved, np.linspace(0.5, 0.9, 6), rtol=1e-5)
  assert "divergence" in rows(own / "whole", "train")[0]
  export.main([f"--workdir={own / 'cut'}", f"--output={own / 'out'}", "--step=6"])
  one, two = (models.load(own / p).params for p in ("cut/student", "out"))
  assert np.array_equal(one["embed"]["embedding"], two["embed"]["embedding"])
  assert (own / "cut" / "report.html").exists()
  saved = json.loads((own / "cut" / "config.json").read_text())
  assert saved["method"]["two_sided"] == 0.5
