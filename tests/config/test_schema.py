"""Settings that say more than one value: what they mean, and what is refused."""

import json

import pytest

from okd_jax.config import read
from okd_jax.config.players import StudentSettings
from okd_jax.errors import UserError
from okd_jax.run.job import check


@pytest.mark.parametrize(
  "fields, layers",
  [
    ({"layers": 3}, [0, 4, 7]),
    ({"layers": 3, "which_layers": "top"}, [5, 6, 7]),
    ({"layers": 3, "which_layers": "bottom"}, [0, 1, 2]),
    ({"which_layers": "0, 3,7"}, [0, 3, 7]),
    ({"layers": 2, "which_layers": "1,2"}, [1, 2]),
    ({"layers": 8}, list(range(8))),
  ],
)
def test_the_layers_that_a_student_starts_from(fields, layers):
  student = StudentSettings(**fields)
  assert student.from_teacher and not list(student.problems())
  assert student.taken(8) == layers


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"layers": 9}, "student.layers=9, but the teacher has 8 layers"),
    (
      {"which_layers": "0,8"},
      "student.which_layers=0,8: the teacher's layers are 0 to",
    ),
  ],
)
def test_layers_that_a_teacher_lacks(fields, message):
  with pytest.raises(UserError, match=message):
    StudentSettings(**fields).taken(8)


@pytest.mark.parametrize(
  "flag, message",
  [
    ("student.which_layers=every", "must be even, top, bottom or numbers of layers"),
    ("student.which_layers=0,-1", "must be even, top, bottom or numbers of layers"),
    ("student.which_layers=3,1", "must be ascending numbers, each once"),
    ("student.which_layers=1,1", "must be ascending numbers, each once"),
    ("student.which_layers=0,1", r"student.layers=1 0 or how many they are"),
    ("teacher.dtype=int4", "teacher.dtype='int4' must be one of .*, int8"),
  ],
)
def test_values_that_no_run_could_use(flag, message):
  layers = ["--config.student.layers=1", "--config.student.model.hidden_size=0"]
  with pytest.raises(UserError, match=message):
    check(read.read(["--config=debug", *layers, f"--config.{flag}"]))


def test_int8_is_for_teachers_that_stay():
  flags = ["--config.teacher.dtype=int8", "--config.method.name=clda"]
  with pytest.raises(UserError, match="teacher.dtype=int8: blocks of the teacher"):
    check(read.read(["--config=debug", *flags]))


@pytest.mark.parametrize(
  "flag, message",
  [
    (f"train.seed={2**64}", "train.seed=1.* must be a whole number from 0 to 4,294"),
    ("data.holdout_seed=4294967296", "must be a whole number from 0 to 4,294,967,295"),
    ("train.steps=99999999999", "whole number of at most 2,147,483,647"),
    ("train.batch_size=99999999999", "whole number of at most 16,777,216"),
    ("train.epochs=inf", "train.epochs=inf must be a number from"),
    (
      "method.temperature=1e-30",
      "temperature=1e-30 must be a number from 0.001",
    ),
    ("method.end.temperature=1e-30", "end.temperature=1e-30 must be a number from"),
    ("method.temperature=nan", "method.temperature=nan must be a number from 0.001"),
    ("eval.temperature=1e-30", "eval.temperature=1e-30 must be a number from 0.001"),
    ("method.gold_weight=inf", "method.gold_weight=inf must be a number"),
    ("optim.lr=inf", "optim.lr=inf must be a number"),
    ("optim.b1=1", "optim.b1=1.0 must be a number from 0 to"),
    ("optim.eps=0", "optim.eps=0.0 must be a number from 1e-30"),
    ("adapter.rank=99999999999", "adapter.rank=9.* must be a whole number of at most"),
    ("mesh.fsdp=-7", "mesh.fsdp=-7 must be a whole number from -1"),
    (
      "data.num_proc=99999",
      "data.num_proc=99999 must be a whole number from 0 to 1,0",
    ),
    ("method.file=~nosuchuser", "~nosuchuser: there is no such user; write ./~nosuchu"),
    ("method.file=a\0b", "'a.x00b' cannot be a path: it holds a NUL byte"),
  ],
)
def test_numbers_and_names_that_no_run_could_use(flag, message):
  with pytest.raises(UserError, match=message):
    check(read.read(["--config=debug", f"--config.{flag}"]))


@pytest.mark.parametrize("place", ["own.py", "run/own.py"])
def test_no_method_file_of_a_workdir_is_run(tmp_path, place):
  """Guards I: a workdir may be somebody else's."""
  (workdir := tmp_path / "run").mkdir()
  (tmp_path / place).write_text("raise SystemExit('it ran')")
  config = read.defaults().to_dict()
  config["method"]["file"] = str(tmp_path / place) if "/" in place else place
  (workdir / "config.json").write_text(json.dumps(config))
  with pytest.raises(UserError, match="lies in the workdir, from which no program is"):
    read.saved(workdir / "config.json")
