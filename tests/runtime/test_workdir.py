"""A run's folder: whole or not at all, made from what it says, by process 0 alone."""

import json
import re

import jax
import pytest

from configs import debug
from okd_jax import evaluate, export
from okd_jax.errors import UserError
from okd_jax.run import distill
from okd_jax.runtime import files, workdir
from okd_jax.runtime.workdir import Workdir

ABOUT = {"seed": 0, "model": "a", "ends": (1, 2)}


def names(folder):
  return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def second(monkeypatch):
  """As if this were the second of two processes."""
  monkeypatch.setattr(jax, "process_index", lambda: 1)


# Names and writing


def test_names(tmp_path):
  stage = Workdir(tmp_path).stage("warm")
  assert stage == Workdir(tmp_path / "stages" / "warm")
  assert stage.samples("teacher") == stage.path / "samples" / "teacher.jsonl"
  assert stage.module("adapter") == stage.path / "adapter"


def test_a_name_is_in_the_folder_and_a_path_is_taken_as_it_is(tmp_path, monkeypatch):
  """Also where both are relative."""
  monkeypatch.chdir(tmp_path)
  own = Workdir(tmp_path.relative_to(tmp_path) / "run")
  own.write_text(own.report, "é")
  own.write_json("config.json", {"b": 1, "a": None})
  assert names(tmp_path / "run") == ["config.json", "report.html"]
  assert (tmp_path / "run" / "report.html").read_bytes() == "é".encode()
  assert json.loads(own.config.read_text()) == {"b": 1, "a": None}


def test_what_cannot_be_written_leaves_the_old_one(tmp_path):
  own = Workdir(tmp_path)
  own.write_json(own.config, {"a": 1})
  with pytest.raises(TypeError):
    own.write_json(own.config, {"a": object()})
  assert own.config.read_text() == '{\n  "a": 1\n}\n' and names(tmp_path) == [
    "config.json"
  ]


def test_a_folder_is_kept_whole_or_not_at_all_and_once(tmp_path):
  own = Workdir(tmp_path / "run")

  def dies(folder):
    (folder / "vocab").write_text("half of")
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    own.keep_folder("tokenizer", dies)
  assert not own.tokenizer.exists()
  own.keep_folder("tokenizer", lambda folder: (folder / "merges").write_text("all"))
  assert names(own.tokenizer) == ["merges"] and names(own.path) == ["tokenizer"]
  own.keep_folder(own.tokenizer, dies)
  assert names(own.tokenizer) == ["merges"]


def test_other_processes_write_nothing(tmp_path, second):
  own = Workdir(tmp_path)
  own.write_text("report.html", "")
  own.write_json(own.config, {})
  own.keep_folder("tokenizer", lambda folder: 1 / 0)
  with pytest.raises(UserError, match="nothing says how it was made"):
    workdir.claim(tmp_path / "o.jsonl", ABOUT)  # which process 0 has not written
  assert names(tmp_path) == []


# What was made from what


@pytest.mark.parametrize("kind", ["file", "part", "folder"])
def test_a_claim_holds_while_there_is_something(tmp_path, kind):
  """Then every difference is named; before, its sidecar is of nothing."""
  path = tmp_path / "o.jsonl"
  if kind == "folder":
    path.mkdir()
  content = {"folder": path / "0", "part": workdir.part(path, 1, 3)}.get(kind, path)
  workdir.claim(path, {"seed": 7})
  workdir.claim(path, ABOUT)
  content.write_text("")
  workdir.claim(path, ABOUT)
  inside = kind == "folder"
  sidecar = path / "made_from.json" if inside else tmp_path / "o.jsonl.made_from.json"
  assert json.loads(sidecar.read_text()) == {"seed": 0, "model": "a", "ends": [1, 2]}
  assert workdir.made_from(path) == json.loads(sidecar.read_text())
  with pytest.raises(UserError) as caught:
    workdir.claim(path, {"seed": 1, "model": "a", "k": 3}, "workdir")
  for words in (
    str(path if inside else content),
    "seed=0 there, 1 here; ",
    "ends=[1, 2] there, None here",
    "k=None there, 3 here",
    "delete it to have it made anew, or name another workdir",
  ):
    assert words in str(caught.value)
  assert "model" not in str(caught.value) and workdir.made_from(path)["seed"] == 0


@pytest.mark.parametrize("sidecar", [None, "{", "[]"])
def test_what_nobody_knows_is_refused(tmp_path, sidecar):
  path = tmp_path / "o.jsonl"
  path.write_text("years of work")
  if sidecar is not None:
    (tmp_path / "o.jsonl.made_from.json").write_text(sidecar)
  before = names(tmp_path)
  with pytest.raises(UserError, match="o.jsonl: nothing says how .*; name another"):
    workdir.claim(path, ABOUT)
  assert names(tmp_path) == before and path.read_text() == "years of work"


def test_what_a_killed_writer_left_is_nothing(tmp_path):
  (tmp_path / ".made_from.json.tmp").write_text("{")
  workdir.claim(tmp_path, ABOUT)
  assert workdir.made_from(tmp_path)["model"] == "a"


def test_a_reader_may_leave_things_open(tmp_path):
  workdir.claim(tmp_path, ABOUT)
  workdir.check_made_from(tmp_path, {"ends": (1, 2)})
  with pytest.raises(UserError, match="model='a' there, 'b' here"):
    workdir.check_made_from(tmp_path, {"ends": (1, 2), "model": "b"})


# Lines


@pytest.mark.parametrize(
  "content, count, left",
  [
    (None, 0, None),
    (b"", 0, b""),
    (b"a\n\nb\n", 3, b"a\n\nb\n"),
    (b"a\n\xc3", 1, b"a\n"),
    (b"a", 0, b""),
  ],
)
def test_whole_lines(tmp_path, content, count, left):
  path = tmp_path / "o.jsonl.partial"
  if content is not None:
    path.write_bytes(content)
  assert workdir.whole_lines(path) == count
  assert (path.read_bytes() if path.exists() else None) == left


def test_parts_are_those_of_the_file(tmp_path):
  path = tmp_path / "o[1].jsonl"
  own = [workdir.part(path), workdir.part(path, 0, 2), workdir.part(path, 1, 2)]
  for each in [*own, workdir.part(tmp_path / "o1.jsonl"), path]:
    each.write_text("")
  assert workdir.parts(path) == sorted(own) and len({*own}) == 3


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
  """Of whatever is read or written."""
  monkeypatch.setenv("HOME", str(tmp_path))
  assert files.local("~/x") == tmp_path / "x"
  files.write_text("~/deep/a.txt", "a")
  assert (tmp_path / "deep" / "a.txt").read_text() == "a"
  files.write_json("~/a.json", {"a": 1})
  assert files.read_json("~/a.json") == {"a": 1}
  with files.replacing("~/folder", re.compile("a")) as partial:
    (partial / "a").touch()
  assert (tmp_path / "folder" / "a").exists()


@pytest.mark.slow
def test_commands_write_where_a_tilde_says(tmp_path, monkeypatch):
  """A finished run, by a command that is told of it and of outputs by a tilde."""
  monkeypatch.setenv("HOME", str(tmp_path))
  config = debug.get_config()
  config.train.steps, config.eval.generate_limit = 1, 1
  config.data.train, config.data.holdout = "embedded:eval", 4
  distill.run(config, files.local("~/run"))
  monkeypatch.chdir(tmp_path)
  export.main(["--workdir=~/run", "--output=~/out", "--adapter=~/adapter"])
  given = ["--model=~/run", "--data=~/rows.jsonl", "--output=~/scores.json"]
  (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
  evaluate.main([*given, "--predictions=~/said.jsonl"])
  found = {path.name for path in tmp_path.iterdir()}
  assert found >= {"run", "out", "adapter", "adapter_base", "scores.json", "said.jsonl"}
  assert not (tmp_path / "~").exists()
