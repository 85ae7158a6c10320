"""Every answer of a conversation is trained on, once, as a model would be asked."""

import dataclasses
import json

import numpy as np
import pytest
from chats import (
  CALL,
  CHATML,
  END_UNMARKED,
  GEMMA,
  LLAMA3,
  MARKED,
  QWEN,
  R1,
  TOOLS,
  chat_tokenizer,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from okd_jax.config import read
from okd_jax.data import encode
from okd_jax.data.encode import prepare
from okd_jax.data.sources import parse_record
from okd_jax.errors import UserError
from okd_jax.run.data import read_data
from okd_jax.run.job import check
from okd_jax.run.outline import outline
from okd_jax.runtime.workdir import Workdir

ROOMY = {"max_length": 4096, "max_prompt_length": 4096}
END = "<|im_end|>"


def user(content):
  return {"role": "user", "content": content}


def bot(content, **more):
  return {"role": "assistant", "content": content, **more}


FOUR = [
  {"role": "system", "content": "Be kind."},
  *(user("q1"), bot("a1"), user("q2"), bot("a2")),
  *(user("q3"), bot("a3"), user("q4"), bot("a4")),
]
CALLS = [
  *FOUR[:3],
  user("1 + 1?"),
  {"role": "assistant", "tool_calls": [CALL]},
  {"role": "tool", "content": "2"},
  bot("It is 2."),
  *(user("q3"), bot("a3"), user("q4"), bot("a4")),
]


def record_of(messages, tools=None):
  return parse_record({"messages": messages, "tools": tools}, "f:1")


def rows_of(messages, template, tools=None, **form):
  form = {"turns": "all", **ROOMY, **form}
  return encode(record_of(messages, tools), chat_tokenizer(template), "chat", **form)


def counts_of(messages, template, **form):
  form = {"turns": "all", **ROOMY, **form}
  return prepare([record_of(messages)], chat_tokenizer(template), "chat", **form)[1]


def trained(example):
  """What a row trains, as text, part by part."""
  decode = chat_tokenizer().decode
  return [decode(example.tokens[start:stop]) for start, stop in example.spans]


def said(rows):
  return [trained(row) for row in rows]


def same(one, other):
  for field in dataclasses.fields(one):
    if field.name != "number":
      a, b = (getattr(row, field.name) for row in (one, other))
      assert np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b, field.name


# Through the templates of families


@pytest.mark.parametrize(
  ("template", "call"),
  [
    (LLAMA3, '{"name": "add", "parameters": {"a": 1}}'),
    (QWEN, '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'),
  ],
)
def test_four_turns_and_a_call_are_one_row(template, call):
  rows = rows_of(CALLS, template, TOOLS)
  answers = ["a1", call, "It is 2.", "a3", "a4"]
  assert said(rows) == [[answer + END for answer in answers]]


def test_four_turns_of_a_template_without_tools():
  assert said(rows_of(FOUR, GEMMA)) == [
    ["a1" + END, "a2" + END, "a3" + END, "a4" + END]
  ]
  with pytest.raises(UserError, match="f:1: .*template has no place for 'tools'"):
    rows_of(CALLS, GEMMA, TOOLS)
  with pytest.raises(UserError, match="f:1: .*template has no place for 'tool_calls'"):
    rows_of(CALLS, GEMMA)


def test_turns_that_are_written_anew_are_rows_of_their_own():
  """R1-Distill: a prompt opens a thought, and no later prompt holds it."""
  rows = rows_of(CALLS, R1)
  call = '<|call|>{"name": "add", "arguments": {"a": 1}}'
  answers = ["a4", "a1", call, "It is 2.", "a3"]
  assert said(rows) == [[answer + END] for answer in answers]
  for row, turn in zip(rows, [10, 2, 4, 6, 8], strict=True):
    [cut] = rows_of(CALLS[: turn + 1], R1, turns="last")
    same(row, cut)
    decoded = chat_tokenizer().decode(row.prompt)
    assert decoded == asked(CALLS[:turn], R1) and decoded.endswith("<think>\n")
  counts = counts_of(CALLS, R1)
  assert (counts.kept, counts.apart, counts.rewritten) == (5, 4, 5)


def test_of_turns_that_stay_and_others_each_is_trained_once():
  """Qwen3 leaves the thoughts of earlier turns out, and leaves others as they are."""
  thought = bot("a2", reasoning_content="so")
  rows = rows_of([*FOUR[:4], thought, *FOUR[5:7]], QWEN)
  assert said(rows) == [
    ["a1" + END, "a3" + END],
    ["<think>\nso\n</think>\n\na2" + END],
  ]


def test_a_call_behind_an_opened_thought_is_not_lost():
  [row] = rows_of(CALLS[:5], R1, turns="last")
  assert trained(row) == ['<|call|>{"name": "add", "arguments": {"a": 1}}' + END]
  away = R1.replace("{% elif m.tool_calls %}{{ '<|bot|>' }}", "{% elif m.tool_calls %}")
  with pytest.raises(UserError, match="does not write 'tool_calls' behind the prompt"):
    rows_of(CALLS[:5], away, turns="last")


@pytest.mark.parametrize("template", [LLAMA3, QWEN, R1, GEMMA])
def test_the_last_alone(template):
  [row] = rows_of(FOUR, template, turns="last")
  assert trained(row) == ["a4" + END] and row.trained is None
  assert chat_tokenizer().decode(row.prompt) == asked(FOUR[:-1], template)
  [default] = encode(record_of(FOUR), chat_tokenizer(template), "chat", **ROOMY)
  same(row, default)


# Templates that mark what the model says


@pytest.mark.parametrize(
  ("template", "end"), [(MARKED, END), (END_UNMARKED, "")], ids=["inside", "outside"]
)
def test_marks_are_those_of_transformers(template, end):
  [row] = rows_of(FOUR, template)
  assert trained(row) == ["a1" + end, "a2" + end, "a3" + end, "a4" + end]
  found = chat_tokenizer(template).apply_chat_template(
    FOUR, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
  )
  mask = np.zeros(len(row.tokens), int)
  for start, stop in row.spans:
    mask[start:stop] = 1
  assert found["input_ids"][: len(row.tokens)] == row.tokens.tolist()
  assert found["assistant_masks"][: len(row.tokens)] == mask.tolist()
  assert not any(found["assistant_masks"][len(row.tokens) :])


def test_where_marks_and_turns_agree_rows_do():
  plain, marks = (rows_of(FOUR, template)[0] for template in (CHATML, MARKED))
  same(plain, marks)


# Weights, and conversations that are too long


def weighed(*silent):
  return [m | {"weight": 0} if i in silent else m for i, m in enumerate(FOUR)]


@pytest.mark.parametrize("template", [QWEN, MARKED])
def test_what_weighs_nothing_is_not_trained(template):
  assert said(rows_of(weighed(2, 6), template)) == [["a2" + END, "a4" + END]]
  [row] = rows_of(weighed(8), template)
  assert trained(row) == ["a1" + END, "a2" + END, "a3" + END]
  assert chat_tokenizer().decode(row.response) == "a4" + END  # read, not trained


def test_what_weighs_nothing_is_no_row_of_its_own():
  assert said(rows_of(weighed(2), R1)) == [["a4" + END], ["a2" + END], ["a3" + END]]
  assert said(rows_of(weighed(8), R1)) == [["a1" + END], ["a2" + END], ["a3" + END]]
  counts = counts_of(weighed(4, 8), R1)
  assert (counts.kept, counts.apart, counts.untrained) == (2, 2, 1)


@pytest.mark.parametrize("template", [LLAMA3, QWEN, GEMMA, MARKED])
def test_long_conversations_lose_their_first_turns(template):
  ask = chat_tokenizer(template)
  two = record_of([FOUR[0], *FOUR[5:]])
  [fits] = encode(two, ask, "chat", turns="all", **ROOMY)
  limits = {"max_length": len(fits.tokens), "max_prompt_length": fits.prompt_length}
  [row] = rows_of(FOUR, template, **limits)
  assert row.tokens.tolist() == fits.tokens.tolist()
  assert trained(row) == ["a3" + END, "a4" + END]
  assert "Be kind." in ask.decode(row.prompt) and "q2" not in ask.decode(row.prompt)
  counts = counts_of(FOUR, template, **limits)
  assert (counts.shortened, counts.kept, counts.dropped_prompts) == (1, 1, 0)
  limits["max_length"] -= 1  # one token less, one turn less
  assert said(rows_of(FOUR, template, **limits)) == [["a4" + END]]


def test_the_last_turn_is_never_lost():
  """Where it alone is too long, it is cut as any other row would be."""
  last = rows_of([FOUR[0], *FOUR[7:]], QWEN)[0]
  limits = {"max_length": len(last.tokens) - 1, "max_prompt_length": last.prompt_length}
  [row] = rows_of(FOUR, QWEN, **limits)
  assert trained(row) == ["a4"] and row.prompt.tolist() == last.prompt.tolist()
  counts = counts_of(FOUR, QWEN, **limits)
  assert (counts.shortened, counts.truncated_rows) == (1, 1)
  with pytest.raises(UserError, match="all 1 prompts are longer than"):
    counts_of(FOUR, QWEN, max_prompt_length=last.prompt_length - 1)


# In a run


def test_a_run_takes_its_chat_template_from_a_file(tmp_path):
  (tmp_path / "template.jinja").write_text(GEMMA)
  rows = [json.dumps({"messages": FOUR}), json.dumps({"messages": FOUR[:3]})]
  (tmp_path / "train.jsonl").write_text("\n".join(rows))
  config = read.read(["--config=debug"])
  config.data.update(template="chat", chat_template=str(tmp_path / "template.jinja"))
  config.data.update(train=str(tmp_path / "train.jsonl"), holdout=1, max_length=512)
  config.data.max_prompt_length = 500
  job = check(config)
  shape = outline(job, Workdir(tmp_path / "run"), lambda: ())
  assert shape.tokenizer.chat_template == GEMMA
  data = read_data(job.settings.data, job.settings.eval, shape)
  both = [data.tokenizer.decode(rows[0].prompt) for rows in (data.train, data.eval)]
  assert sorted(both) == sorted([asked(FOUR[:-1], GEMMA), asked(FOUR[:2], GEMMA)])
  counts = sorted(len(rows[0].spans) for rows in (data.train, data.eval))
  assert counts == [1, 4]


# Any conversation


def asked(messages, template):
  """What generation would be given."""
  return chat_tokenizer(template).apply_chat_template(
    messages, tokenize=False, add_generation_prompt=True
  )


CONTENT = st.text("ab \n<>{}é", max_size=6)


@st.composite
def conversations(draw):
  """[system,] then user and assistant in turn; every content has its number in it."""
  messages = []
  if draw(st.booleans()):
    messages.append({"role": "system"})
  for turn in range(draw(st.integers(1, 4))):
    last = draw(st.sampled_from([None, None, 0, 1]))
    weight = {} if last is None else {"weight": last}
    messages += [{"role": "user"}, {"role": "assistant"} | weight]
    if turn and draw(st.booleans()):  # as tools answer, in text that any template holds
      messages.insert(-2, {"role": "tool"})
      messages.insert(-3, {"role": "assistant"})
  for i, message in enumerate(messages):
    message["content"] = f"{draw(CONTENT)}[{i}]{draw(CONTENT)}"
  return messages


@pytest.mark.parametrize("template", [LLAMA3, QWEN, R1, GEMMA, CHATML, MARKED])
@settings(max_examples=40, deadline=None)
@given(messages=conversations())
def test_every_answer_once_and_nothing_else(template, messages):
  counted = [m.get("weight", 1) for m in messages]
  answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
  wanted = [i for i in answers if counted[i]]
  if not wanted:
    assert rows_of(messages, template) == []
    return
  rows = rows_of(messages, template)
  text = "\0".join(part for parts in said(rows) for part in parts)
  for i, message in enumerate(messages):
    assert text.count(f"[{i}]") == (i in wanted)
    if i in wanted:
      assert message["content"].strip() in text
  # Each prompt, and all that stands before an earlier turn, is what a model is asked.
  asks = {asked(messages[:i], template) for i in answers}
  decode = chat_tokenizer().decode
  for row in rows:
    assert decode(row.prompt) in asks
    for start, _ in row.spans:
      assert decode(row.tokens[:start]) in asks
