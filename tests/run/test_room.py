"""A workdir is tried before anything is loaded."""

import collections
import shutil

import pytest
from small import config

from okd_jax.config.schema import settings
from okd_jax.errors import UserError
from okd_jax.models import ModelConfig
from okd_jax.run import distill, room
from okd_jax.runtime.workdir import Workdir

STUDENT = ModelConfig(vocab_size=100, hidden_size=100, num_layers=1, num_heads=2)


def test_a_workdir_is_written(tmp_path):
  room.try_out(Workdir(tmp_path / "run"))
  assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize("name", ["checkpoints", "student"])
def test_a_file_in_the_way_is_found_at_once(name, tmp_path):
  (tmp_path / name).write_text("notes")
  with pytest.raises(UserError, match=f"{name} is a file, where a folder belongs"):
    distill.run(config(), tmp_path)
  assert (tmp_path / name).read_text() == "notes"


def test_a_workdir_that_is_a_file(tmp_path):
  (tmp_path / "run").touch()
  with pytest.raises(UserError, match="run: cannot be written"):
    distill.run(config(), tmp_path / "run")


@pytest.mark.parametrize(
  "changes, times",
  [
    ({}, 4 * 4),  # the student on disk; itself, and Adam's two moments
    ({"optim.dtype": "bfloat16"}, 4 + 4 + 2 + 2),
    ({"export.dtype": "bfloat16"}, 2 + 3 * 4),
    ({"student.adapter.kind": "lora"}, 4),
  ],
)
def test_free_space_is_held_against_what_is_written(
  changes, times, tmp_path, monkeypatch
):
  own, usage = settings(config(**changes)), collections.namedtuple("usage", "free")
  count = 2 * 100 * 100 if not STUDENT.tie_embeddings else 100 * 100
  export, saved = room._sizes(own, STUDENT)
  assert export + saved > times * count
  for free in (export + saved - 1, export + saved):
    monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage(free))
    if free < export + saved:
      with pytest.raises(UserError, match="MB are free there, but a checkpoint and"):
        room.check(own, STUDENT, Workdir(tmp_path / "a/b"))
    else:
      room.check(own, STUDENT, Workdir(tmp_path / "a/b"))
