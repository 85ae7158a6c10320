"""Rows in a folder that people name: whole or not at all, refused if made otherwise."""

import dataclasses
import datetime
import functools
import json
import subprocess
import sys
import uuid

import fsspec
import pytest
from chats import CHATML, chat_tokenizer

from okd_jax.data import day, kept, make_tokenizer, prepared
from okd_jax.data.limits import Form
from okd_jax.data.sources import parse_record, shards_of
from okd_jax.errors import UserError

FORM = Form(max_length=64, max_prompt_length=32)


@pytest.fixture(params=["local", "memory"])
def output(request, tmp_path):
  if request.param == "local":
    return str(tmp_path / "prepared")
  return f"memory://{uuid.uuid4().hex}"


def data(path, count=5, answer="yes"):
  lines = [{"prompt": f"p{i} ", "completion": answer} for i in range(count)]
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  return str(path)


def making(prompts=False, columns=(), **changes):
  parse = functools.partial(parse_record, prompts=prompts, columns=dict(columns))
  changes = {"tokenizer": make_tokenizer("bytes", []), "form": FORM} | changes
  return kept.Making(parse=parse, **changes)


def write(output, source, part="train", **changes):
  return prepared.write(output, part, shards_of(source), making(**changes), 1)


def test_written_once_and_read_by_whoever_asks_the_same(output, tmp_path, caplog):
  caplog.set_level("INFO", logger="okd_jax")
  source = data(tmp_path / "a.jsonl")
  assert write(output, source) and not write(output, source)
  found, about = prepared.read(output, "train", making())
  assert [e.asked for e in found] == [f"p{i} " for i in range(5)]
  assert about["kinds"] == ["completion"] and about["largest"] > 0
  assert f"train was made of {source}, transformers" in caplog.text


def test_others_are_not_replaced(output, tmp_path):
  write(output, data(tmp_path / "a.jsonl"))
  with pytest.raises(UserError, match=r"made otherwise \(other data\); name another"):
    write(output, data(tmp_path / "a.jsonl", answer="no"))


def test_the_datas_bytes_and_the_code_need_not_match(output, tmp_path, monkeypatch):
  write(output, data(tmp_path / "a.jsonl"))
  (tmp_path / "a.jsonl").unlink()
  monkeypatch.setattr(kept, "_code", lambda: "another")
  assert len(prepared.read(output, "train", making())[0]) == 5


@pytest.mark.parametrize(
  "change, message",
  [
    (lambda: {"form": dataclasses.replace(FORM, max_length=63)}, "max_length=64 there"),
    (lambda: {"form": dataclasses.replace(FORM, turns="all")}, "turns='last' there"),
    (
      lambda: {"form": dataclasses.replace(FORM, template="{instruction}")},
      "another template",
    ),
    (lambda: {"tokenizer": make_tokenizer("bpe:300", [])}, "another tokenizer"),
    (lambda: {"prompts": True}, "prompts=False there, True here"),
    (lambda: {"columns": {"prompt": "q"}}, "columns={} there, {'prompt': 'q'} here"),
  ],
)
def test_a_run_that_asks_otherwise_is_refused(change, message, tmp_path):
  output = str(tmp_path / "prepared")
  write(output, data(tmp_path / "a.jsonl"))
  with pytest.raises(UserError) as caught:
    prepared.read(output, "train", making(**change()))
  assert message in str(caught.value) and "data.prepared=" in str(caught.value)


def test_a_folder_without_rows_is_named(output):
  with pytest.raises(UserError, match="no rows in .*/train; python -m okd_jax.prepare"):
    prepared.read(output, "train", making())


def test_the_day_that_was_written_is_known(output, tmp_path):
  """Guards answers asked for on another day than the rows are of."""
  source, form = data(tmp_path / "a.jsonl"), dataclasses.replace(FORM, template="chat")
  own = {"tokenizer": chat_tokenizer(CHATML + "{# strftime_now('%Y') #}")}
  with day.written_on(datetime.date(2020, 2, 29)):
    write(output, source, form=form, **own)
  assert prepared.day_of(output) == datetime.date(2020, 2, 29)
  with pytest.raises(UserError, match="another day"):
    write(output, source, form=form, **own)
  assert len(prepared.read(output, "train", making(form=form, **own))[0]) == 5


def test_half_an_upload_is_not_there(tmp_path):
  output = f"memory://{uuid.uuid4().hex}"
  write(output, data(tmp_path / "a.jsonl"))
  fsspec.filesystem("memory").rm(f"{output.removeprefix('memory:/')}/train/about.json")
  assert not prepared.holds(f"{output}/train")
  assert write(output, data(tmp_path / "a.jsonl"))


def test_places_that_nobody_can_read_are_named():
  with pytest.raises(UserError, match="nosuch://x/train: cannot be read"):
    prepared.read("nosuch://x", "train", making())


READER = """
import sys
import fsspec
import numpy as np
from okd_jax.data import rows, train_loader

here, process = sys.argv[1], int(sys.argv[2])
fsspec.filesystem("memory").put(here, "/rows", recursive=True)
found, asked = rows.open_rows("memory://rows"), []
read = found._read
found._read = lambda i: asked.append(i) or read(i)
batches = train_loader(
  found, batch_size=4, length=64, pad_id=0, seed=0,
  own=np.arange(2 * process, 2 * process + 2),
)
mine = np.concatenate([next(batches)["row"] for _ in range(4)]) // 4
assert sorted(set(asked)) == sorted(set(mine.tolist())), (asked, mine)
print(len(set(asked)))
"""


@pytest.mark.parametrize("process", [0, 1])
def test_a_process_reads_the_batches_of_its_own_rows_alone(
  process, tmp_path, monkeypatch
):
  """Guards a cluster in which every process fetches the whole of the data.

  In a process of its own, since here every call's arguments are looked at.
  """
  monkeypatch.setattr(kept, "BATCH", 4)
  write(str(tmp_path / "prepared"), data(tmp_path / "a.jsonl", 64))
  folder = str(tmp_path / "prepared" / "train")
  done = subprocess.run(
    [sys.executable, "-c", READER, folder, str(process)],
    capture_output=True,
    text=True,
    check=False,
  )
  assert not done.returncode, done.stderr
  assert int(done.stdout) <= 8 < 16
