"""Which runs a workdir takes for its own, and how one grows."""

import datetime
import json

import jax
import numpy as np
import pytest
from commands import call, losses, rows, train
from small import config

from okd_jax import export, models
from okd_jax.config import read
from okd_jax.config.schema import settings
from okd_jax.config.stages import stages
from okd_jax.data import day, make_tokenizer
from okd_jax.errors import UserError
from okd_jax.run import about, checkpoint, distill, seal
from okd_jax.run.build import build
from okd_jax.run.identity import (
  check_models,
  check_versions,
  growth,
  kept,
  kept_day,
  models_of,
  of,
  tell_growth,
)
from okd_jax.run.job import check
from okd_jax.runtime import machine
from okd_jax.runtime.workdir import Workdir


def left(folder, **changes):
  """A workdir as a finished run of the changed configuration leaves it."""
  workdir = Workdir(folder)
  workdir.write_json(workdir.config, config(**changes).to_dict())
  workdir.write_text(workdir.report, "report")
  return workdir


def test_the_same_run_does_not_grow(tmp_path):
  workdir = left(tmp_path)
  assert growth(config().to_dict(), workdir) == "" and workdir.report.exists()
  assert growth(config().to_dict(), Workdir(tmp_path / "empty")) == ""


@pytest.mark.parametrize(
  "changes",
  [
    {"optim.lr": 1.0},
    {"train.steps": 3},
    {"train.seed": 1},
    {"checkpoint.every": 1},
    {"train.steps": 0, "train.epochs": 1.0},
  ],
)
def test_another_run_is_refused(changes, tmp_path):
  workdir = left(tmp_path)
  with pytest.raises(UserError, match="holds a run with another configuration"):
    growth(config(**changes).to_dict(), workdir)
  assert workdir.report.exists()


def test_another_method_file_is_refused(tmp_path):
  """Its path is kept whole, but what stands in it may change."""
  file = tmp_path / "mine.py"
  file.write_text("# one way\n")
  changes = {"method.file": str(file)}
  workdir = left(tmp_path / "run", **changes)
  workdir.write_text(workdir.method, "# one way\n")
  assert growth(config(**changes).to_dict(), workdir) == ""
  file.write_text("# another way\n")
  with pytest.raises(UserError, match="mine.py has changed since the run"):
    growth(config(**changes).to_dict(), workdir)


@pytest.mark.parametrize(
  "changes",
  [{"train.log_every": 7}, {"train.tensorboard": True}, {"checkpoint.keep": 9}],
)
def test_how_a_run_is_watched_may_change(changes, tmp_path):
  assert growth(config(**changes).to_dict(), left(tmp_path)) == ""


@pytest.mark.parametrize(
  "before, after, key",
  [
    ({}, {"train.steps": 9}, "train.steps"),
    (
      {"train.steps": 0, "train.epochs": 1.0},
      {"train.steps": 0, "train.epochs": 2.5},
      "train.epochs",
    ),
    ({}, {"train.epochs": 9.0}, ""),  # the steps count
    ({}, {"train.log_every": 3}, ""),
  ],
)
def test_a_longer_run_is_not_finished(before, after, key, tmp_path):
  workdir = left(tmp_path, **before)
  assert growth(config(**after).to_dict(), workdir) == key
  assert workdir.report.exists()  # until the longer run has begun


@pytest.mark.parametrize(
  "changes, words",
  [
    ({"optim.schedule": "constant"}, ""),
    (
      {"optim.schedule": "cosine", "method.end.temperature": 2.0},
      "optim.schedule=cosine, method.temperature follows the new length",
    ),
    (
      {"optim.schedule": "constant", "method.name": "promptkd"},
      "now: from here on method.pull_weight follows",
    ),
    (
      {"optim.schedule": "constant", "method.name": "distillm"},
      "now: from here on the share of sampled text follows",
    ),
  ],
)
def test_it_is_said_that_a_schedule_is_another_now(changes, words, caplog):
  """A cosine of ten steps is not the first ten of one of twenty."""
  job = check(config(**changes))
  tell_growth(job.settings, job.method)
  assert words in caplog.text and bool(words) == bool(caplog.text)


def test_a_stage_does_not_grow_under_who_has_begun_with_it(tmp_path):
  """Else the table would be of a teacher that is gone."""
  recipe = read.read(["--config=quickstart"])
  for part in stages(recipe, tmp_path):
    workdir = Workdir(part.workdir)
    workdir.write_json(workdir.config, part.config.to_dict())
    workdir.write_text(workdir.report, "report")
  longer = read.read(
    ["--config=quickstart", "--config.stages.teacher.train.steps=9999"]
  )
  with pytest.raises(
    UserError, match="stage teacher: train.steps is larger than it was"
  ):
    distill.run(longer, tmp_path)


@pytest.mark.slow
def test_a_finished_run_is_extended(tmp_path):
  """With a constant schedule it ends as an undisturbed longer one, to the last bit."""
  constant = ["--config.optim.schedule=constant"]
  train(tmp_path / "long", *constant, "--config.train.steps=10")
  train(tmp_path / "grown", *constant)
  done = train(
    tmp_path / "grown",
    *constant,
    "--config.train.steps=10",
    "--config.checkpoint.keep=5",
    "--config.train.log_every=2",
  )
  assert "resuming at step 6 of 10" in done.stderr
  whole, grown = losses(tmp_path / "long"), losses(tmp_path / "grown")
  assert grown == {step: loss for step, loss in whole.items() if step in grown}
  assert set(grown) >= {*range(1, 7), 8, 10}
  final = [rows(tmp_path / name, "eval")[-1] for name in ("long", "grown")]
  assert final[0] == final[1] and final[0]["step"] == 10
  assert (
    json.loads((tmp_path / "grown" / "config.json").read_text())["train"]["steps"] == 10
  )
  call("main", "--config=configs/debug.py", f"--workdir={tmp_path / 'long'}", status=2)


def test_a_model_that_has_changed_is_refused_and_named(tmp_path):
  """Guards what is in no checkpoint: a student's frozen base, a teacher."""
  tokenizer = make_tokenizer("bytes", [])
  shape = models.preset(
    "llama", vocab_size=258, hidden_size=16, num_layers=1, num_heads=2
  )
  base = tmp_path / "base"
  models.save(base, models.init(shape, jax.random.key(0)), shape, tokenizer)
  changes = {"student.path": str(base), "student.model.hidden_size": 0}
  changes |= {"student.adapter.kind": "lora"}
  workdir = left(tmp_path / "run", **changes)
  workdir.write_json(workdir.models, models_of(check(config(**changes)).settings))
  workdir.remove(workdir.report)
  workdir.checkpoints.mkdir()
  models.save(base, models.init(shape, jax.random.key(1)), shape, tokenizer)
  words = r"student.path: the model is another than when the run in .*run began"
  with pytest.raises(UserError, match=words):
    distill.run(config(**changes), workdir.path)
  with pytest.raises(UserError, match=words):
    export.main([f"--workdir={workdir.path}", f"--output={tmp_path / 'out'}"])
  models.save(base, models.init(shape, jax.random.key(0)), shape, tokenizer)
  check_models(check(config(**changes)).settings, workdir)


@pytest.mark.parametrize("where", [0, 5 * 2**20, 10 * 2**20 - 1])
def test_a_glance_sees_other_weights(where, tmp_path):
  """Of a large file it reads blocks: a byte may hide, other weights cannot."""
  (tmp_path / "config.json").write_text('{"model_type": "llama"}')
  file = tmp_path / "model.safetensors"
  data = np.random.default_rng(0).integers(0, 256, 10 * 2**20, np.uint8)
  file.write_bytes(data.tobytes())
  before = models.glance(tmp_path)
  assert models.glance(tmp_path) == before
  data[max(where - 2**18, 0) : where + 2**18] += 1
  file.write_bytes(data.tobytes())
  assert models.glance(tmp_path) != before


DATED = (
  "{{ 'Today is ' + strftime_now('%Y-%m-%d') + '. ' }}{% for m in messages %}"
  "{{ m['role'] + ': ' + m['content'] + '<|endoftext|>' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def dated_run(tmp_path):
  """A run whose template writes the date."""
  tokenizer = make_tokenizer("bytes", [])
  tokenizer.chat_template = DATED
  tokenizer.save_pretrained(tmp_path / "tokenizer")
  changes = {"data.template": "chat", "data.tokenizer": str(tmp_path / "tokenizer")}
  return config(**changes, **{"train.steps": 2, "checkpoint.every": 1})


def test_rows_do_not_depend_on_the_clock(tmp_path, monkeypatch, caplog):
  """Guards resuming tomorrow: the day is kept in the workdir, and told."""
  caplog.set_level("INFO", logger="okd_jax")
  own, workdir = dated_run(tmp_path), Workdir(tmp_path / "run")
  with day.written_on(datetime.date(2020, 2, 29)):
    run = build(own, workdir)
  # The run's own day counts, which here was none yet: today.
  today = datetime.date.today().isoformat()
  assert json.loads(workdir.day.read_text()) == {"day": today}
  workdir.write_json(workdir.day, {"day": "2020-02-29"})
  again = build(own, workdir)
  text = again.data.tokenizer.decode(again.data.train[0].tokens)
  assert text.startswith("Today is 2020-02-29. ")
  assert "the chat template writes the date: 2020-02-29" in caplog.text
  assert not run.data.tokenizer.decode(run.data.train[0].tokens).startswith(text[:20])
  cached = config(**{"teacher.cache": str(workdir.path)})
  assert kept_day(settings(cached), Workdir(tmp_path / "new")).year == 2020


def test_a_template_without_a_date_keeps_none(tmp_path):
  build(config(), Workdir(tmp_path))
  assert not Workdir(tmp_path).day.exists()


def test_other_rows_are_refused(tmp_path):
  """A file that was replaced between two starts of the same command."""
  data = tmp_path / "data.jsonl"
  rows = [{"prompt": f"{i} + 1 =", "completion": f" {i + 1}"} for i in range(40)]
  data.write_text("".join(json.dumps(row) + "\n" for row in rows))
  own, workdir = config(**{"data.train": str(data)}), Workdir(tmp_path / "run")
  about.write(build(own, workdir), workdir, 0)
  about.check_rows(build(own, workdir), workdir)
  rows[3]["completion"] = " 5"
  data.write_text("".join(json.dumps(row) + "\n" for row in rows))
  with pytest.raises(UserError, match=r"^data.(train|eval): not as when the run in"):
    about.check_rows(build(own, workdir), workdir)


def test_a_template_that_has_changed_is_named(tmp_path):
  """Before the rows, which are others because of it."""
  template = tmp_path / "template.txt"
  template.write_text("{instruction}\n")
  own, workdir = config(**{"data.template": str(template)}), Workdir(tmp_path / "run")
  about.write(build(own, workdir), workdir, 0)
  template.write_text("Do this: {instruction}\n")
  names = r"^data.train, data.eval, data.template: not as when"
  with pytest.raises(UserError, match=names):
    about.check_rows(build(own, workdir), workdir)


def sealed(folder, **changes):
  """A workdir with a checkpoint of the changed run and no file besides."""
  own, workdir = config(**changes), Workdir(folder)
  made_from = of(own.to_dict(), check(own).settings, {"train": {"digest": "abc"}})
  beside = seal.Beside(workdir, made_from, lambda: None)

  class Still:
    def get_state(self):
      return {"next_index": 1}

    def set_state(self, state):
      pass

  with checkpoint.opened(workdir.checkpoints, 1, beside=beside) as checkpoints:
    checkpoints.save(1, {"n": np.zeros(2, np.float32)}, Still(), None)
  return workdir


def test_a_checkpoint_says_what_its_run_was_made_from(tmp_path):
  """Guards going on under another configuration once config.json is lost."""
  workdir = sealed(tmp_path)
  assert growth(config().to_dict(), workdir) == ""
  assert growth(config(**{"train.steps": 9}).to_dict(), workdir) == "train.steps"
  with pytest.raises(UserError, match="another configuration .optim.lr=0.003 there, 1"):
    growth(config(**{"optim.lr": 1.0}).to_dict(), workdir)
  workdir.write_text(workdir.config, "[]")  # it is written anew when the run goes on
  assert growth(config().to_dict(), workdir) == ""
  assert kept(workdir)["data"] == {"train": {"digest": "abc"}}


def test_other_versions_are_refused_unless_it_is_said(tmp_path, monkeypatch, caplog):
  workdir, now = sealed(tmp_path), machine.versions()
  check_versions(check(config()).settings, workdir)
  monkeypatch.setattr(machine, "versions", lambda: now | {"jax": "99.0"})
  words = f"other versions .jax {now['jax']} there, 99.0 here.*any_version=True"
  with pytest.raises(UserError, match=words):
    check_versions(check(config()).settings, workdir)
  own = config(**{"checkpoint.any_version": True})
  check_versions(check(own).settings, workdir)
  assert "jax" in caplog.text and growth(own.to_dict(), workdir) == ""


@pytest.mark.parametrize("content", [None, "other", ""])
def test_what_a_run_reads_is_put_back_or_refused(content, tmp_path):
  workdir = Workdir(tmp_path)
  workdir.write_text(workdir.method, "# mine")
  workdir.write_text(workdir.tokenizer / "tokenizer.json", "{}")
  workdir.write_text(workdir.metrics, '{"step": 1}\n')
  sealed(tmp_path)
  place, found = seal.newest(workdir.checkpoints)
  workdir.write_text(workdir.metrics, '{"step": 1}\n{"step": 2}\n')
  for path in (workdir.method, workdir.tokenizer / "tokenizer.json"):
    path.unlink() if content is None else path.write_text(content)
  seal.put_back(workdir, place, found, fixed=True)
  assert workdir.method.read_text() == "# mine"
  assert len(workdir.metrics.read_text().splitlines()) == 2
  with pytest.raises(UserError, match="tokenizer/tokenizer.json is "):
    seal.check_watched(workdir, found)
  seal.put_back(workdir, place, found, fixed=False)
  assert workdir.metrics.read_text() == '{"step": 1}\n'
