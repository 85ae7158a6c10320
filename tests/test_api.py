"""`okd_jax.distill`: what a notebook calls, on paths, loaded models and rows."""

import datetime
import json
import os
import re
import signal
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import QUICK

import okd_jax
from okd_jax import main, models
from okd_jax.config import read
from okd_jax.data import load_records, make_tokenizer
from okd_jax.data.sources import read_rows
from okd_jax.errors import UserError
from okd_jax.run import api, given
from okd_jax.run.job import check

README = Path(__file__).parents[1] / "README.md"
FLAGS = dict(flag.removeprefix("--config.").split("=") for flag in QUICK)
FAST = {
  key: value if key == "data.overlong_prompt" else int(value)
  for key, value in FLAGS.items()
}
FAST |= {"train.steps": 3, "eval.every": 0, "train.batch_size": 8, "data.holdout": 4}
ROWS = [{"instruction": f"Say {i}", "output": f"It is {i}."} for i in range(16)]


@pytest.fixture(scope="module")
def pair():
  """A teacher and a student, as they are loaded."""
  tokenizer = make_tokenizer("bytes", load_records("embedded:eval"))

  def model(layers):
    config = models.preset(
      "llama",
      vocab_size=len(tokenizer),
      hidden_size=16,
      num_layers=layers,
      num_heads=2,
      eos_ids=(tokenizer.eos_token_id,),
    )
    return models.Model(config, models.init(config, jax.random.key(layers)), tokenizer)

  return model(3), model(1)


@pytest.fixture(scope="module")
def result(pair, tmp_path_factory):
  teacher, student = pair
  workdir = tmp_path_factory.mktemp("api") / "run"
  return okd_jax.distill(
    teacher=teacher, student=student, data=ROWS, workdir=workdir, **FAST
  )


def test_what_comes_back(result, pair):
  """The student as a model that has learned, the figures, and an ordinary workdir."""
  _, before = pair
  tokens = jnp.array([before.tokenizer.encode("Say 3")])
  logits = result.student.logits(result.student.params, tokens)
  assert logits.shape == (1, tokens.shape[1], before.config.vocab_size)
  first = before.logits(before.params, tokens)
  assert np.abs(np.asarray(logits - first)).max() > 1e-4
  assert list(result.figures)[-1] == "student, step 3"
  assert result.figures["student, step 3"]["loss"] > 0
  assert result.report.exists() and (result.adapter / "adapter_config.json").exists()
  assert "student, step 3" in str(result)


def test_called_again_it_is_finished_and_with_other_rows_refused(result, pair, caplog):
  teacher, student = pair
  caplog.set_level("INFO", "okd_jax")
  again = {"teacher": teacher, "student": student, "workdir": result.workdir}
  same = okd_jax.distill(data=ROWS, **again, **FAST)
  assert same.figures == result.figures and "is finished already" in caplog.text
  with pytest.raises(UserError, match="a run with other train data"):
    okd_jax.distill(data=ROWS[1:], **again, **FAST)
  with pytest.raises(UserError, match="another teacher than the model"):
    okd_jax.distill(data=ROWS, **again | {"teacher": student}, **FAST)
  saved = json.loads((result.workdir / "config.json").read_text())
  assert saved["train"]["steps"] == 3


def test_the_command_goes_on_with_what_python_began(result, capsys):
  """All that came as objects lies in the workdir: it is a run like any other."""
  given = result.workdir / "given"
  keys = FAST | {
    "teacher.path": given / "teacher",
    "student.path": given / "student",
    "data.train": given / "train.jsonl",
  }
  flags = [f"--config.{key}={value}" for key, value in keys.items()]
  main.main(["--config=default", f"--workdir={result.workdir}", *flags])
  assert "student, step 3" in capsys.readouterr().out


@pytest.mark.slow
def test_in_a_thread_and_on_paths_and_a_dataset(result, tmp_path):
  """Signals belong to the command: a thread could not set their handlers."""
  datasets = pytest.importorskip("datasets")
  before, found = signal.getsignal(signal.SIGTERM), []

  def work():
    found.append(
      okd_jax.distill(
        teacher=str(result.workdir / "given" / "teacher"),
        student={"hidden_size": 16, "num_layers": 1, "num_heads": 2},
        data=datasets.Dataset.from_list(ROWS),
        eval_data=ROWS[:4],
        method="kd",
        workdir=tmp_path / "run",
        **FAST,
      )
    )

  thread = threading.Thread(target=work)
  thread.start()
  thread.join(300)
  assert found and found[0].figures["student, step 3"]["loss"] > 0
  assert found[0].adapter is None
  assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.slow
def test_several_teachers_by_name(pair, tmp_path):
  teacher, student = pair
  result = okd_jax.distill(
    teacher={"big": teacher, "small": student},
    student=student,
    data=ROWS,
    method="ensemble",
    workdir=tmp_path / "run",
    **FAST,
  )
  assert {"teacher big", "teacher small"} <= set(result.figures)


def test_mistakes_are_user_errors(pair, tmp_path):
  teacher, student = pair
  ask = {"teacher": teacher, "student": student, "workdir": tmp_path / "run"}
  with pytest.raises(UserError, match="did you mean --config.optim.lr"):
    okd_jax.distill(data=ROWS, **ask, **{"train.lr": 1.0})
  with pytest.raises(UserError, match="row 2 of the train data is no record"):
    okd_jax.distill(data=[ROWS[0], {"text": object()}], **ask)
  bare = models.Model(teacher.config, None, teacher.tokenizer)
  with pytest.raises(UserError, match="loaded without its parameters"):
    okd_jax.distill(data=ROWS, **ask | {"teacher": bare})


def test_rows_are_written_one_by_one(tmp_path):
  import datasets

  def rows(count):
    for i in range(count):
      yield {"text": f"{i} é\u2028", "n": np.int64(i), "v": np.arange(2), "x": np.nan}

  def keep(data, name="train"):
    return given.data_sources(data, tmp_path, "given", name)

  path = Path(keep(rows(3)))
  assert path == tmp_path / "given" / "train.jsonl" and os.listdir(path.parent) == [
    "train.jsonl"
  ]
  assert [row for row, _ in read_rows(str(path))][2] == {
    "text": "2 é\u2028",
    "n": 2,
    "v": [0, 1],
    "x": None,
  }
  keep(rows(4))  # of a call that never became a run
  (tmp_path / "config.json").write_text("{}")
  assert keep(rows(4)) == str(path)
  for other in (rows(3), rows(5), [{"text": "a"}] * 4):
    with pytest.raises(UserError, match="a run with other train data"):
      keep(other)
  assert len(load_records(str(path))) == 4
  streamed = datasets.IterableDataset.from_generator(lambda: iter(ROWS))
  assert len(load_records(keep(streamed, "eval"))) == len(ROWS)
  keep(datasets.Dataset.from_list(ROWS).with_format("numpy"), "eval")


@pytest.mark.parametrize(
  "row, words",
  [
    ("text", "row 2 of the train data has paths|is a string, not a dict"),
    ({"text": b"a"}, "row 2 of the train data is no record: 'text' is bytes; decode"),
    ({"a": [{"b": object()}]}, r"row 2 .*'a\[0\].b' is a object; turn it into text"),
    ({3: "a"}, "row 2 of the train data is no record: its key 3 is no text"),
    ({"a": {1, 2}}, "'a' is a set"),
    ({"text": "a\ud800"}, "row 2 of the train data is no record"),
  ],
)
def test_rows_that_are_no_json(row, words, tmp_path):
  with pytest.raises(UserError, match=words):
    given.data_sources([{"text": "a"}, row], tmp_path, "given", "train")
  assert not (tmp_path / "given").exists() or not os.listdir(tmp_path / "given")


def test_sources_from_python(tmp_path):
  def sources(data):
    return given.data_sources(data, tmp_path, "given", "train")

  assert sources("a,b") == "a,b" and sources(Path("a")) == "a"
  assert sources(["a", Path("b")]) == "a,b"  # as a command says it
  assert sources(Path("a,b")) == ["a,b"] and sources(["a,b", "c"]) == ["a,b", "c"]
  for wrong, words in [([], "no rows"), (["a", {}], "has paths and an object")]:
    with pytest.raises(UserError, match=words):
      sources(wrong)
  with pytest.raises(UserError, match="the train data is a number"):
    sources(3)
  day = datetime.datetime(2024, 5, 6)
  path = sources([{"text": "a", "day": day, "date": np.datetime64("2024-05-06")}])
  [(row, _)] = read_rows(path)
  assert (row["day"], row["date"]) == ("2024-05-06T00:00:00", "2024-05-06")


class Frame(list):
  """As a DataFrame, in what tells one."""

  columns = ("instruction", "output")


def test_what_a_call_that_failed_left_is_no_run(pair, tmp_path):
  teacher, student = pair
  ask = {"teacher": teacher, "student": student, "workdir": tmp_path / "run"}
  with pytest.raises(UserError):
    okd_jax.distill(data=[{"foo": 1}], **ask)
  with pytest.raises(UserError, match="train.steps=None: it needs a value"):
    okd_jax.distill(data=ROWS, **ask | {"teacher": student}, **{"train.steps": None})
  with pytest.raises(UserError, match="give its rows"):
    okd_jax.distill(data=Frame(ROWS), **ask)
  with pytest.raises(UserError, match="a teacher's name is a word"):
    okd_jax.distill(data=ROWS, **ask | {"teacher": {"../x": teacher}})
  assert not (tmp_path / "run" / "config.json").exists()


def test_arguments_replace_what_the_recipe_says(pair, tmp_path):
  """configs/debug.py has a random teacher and student; rkd_gold its own method."""
  teacher, _ = pair
  place = tmp_path / "run"
  changes = api._teachers(teacher, place) | api._student(np.int64(2), place)
  config = read.from_keys(changes, "debug")
  assert config.student.layers == 2 and not config.student.model.hidden_size
  assert config.teacher.path and not config.teacher.model.hidden_size
  check(config)


@pytest.mark.slow
def test_the_readmes_five_lines(result, tmp_path, monkeypatch):
  [block] = re.findall(r"```python\n(import okd_jax\n.*?)```", README.read_text(), re.S)
  assert len(block.strip().splitlines()) <= 5
  monkeypatch.chdir(tmp_path)
  given = result.workdir / "given"
  names = {"gpt2-large": "teacher", "gpt2": "student"}
  for name, folder in names.items():
    block = block.replace(f'"{name}"', repr(str(given / folder)))
  block = block.replace('"my.jsonl"', repr(str(given / "train.jsonl")))
  block = block.replace('"train.steps": 100', f'**{FAST}, "train.steps": 2')
  scope: dict = {}
  exec(block, scope)
  assert scope["result"].figures["student, step 2"]["loss"] > 0
