"""One run on several devices is the run on one, as `benchmarks/meshes.py` finds."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def meshes(monkeypatch):
  monkeypatch.syspath_prepend(ROOT / "benchmarks")
  return importlib.import_module("meshes")


def test_differences_are_relative_to_an_array_and_name_the_first_other_text(meshes):
  one = {
    "loss": np.array([2.0, 1.0]),
    "text": np.array([[[5, 6]], [[7, 8]]]),
    "student/a": np.array([4.0, -8.0]),
    "student/zero": np.zeros(2),
  }
  found = meshes.difference(one, one)
  assert (found.loss, found.weights, found.text) == (0, 0, 0)
  other = one | {
    "loss": np.array([2.0, 0.5]),
    "text": np.array([[[5, 6]], [[7, 9]]]),
    "student/a": np.array([4.0, -6.0]),
  }
  found = meshes.difference(one, other)
  assert found == meshes.Difference(0.5, 0.25, "student/a", 2)
  with pytest.raises(ValueError, match="student/a"):
    meshes.difference(one, {k: v for k, v in one.items() if k != "student/a"})


@pytest.mark.slow
def test_methods_on_meshes_are_what_they_are_on_one_device(meshes, tmp_path):
  """Guards C2, D5, G3, with a vocabulary that the tensor axis does not divide."""
  names, places = ("clda", "minillm"), ("fsdp=4", "tensor=4")
  command = [sys.executable, ROOT / "benchmarks" / "meshes.py", "--steps=5"]
  command += [f"--names={','.join(names)}", f"--meshes={','.join(places)}"]
  env = os.environ | {"PYTHONPATH": str(ROOT)}
  subprocess.run([*command, f"--keep={tmp_path}"], env=env, check=True)
  for name in names:
    one, *others = (
      dict(np.load(tmp_path / "found" / place / f"{name}.npz"))
      for place in (meshes.ONE, *places)
    )
    for other in others:
      found = meshes.difference(one, other)
      assert found.loss < 1e-5 and found.weights < 1e-5, found
      assert not found.text
