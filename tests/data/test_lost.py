"""What a review found to be lost, or kept, without a word."""

import datetime
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from chats import CALL, CHATML, QWEN, TOOLS, chat_tokenizer

from okd_jax.data import (
  Example,
  Record,
  day,
  encode,
  kept,
  load_records,
  make_tokenizer,
  rows,
)
from okd_jax.data.hold_out import hold_out
from okd_jax.data.limits import Form
from okd_jax.data.sources import parse_record, shards_of
from okd_jax.errors import UserError

ROOMY = {"max_length": 4096, "max_prompt_length": 4096}
ASK = {"role": "user", "content": "1 + 1?"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv("OKD_JAX_ROWS", str(tmp_path / "rows"))


def trained(row, tokenizer, **form):
  """The trained parts of all rows of a raw row, as text."""
  found = encode(parse_record(row, "f:1"), tokenizer, "chat", **ROOMY | form)
  return [[tokenizer.decode(e.tokens[a:b]) for a, b in sorted(e.spans)] for e in found]


def test_another_end_token_makes_other_rows(tmp_path):
  """The repair of a student that never stops: eos_token in tokenizer_config.json."""
  source = tmp_path / "a.jsonl"
  source.write_text('{"prompt": "a", "completion": "b"}\n')
  ends = []
  for eos in ("<|endoftext|>", "<|im_end|>"):
    tokenizer = chat_tokenizer()
    tokenizer.eos_token = eos
    found, _ = kept.keep(shards_of(str(source)), kept.Making(tokenizer, Form()), "x")
    ends.append(tokenizer.decode(found[0].tokens[-1:]))
  assert ends == ["<|endoftext|>", "<|im_end|>"]


@pytest.mark.parametrize("sizes", [(1, 9), (9, 1), (5, 5), (50, 60, 70), (1, 1, 30)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_long_texts_leave_as_many_rows_as_asked(sizes, seed):
  texts = [
    Example(np.array([i, j]), 0, (), f"a:{i}", number=i)
    for i, size in enumerate(sizes)
    for j in range(size)
  ]
  for count in {1, 2, sum(sizes) // 2, sum(sizes) - 1}:
    train, out, _ = hold_out(rows.of(texts), count, seed)
    assert len(out) == count and len(train) == len(texts) - count


def test_named_columns_go_before_a_rows_own_keys():
  row = {"instruction": "i", "output": "o", "question": "q", "answer": "a"}
  names = {"prompt": "question", "completion": "answer"}
  record = parse_record(row, "f:1", columns=names)
  assert (record.kind, record.prompt, record.references) == ("completion", "q", ("a",))
  own = parse_record({**row, "reply": "r"}, "f:1", columns={"output": "reply"})
  assert (own.prompt, own.references) == ("i", ("r",))


def test_a_system_prompt_beside_messages_is_one_of_them():
  said = [ASK, {"role": "assistant", "content": "2"}]
  record = parse_record({"system": "Be brief.", "messages": said}, "f:1")
  assert record.messages[0] == {"role": "system", "content": "Be brief."}
  both = [{"role": "system", "content": "Other."}, *said]
  with pytest.raises(UserError, match="two system prompts"):
    parse_record({"system": "Be brief.", "messages": both}, "f:1")


CONTENT_OR_CALLS = CHATML.replace(
  "m['content']", "(m.content if m.content else m.tool_calls|tojson)"
)
CALLS_OR_CONTENT = CHATML.replace(
  "m['content']", "(m.tool_calls|tojson if m.tool_calls else m.content)"
)


@pytest.mark.parametrize(
  ("template", "key"),
  [(CONTENT_OR_CALLS, "tool_calls"), (CALLS_OR_CONTENT, "content")],
)
def test_text_beside_a_call_is_lost_by_no_template(template, key):
  """Whatever rows came before it."""
  tokenizer = chat_tokenizer(template)
  both = {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL]}
  alone = {"role": "assistant", "content": None, "tool_calls": [CALL]}
  from okd_jax.data.encode import make_encoder

  encoder = make_encoder(tokenizer, Form(template="chat", **ROOMY))
  good, bad = (
    parse_record({"messages": [ASK, answer]}, f"f:{i}")
    for i, answer in enumerate((alone, both), 1)
  )
  assert len(encoder([good], 0)[0]) == 1
  with pytest.raises(UserError, match=f"f:2: .*no place for '{key}'"):
    encoder([bad], 1)
  held = {"messages": [ASK, both], "tools": TOOLS}
  assert "Let me see." in trained(held, chat_tokenizer(QWEN))[0][0]


def test_what_is_cut_off_has_text_alone():
  answer = {"role": "assistant", "content": "two", "reasoning_content": "hm"}
  row = {"messages": [ASK, answer], "ended": False}
  with pytest.raises(UserError, match="'ended' is false, but .* 'reasoning_content'"):
    trained(row, chat_tokenizer(QWEN))


def test_a_literal_end_is_no_text_in_any_turn():
  tokenizer = chat_tokenizer()
  said = [ASK, {"role": "assistant", "content": "2<|endoftext|>"}]
  row = {"messages": [*said, *said]}
  assert trained(row, tokenizer, turns="all") == [["2<|im_end|>"] * 2]


def test_the_day_of_the_teachers_own_template_counts(tmp_path):
  source = tmp_path / "a.jsonl"
  source.write_text('{"instruction": "a", "output": "b"}\n')
  tokenizer = chat_tokenizer("{{ strftime_now('%Y') }}" + CHATML)
  form = Form(template="default", teacher_template="chat", **ROOMY)
  years = []
  for year in (2020, 2021):
    with day.written_on(datetime.date(year, 1, 1)):
      making = kept.Making(tokenizer, form)
      found, _ = kept.keep(shards_of(str(source)), making, "x")
      years.append(tokenizer.decode(found[0].teacher_prompt)[:4])
  assert years == ["2020", "2021"]


def test_a_very_long_conversation_is_shortened_at_once():
  said = [ASK, {"role": "assistant", "content": "2"}] * 1500
  record = parse_record({"messages": said}, "f:1")
  limits = {"max_length": 96, "max_prompt_length": 80, "turns": "all"}
  [row] = encode(record, chat_tokenizer(), "chat", **limits)
  longest = [
    len(
      encode(
        parse_record({"messages": said[:n]}, "f"), chat_tokenizer(), "chat", **ROOMY
      )[0].tokens
    )
    for n in (2, 4)
  ]
  assert len(row.tokens) in longest and len(row.tokens) <= 96


@pytest.mark.parametrize(
  "column",
  [
    pa.array([2**62, 0], pa.timestamp("ms")),
    pa.Array.from_buffers(
      pa.string(),
      2,
      [None, pa.py_buffer(np.array([0, 1, 2], np.int32)), pa.py_buffer(b"\xffa")],
    ),
  ],
)
def test_tables_that_python_cannot_read_are_named(column, tmp_path):
  table = pa.table({"prompt": ["a", "b"], "completion": ["c", "d"], "other": column})
  path = tmp_path / "a.parquet"
  pa.parquet.write_table(table, path)
  with pytest.raises(UserError, match="a.parquet: cannot be read"):
    load_records(str(path))


def test_an_object_with_a_list_is_a_row_if_it_has_text(tmp_path):
  path = tmp_path / "a.json"
  row = {"text": "a", "spans": [{"prompt": "x", "completion": "y"}]}
  path.write_text(json.dumps(row, indent=1))
  [record] = load_records(str(path))
  assert record == Record("text", record.where, text="a")


def test_a_hint_that_shows_the_answer_needs_one():
  record = Record("instruction", "f:1", prompt="q")
  with pytest.raises(
    UserError, match="a place for the answer, but the row is a prompt"
  ):
    encode(
      record, make_tokenizer("bytes", []), teacher_template="{output} {instruction}"
    )


def test_a_hint_leaves_the_last_answer_alone_and_says_so(caplog):
  from okd_jax.data import prepare

  caplog.set_level("INFO", logger="okd_jax")
  said = [ASK, {"role": "assistant", "content": "2"}] * 2
  record = parse_record({"messages": said, "teacher_messages": [ASK]}, "f:1")
  prepare([record], chat_tokenizer(), "chat", turns="all", **ROOMY)
  assert "1 conversations of which the last answer alone is trained" in caplog.text
