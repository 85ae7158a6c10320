"""The command that shows what a run would train on."""

import json

import pytest
from chats import QWEN, chat_tokenizer
from commands import call

from okd_jax import preview
from okd_jax.config import read
from okd_jax.errors import UserError
from okd_jax.run import look, look_text
from okd_jax.run.job import check
from okd_jax.runtime.workdir import Workdir


def rows(count):
  return [{"prompt": f"p{i} ", "completion": "yes"} for i in range(count)]


def write(path, lines):
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  return str(path)


def seen(tmp_path, **changes):
  """(figures, text) of the debug recipe with some keys of data changed."""
  config = read.read(["--config=debug", "--config.method.name=kd"])
  config.data.update(changes)
  found = look.look(check(config), Workdir(tmp_path / "run"))
  figures = look.figures(found)
  return figures, look_text.text(found, figures)


def test_figures_of_two_files(tmp_path):
  sources = [
    write(
      tmp_path / "a.jsonl", [*rows(5), *rows(1), {"prompt": "x" * 200, **rows(1)[0]}]
    ),
    write(
      tmp_path / "b.jsonl", [{"prompt": "y" * 300, "completion": "n"}, *rows(3)[2:]]
    ),
  ]
  evaluation = write(tmp_path / "e.jsonl", rows(4))
  found, said = seen(tmp_path, train=",".join(sources), eval=evaluation)
  assert [own["rows"] for own in found["sources"]] == [7, 1]
  # 'p0 ' and 'yes' are six bytes, and an end follows.
  assert found["sources"][1] == {
    "name": sources[1],
    "records": 1,
    "rows": 1,
    "tokens": 7,
  }
  assert found["records"]["dropped_prompts"] == 1 and found["records"]["rows"] == 9
  assert found["duplicates"] == 3
  assert (found["held_out"]["rows"], found["held_out"]["from"]) == (4, evaluation)
  assert found["tokens"] == {
    "all": 56,
    "trained": 32,
    "share": 32 / 56,
    "estimated_from_rows": None,
  }
  assert found["rows"]["plain"]["rows"] == 8 and found["rows"]["packed"]["rows"] == 1
  assert found["rows"]["packed"]["padding"] == 1 - 48 / 128
  assert sum(found["lengths"]["counts"]["whole rows"]) == 8
  assert found["lengths"]["percentiles"]["prompts"]["50 %"] == 3
  assert not found["warnings"]
  for part in (
    "dropped 1 (prompts longer than data.max_prompt_length=96)",
    "p0 >>>yes<|endoftext|><<<",
    "3 rows (37.5 %) repeat another row",
    "Trained on 32 of 56 tokens, 57.1 %",
    "### Instruction:\n{instruction}",
    "generation stops at   <|endoftext|> (id 256)",
  ):
    assert part in said


def test_twins_of_rows_held_out(tmp_path):
  found, said = seen(
    tmp_path, train=write(tmp_path / "a.jsonl", rows(3) * 3), holdout=2
  )
  left = found["held_out"]["twins_left_out"]
  assert left and f"Left out:  {left} rows, each the same as one held out" in said
  assert sum(own["rows"] for own in found["sources"]) + left + 2 == 9


def test_conversations_and_what_the_teacher_reads(tmp_path):
  chat_tokenizer(QWEN).save_pretrained(tmp_path / "tokens")
  talk = [{"role": "user", "content": "q1"}, {"role": "assistant", "content": "a1"}]
  talk += [{"role": "user", "content": "q2"}, {"role": "assistant", "content": "a2"}]
  hint = [{"role": "user", "content": "hint"}]
  lines = [{"messages": talk[:2], "teacher_messages": hint}, {"messages": talk}] * 2
  found, said = seen(
    tmp_path,
    train=write(tmp_path / "a.jsonl", lines),
    eval=write(tmp_path / "e.jsonl", lines[1:2]),
    tokenizer=str(tmp_path / "tokens"),
    template="chat",
  )
  assert list(found["lengths"]["counts"]) == [
    "whole rows",
    "prompts",
    "for the teacher",
  ]
  assert "\n>>>a1<|im_end|><<<\n<|im_start|>user\nq2<|im_end|>" in said
  assert "what the teacher reads in the prompt's place\n<|im_start|>user\nhint" in said
  assert "And 2 + 2?<|im_end|>\n<|im_start|>assistant\n>>>4.<|im_end|><<<" in said
  assert "Warning: the exported student will not stop at <|im_end|>" in said


def test_special_tokens_that_differ(tmp_path):
  found, _ = seen(tmp_path)
  special = found["special_tokens"]
  assert look.differing(special) == []
  special["generation stops at"]["teacher"] = ["</s> (id 2)"]
  assert look.differing(special) == ["generation stops at"]


def test_the_command_writes_figures_and_a_picture(tmp_path):
  source = write(tmp_path / "a.jsonl", rows(30))
  changes = [f"--config.data.train={source}", "--config.data.holdout=8"]
  done = call("preview", "--config=debug", *changes, f"--output={tmp_path / 'out'}")
  assert done.stdout.startswith("Data\n────\nsource") and not done.stderr
  found = json.loads((tmp_path / "out" / "preview.json").read_text())
  assert sum(own["rows"] for own in found["sources"]) == 22
  assert (tmp_path / "out" / "lengths.png").read_bytes()[:4] == b"\x89PNG"
  assert not (tmp_path / "okd").exists()


def test_a_stage_that_is_not_there_yet():
  with pytest.raises(
    UserError, match="teacher.path=stage:teacher: this stage has left"
  ):
    preview.main(["--config=quickstart"])
  with pytest.raises(UserError, match="--stage=x: the stages are teacher, start"):
    preview.main(["--config=quickstart", "--stage=x"])


def test_help(capsys):
  preview.main(["--help"])
  said = capsys.readouterr().out
  assert "--output" in said and "--config.data.max_length=512" in said
