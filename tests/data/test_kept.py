"""Rows that are kept: found again by what they were made of, whole or not at all."""

import dataclasses
import json
import os

import numpy as np
import pytest
from chats import CHATML, chat_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from okd_jax.data import Example, Record, kept, make_tokenizer, prepare, rows, workers
from okd_jax.data.limits import Form
from okd_jax.data.sources import load_records, shards_of
from okd_jax.errors import UserError

FORM = Form(max_length=64, max_prompt_length=32)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv("OKD_JAX_ROWS", str(tmp_path / "rows"))
  return tmp_path / "rows"


def data(path, count=5, answer="yes"):
  lines = [{"prompt": f"p{i} ", "completion": answer} for i in range(count)]
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  return str(path)


def making(**changes):
  changes = {"tokenizer": make_tokenizer("bytes", []), "form": FORM} | changes
  return kept.Making(**changes)


def keep(source, processes=1, **changes):
  return kept.keep(shards_of(source), making(**changes), "data", processes)[0]


def same(one, other):
  """Two examples say the same."""
  for field in dataclasses.fields(Example):
    a, b = (getattr(e, field.name) for e in (one, other))
    assert np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b, field.name
  return True


def folders(cache):
  return sorted(path.name for path in cache.iterdir() if path.is_dir())


def never(*_, **__):
  raise AssertionError("the rows were made again")


def test_kept_rows_are_those_of_prepare(tmp_path):
  source = data(tmp_path / "a.jsonl", 7)
  plain, _ = prepare(
    load_records(source), make_tokenizer("bytes", []), **dataclasses.asdict(FORM)
  )
  found = keep(source)
  assert len(found) == len(plain) == 7
  assert all(same(a, b) for a, b in zip(found, plain, strict=True))
  assert same(found[-1], plain[-1]) and [e.number for e in found[2:5:2]] == [2, 4]
  with pytest.raises(IndexError):
    found[7]


def test_a_second_start_reads_them(tmp_path, monkeypatch, caplog):
  caplog.set_level("INFO", logger="okd_jax")
  source = data(tmp_path / "a.jsonl")
  first, told = keep(source), caplog.text
  monkeypatch.setattr(kept, "_maker", never)
  caplog.clear()
  assert all(same(a, b) for a, b in zip(keep(source), first, strict=True))
  assert caplog.text == told != ""


@pytest.mark.parametrize(
  "change",
  [
    lambda: {"form": dataclasses.replace(FORM, max_length=63)},
    lambda: {"form": dataclasses.replace(FORM, template="{instruction}")},
    lambda: {"tokenizer": make_tokenizer("bpe:300", [])},
    lambda: {"others": (make_tokenizer("bytes", []),)},
  ],
)
def test_whatever_they_depend_on_makes_others(change, tmp_path, cache):
  source = data(tmp_path / "a.jsonl")
  keep(source)
  keep(source, **change())
  assert len(folders(cache)) == 2


def test_other_bytes_make_others(tmp_path, cache):
  keep(data(tmp_path / "a.jsonl"))
  assert keep(data(tmp_path / "a.jsonl", answer="no!"))[0].references == ("no!",)
  assert len(folders(cache)) == 2


def test_a_chat_template_and_its_day_make_others(tmp_path, cache):
  source = data(tmp_path / "a.jsonl")
  form = dataclasses.replace(FORM, template="chat")
  keep(source, tokenizer=chat_tokenizer(), form=form)
  dated = CHATML + "{# strftime_now('%Y') #}"
  keep(source, tokenizer=chat_tokenizer(dated), form=form)
  from okd_jax.data import day

  with day.written_on(day.day().replace(year=2020)):
    keep(source, tokenizer=chat_tokenizer(dated), form=form)
    keep(source, tokenizer=chat_tokenizer(), form=form)  # which knows no day
  assert len(folders(cache)) == 3


def test_a_killed_writer_leaves_nothing_that_is_read(tmp_path, cache, monkeypatch):
  source = data(tmp_path / "a.jsonl")
  with monkeypatch.context() as patch:
    patch.setattr(rows.json, "dump", never)  # after the rows, before what is said
    with pytest.raises(AssertionError):
      keep(source)
  assert all(name.startswith(".") for name in folders(cache))
  assert len(keep(source)) == 5


@pytest.mark.parametrize("name", rows.FILES)
def test_a_damaged_file_is_told_of_and_made_anew(name, tmp_path, cache, caplog):
  source = data(tmp_path / "a.jsonl")
  keep(source)
  [folder] = folders(cache)
  (cache / folder / name).write_bytes(b"no")
  assert len(keep(source)) == 5
  assert "damaged" in caplog.text and len(keep(source)) == 5


def test_a_folder_that_cannot_be_written_is_named(tmp_path, cache):
  cache.write_text("a file")
  with pytest.raises(UserError, match="cannot be kept .* OKD_JAX_ROWS"):
    keep(data(tmp_path / "a.jsonl"))


def test_bad_rows_are_named_and_nothing_is_kept(tmp_path, cache):
  path = tmp_path / "a.jsonl"
  data(path)
  path.write_text(path.read_text() + '{"prompt": "x"}\n')
  with pytest.raises(UserError, match="a.jsonl:6: key 'completion' is missing"):
    keep(str(path))
  assert all(name.startswith(".") for name in folders(cache))


def test_other_processes_make_the_same_rows(tmp_path, cache, monkeypatch):
  """And an error of theirs is the error of whoever asked them."""
  monkeypatch.setattr(kept, "BATCH", 10)
  monkeypatch.setattr(kept, "HERE", 20)
  source = data(tmp_path / "a.jsonl", 95)
  alone = keep(source)
  monkeypatch.setenv("OKD_JAX_ROWS", str(tmp_path / "again"))
  together = keep(source, processes=2)
  assert len(together) == 95
  assert all(same(a, b) for a, b in zip(alone, together, strict=True))
  bad = tmp_path / "b.jsonl"
  bad.write_text((tmp_path / "a.jsonl").read_text() + '{"text": ""}\n')
  with pytest.raises(UserError, match="b.jsonl:96: 'text' is empty"):
    keep(str(bad), processes=2)


def test_a_worker_that_dies_is_told_of():
  with pytest.raises(UserError, match="ended with status 3; set data.num_proc=1"):
    list(workers.mapped(_deadly, (), [1], 1))


def _deadly():
  return lambda _: os._exit(3)


def test_memory_is_not_that_of_the_data(tmp_path):
  """Tokens of a row are a view of the mapped file."""
  found = keep(data(tmp_path / "a.jsonl"))
  first = found[0].tokens
  assert not first.flags.owndata and not first.flags.writeable
  assert np.shares_memory(first, found[0].tokens)


PARTS = st.tuples(
  st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=9),
  st.none() | st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=3),
  st.none() | st.lists(st.integers(0, 9), min_size=1, max_size=5),
  st.lists(st.text(max_size=5), max_size=3),
  st.integers(0, 2**40),
)


def example(tokens, trained, own, texts, number):
  return Example(
    np.array(tokens, np.int32),
    len(tokens) // 2,
    tuple(texts),
    "f:1",
    trained=None if trained is None else tuple(trained),
    teacher_prompt=None if own is None else np.array(own, np.int32),
    asked="".join(texts),
    kind="text",
    number=number,
  )


@given(st.lists(PARTS, min_size=1, max_size=8), st.integers(0, 3))
def test_rows_hold_whatever_examples_hold(parts, start):
  examples = [example(*part) for part in parts]
  found = rows.of(examples)
  assert all(same(a, b) for a, b in zip(found, examples, strict=True))
  assert all(same(a, b) for a, b in zip(found[start:], examples[start:], strict=True))
  backwards = found.take(range(len(examples))[::-1]).take([0])
  assert same(backwards[0], examples[-1])
  lengths = rows.column(examples, "teacher_length")
  own = [e.teacher_prompt is not None for e in examples]
  wanted = [len(e.for_teacher().tokens) * o for e, o in zip(examples, own, strict=True)]
  assert lengths.tolist() == wanted and rows.privileged(examples) == any(own)


def test_keys_tell_rows_apart():
  """Guards twins: the same tokens, but another prompt, teacher or trained part."""
  base = Example(np.arange(6, dtype=np.int32), 3, ("a",), "f:1")
  others = [
    dataclasses.replace(base, prompt_length=2),
    dataclasses.replace(base, tokens=np.arange(1, 7, dtype=np.int32)),
    dataclasses.replace(base, trained=((1, 2), (3, 6))),
    dataclasses.replace(base, teacher_prompt=np.arange(2, dtype=np.int32)),
    dataclasses.replace(base, teacher_prompt=np.arange(3, dtype=np.int32)),
  ]
  assert len({rows.key(e) for e in [base, *others]}) == 6
  twin = dataclasses.replace(base, where="g:2", number=7, references=("b",))
  assert rows.key(twin) == rows.key(base)
  assert rows.digest([base, others[0]]) != rows.digest([others[0], base])


def test_text_is_refused_where_tokenizers_differ(tmp_path):
  path = tmp_path / "a.txt"
  path.write_text("words")
  with pytest.raises(UserError, match="row is text without a prompt"):
    keep(str(path), others=(make_tokenizer("bytes", []),))
  assert Record("text", "f").is_text
