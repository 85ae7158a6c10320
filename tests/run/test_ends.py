"""The warning where a student would not stop at what it learns to end with."""

import dataclasses

import pytest
from chats import END_UNMARKED, MARKED, QWEN, chat_tokenizer

from okd_jax import models
from okd_jax.config import read
from okd_jax.config.schema import DataSettings
from okd_jax.config.stages import stages
from okd_jax.run import ends
from okd_jax.run.job import check
from okd_jax.run.outline import Outline, outline
from okd_jax.runtime.workdir import Workdir

CHAT = DataSettings(template="chat")


def told(student, teacher, data=None, template=QWEN, **teachers):
  """What is said of models with these ids as their ends; None: no teacher."""
  shapes = {"teacher": teacher, **teachers}
  shapes = {
    name: models.ModelConfig(vocab_size=300, eos_ids=ids)
    for name, ids in shapes.items()
    if ids is not None
  }
  config = models.ModelConfig(vocab_size=300, eos_ids=student)
  shape = Outline(chat_tokenizer(template), config, shapes)
  return ends.problems(shape, data or DataSettings())


@pytest.fixture
def turn():
  return chat_tokenizer().convert_tokens_to_ids("<|im_end|>")


EOS = chat_tokenizer().eos_token_id


def test_nothing_is_said_where_all_is_well(turn):
  assert not told((EOS,), (EOS,))
  assert not told((EOS,), None)
  assert not told((turn, EOS), (EOS, turn), CHAT)
  assert not told((turn, EOS), (turn,), CHAT)
  assert not told((turn,), (turn,), CHAT)  # no row ends with EOS
  assert not told((turn, EOS), (turn,), CHAT, MARKED)
  assert not told((turn,), (turn,), dataclasses.replace(CHAT, turns="last"))


def test_a_teacher_ends_otherwise(turn):
  [said] = told((EOS,), (EOS, turn))
  assert said.startswith(
    f"the exported student will not stop at <|im_end|> (id {turn}), with which the "
    "teacher's answers end, since its generation config stops at <|endoftext|> "
    f"(id {EOS})"
  )
  [said] = told((EOS,), (EOS,), one=(turn,))
  assert "with which answers of teacher one end" in said


def test_rows_end_otherwise(turn):
  [said] = told((EOS,), None, CHAT)
  assert f"<|im_end|> (id {turn}), with which training rows end" in said
  [said] = told((EOS,), (turn,), CHAT)
  assert "with which training rows and the teacher's answers end" in said
  [said] = told((), (EOS,))
  assert "stops at nothing" in said


def test_ids_of_another_tokenizer_are_not_compared(turn):
  student = models.ModelConfig(vocab_size=300, eos_ids=(EOS,))
  teacher = models.ModelConfig(vocab_size=300, eos_ids=(7,))
  shape = Outline(chat_tokenizer(), student, {"teacher": teacher}, chat_tokenizer())
  assert not ends.problems(shape, DataSettings())


def test_marks_without_the_end_teach_nobody_to_stop(turn):
  [said] = told((turn,), (turn,), CHAT, END_UNMARKED)
  assert "no row teaches the student to stop" in said
  last = dataclasses.replace(CHAT, turns="last")
  assert not told((turn,), (turn,), last, END_UNMARKED)


@pytest.mark.parametrize("recipe", ["debug", "quickstart"])
def test_recipes_are_silent(recipe, tmp_path):
  """Of those with stages the first, whose models are random."""
  config = stages(read.read([f"--config={recipe}"]), tmp_path)[0].config
  config.data.tokenizer = "bytes"
  job = check(config)
  shape = outline(job, Workdir(tmp_path), lambda: ())
  assert not ends.problems(shape, job.settings.data)


def test_the_stories_are_silent(shared, tmp_path):
  job = check(read.read(["--config=stories"]))
  shape = outline(job, Workdir(tmp_path), lambda: ())
  assert not ends.problems(shape, job.settings.data)


def test_a_run_warns_as_it_starts(tmp_path, caplog):
  template = tmp_path / "template.jinja"
  template.write_text("{% for m in messages %}{{ m.content }}</s>{% endfor %}")
  config = read.read(["--config=debug"])
  config.data.update(template="chat", chat_template=str(template))
  shape = outline(check(config), Workdir(tmp_path), lambda: ())
  shape = dataclasses.replace(
    shape, student=dataclasses.replace(shape.student, eos_ids=(7,))
  )
  ends.tell(shape, check(config).settings.data)
  [said] = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
  assert "the exported student will not stop at" in said
