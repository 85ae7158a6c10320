"""Forms of rows beside the plain ones: conversations, other columns, prompts alone."""

import json
import re
from pathlib import Path

import pytest

from okd_jax.data import Record, load_records, read_references
from okd_jax.data.columns import KEYS
from okd_jax.data.sources import parse_record
from okd_jax.errors import UserError

ASK = {"role": "user", "content": "hi"}
TALK = [ASK, {"role": "assistant", "content": "hello"}]
CALL = {"name": "add", "arguments": {"x": 1, "y": None}}


def fails(row, words, **options):
  with pytest.raises(UserError, match=f"^f:1: .*{re.escape(words)}") as caught:
    parse_record(row, "f:1", **options)
  assert "\n" not in str(caught.value)


def parsed(row, **options):
  return parse_record(row, "f:1", **options)


def same(row, talk=TALK):
  """The row is read as these messages are."""
  assert parsed(row) == parsed({"messages": talk})


# TRL


def test_a_prompt_and_a_completion_of_messages():
  answer = TALK[1]
  extra = {"chosen": "a", "rejected": "b", "score": 0.5}
  same({"prompt": [ASK], "completion": [answer]} | extra)
  same({"prompt": [ASK], "completion": "hello"})
  long = [*TALK, ASK, answer]
  same({"prompt": [ASK], "completion": long[1:]}, long)
  tools = [{"type": "function", "function": {"name": "add"}}]
  record = parsed({"prompt": [ASK], "completion": [answer], "tools": tools})
  assert record.tools == tuple(tools)
  fails({"prompt": [ASK], "completion": 3}, "'completion' is a number, not text or a")
  fails({"prompt": ["hi"], "completion": "a"}, "message 1 is a string, not an object")
  fails({"prompt": [], "completion": "a"}, "'messages' must be a list of at least two")
  fails({"prompt": "hi", "completion": [answer]}, "'completion[0]' is an object")
  fails({"prompt": [ASK], "completion": [ASK]}, "the last message is by 'user'")
  fails({"prompt": [ASK]}, "key 'completion' is missing")


# ShareGPT


def says(*turns):
  return [{"from": who, "value": value} for who, value in turns]


def test_conversations_of_sharegpt():
  same({"conversations": says(("human", "hi"), ("gpt", "hello"))})
  same({"conversations": says(("user", "hi"), ("assistant", "hello")), "id": "7"})
  same({"conversations": TALK})
  same({"conversations": [ASK | {"role": "human"}, TALK[1] | {"role": "gpt"}]})
  led = [{"role": "assistant", "content": "Welcome"}, *TALK]
  turns = says(("gpt", "Welcome"), ("human", "hi"), ("gpt", "hello"))
  same({"conversations": turns}, led)
  assert parsed({"conversations": turns[1:], "prompt": None}).kind == "messages"
  assert parsed({"conversations": turns, "text": "all"}).kind == "messages"


def test_a_system_prompt_stands_beside_or_among_them():
  turns = says(("human", "hi"), ("gpt", "hello"))
  system = says(("system", "Be kind."))
  whole = [{"role": "system", "content": "Be kind."}, *TALK]
  same({"conversations": turns, "system": "Be kind."}, whole)
  same({"conversations": system + turns, "system": None}, whole)
  same({"conversations": system + turns, "system": "Be kind."}, whole)
  same({"conversations": turns, "system": " "})
  fails({"conversations": system + turns, "system": "No."}, "two system prompts")


def test_calls_of_sharegpt():
  call = {"type": "function", "function": CALL}
  talk = [
    ASK,
    {"role": "assistant", "tool_calls": [call]},
    {"role": "tool", "content": "1"},
    TALK[1],
  ]
  for value in (json.dumps(CALL), json.dumps([CALL]), CALL):
    turns = says(("human", "hi"), ("function_call", value), ("observation", "1"))
    row = {"conversations": [*turns, *says(("gpt", "hello"))], "tools": "[]"}
    same(row, talk)
  row = {"conversations": says(("human", "hi"), ("function_call", json.dumps(CALL)))}
  assert parsed(row).final == {"tool_calls": [call]}


@pytest.mark.parametrize(
  "turns, words",
  [
    ("hi", "'conversations' is a string, not a list of turns"),
    (["hi"], "turn 1 is a string, not an object"),
    (says(("human", "a"), ("bot", "b")), "turn 2: 'from' is 'bot'; it must be one of"),
    (says(("human", "a"), ("gpt", None)), "turn 2: key 'value' is missing or null"),
    (says(("human", "a"), ("gpt", 3)), "message 2: 'content' is a number"),
    (says((1, "a"), ("gpt", "b")), "turn 1: 'from' is a number"),
    (says(("human", "a"), ("function_call", "{")), "turn 2: 'value': not valid JSON"),
    (says(("human", "a"), ("function_call", "[]")), "turn 2: a function_call must be"),
    (says(("human", "a"), ("function_call", "{}")), "turn 2: a function_call must be"),
    (says(("human", "a")), "must be a list of at least two"),
    ([{"value": "a"}, TALK[1]], "message 1: key 'role' is missing"),
  ],
)
def test_bad_conversations(turns, words):
  fails({"conversations": turns}, words)


# Contents and weights


def test_a_content_in_parts_is_joined():
  parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i", "image": None}]
  same({"messages": [ASK | {"content": parts}, TALK[1]]})
  for part, words in [
    ({"type": "image_url"}, "message 1: 'content' has a part of type 'image_url'"),
    ({"text": "a"}, "part of type None"),
    ({"type": "text"}, "a part of 'content': 'text' is null"),
    ("a", "a part of 'content' is a string"),
  ]:
    fails({"messages": [ASK | {"content": [*parts, part]}, TALK[1]]}, words)
  fails({"messages": [ASK, TALK[1] | {"content": []}]}, "message 2: 'content' is empty")


def test_the_weight_of_a_message_is_kept():
  for weight in (0, 1, 1.0):
    said = [*TALK[:1], TALK[1] | {"weight": weight}, *TALK]
    assert parsed({"messages": said}).messages[1]["weight"] == weight
  assert "weight" not in parsed({"messages": [ASK, TALK[1] | {"weight": None}]}).final
  for weight in (2, 0.5, True, "1"):
    row = {"messages": [ASK, TALK[1] | {"weight": weight}]}
    fails(row, f"message 2: 'weight' is {weight!r}; it must be 0 or 1")


# Columns


def test_columns_are_renamed_before_anything_else():
  columns = {"prompt": "question", "completion": "answers.text"}
  row = {"question": "q", "answers": {"text": ["a", "b"]}, "prompt": "old"}
  record = parsed(row, columns=columns)
  assert (record.kind, record.prompt, record.references) == (
    "completion",
    "q",
    ("a", "b"),
  )
  swap = {"prompt": "completion", "completion": "prompt"}
  assert parsed({"prompt": "a", "completion": "b"}, columns=swap).prompt == "b"
  row = {"prompt": "a", "completion": "b"}
  assert parsed(row, columns={"text": "completion"}).kind == "text"
  assert parsed({"a.b": "x", "a": {"b": "y"}}, columns={"text": "a.b"}).text == "x"
  row = {"q": "a", "completion": "b"}
  fails(
    row, "there is no column 'p', which data.columns.prompt", columns={"prompt": "p"}
  )
  fails(row, "the row has 'q', 'completion'", columns={"prompt": "q.x"})
  fails([1], "is a list, not an object", columns={"prompt": "q"})


def test_columns_of_a_table_may_have_empty_cells(tmp_path):
  path = tmp_path / "a.csv"
  path.write_text("q,more,a\n1,,2\n1,x,2\n")
  columns = {"instruction": "q", "input": "more", "output": "a"}
  assert [r.input for r in load_records(str(path), columns=columns)] == ["", "x"]


# Prompts alone


@pytest.mark.parametrize(
  "row, prompt",
  [
    ({"prompt": "a"}, "a"),
    ({"prompt": "a", "completion": None, "text": "the whole"}, "a"),
    ({"instruction": "a"}, "a"),
    ({"instruction": "a", "context": "b", "response": None}, "a\n\nb"),
    ({"messages": [ASK]}, "user: hi"),
    ({"messages": [*TALK, {"role": "tool", "content": "1"}]}, None),
    ({"prompt": [ASK]}, "user: hi"),
    ({"conversations": says(("human", "hi"))}, "user: hi"),
  ],
)
def test_prompts_alone(row, prompt):
  record = parsed(row | {"ended": False}, prompts=True)
  assert record.references == () and record.final == {} and record.ended
  assert prompt is None or record.asked == prompt
  with pytest.raises(
    UserError, match="prompts alone are for okd|at least two, the las"
  ):
    parsed(row | {"text": None})


def test_prompts_beside_rows_that_have_answers():
  rows = [
    {"prompt": "a", "completion": "b"},
    {"instruction": "a", "output": ["b", "c"]},
    {"messages": TALK},
    {"text": "a"},
  ]
  for row in rows:
    assert parsed(row, prompts=True) == parsed(row)
  fails({"prompt": "a", "completion": ""}, "'completion' is empty", prompts=True)
  fails({"messages": []}, "must be a list of at least one", prompts=True)
  fails({"messages": TALK[1:]}, "at least two", prompts=True)
  system = {"role": "system", "content": "a"}
  fails({"messages": [system]}, "the last message is by 'system'", prompts=True)
  fails({"output": "a"}, "key 'instruction' is missing", prompts=True)


# What the teacher alone reads


def test_privileged_prompts():
  pair, own = {"prompt": "a", "completion": "b"}, {"teacher_prompt": "a, hint"}
  assert parsed(pair | own).teacher_prompt == "a, hint"
  task = {"instruction": "a", "output": "b"}
  assert parsed(task | own | {"teacher_messages": None}).teacher_prompt == "a, hint"
  hint = {"teacher_messages": [{"role": "system", "content": "hint"}, ASK]}
  for row in (pair, task, {"messages": TALK}, {"conversations": TALK}):
    found = parsed(row | hint | {"teacher_prompt": None})
    assert found.teacher_messages == tuple(hint["teacher_messages"])
  assert parsed({"prompt": "a"} | own, prompts=True).teacher_prompt == "a, hint"
  assert parsed(pair) == Record("completion", "f:1", prompt="a", references=("b",))
  fails(pair | own | hint, "has both 'teacher_prompt' and 'teacher_messages'")
  fails({"messages": TALK} | own, "give 'teacher_messages'")
  fails({"text": "a"} | own, "a text has no prompt")
  fails({"text": "a"} | hint, "a text has no prompt")
  fails(pair | {"teacher_prompt": " "}, "'teacher_prompt' is empty")
  fails(pair | {"teacher_prompt": 3}, "'teacher_prompt' is a number")
  fails(pair | {"teacher_messages": "a"}, "'teacher_messages' must be a list")
  fails(pair | {"teacher_messages": TALK}, "leave the answer out")
  fails(
    pair | {"teacher_messages": [{"role": "user"}]},
    "teacher_messages, message 1: key 'content' is missing",
  )


# The page about it


def test_every_row_of_the_page_is_a_record():
  page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
  blocks = re.findall(r"```json\n(.*?)```", page, re.S)
  records = [parsed(json.loads(line)) for b in blocks for line in b.splitlines()]
  kinds = ["instruction"] * 2 + ["completion"] + ["messages"] * 3 + ["text"]
  kinds += ["completion", "messages"]  # with what the teacher alone reads
  assert [record.kind for record in records] == kinds
  for key in KEYS:
    assert key in page


# References alone


def test_references_of_every_form(tmp_path):
  rows = [
    {"prompt": [ASK], "completion": TALK[1:]},
    {"conversations": says(("human", "hi"), ("gpt", "hello"))},
    {"completion": ["a", "b"]},
    {"prompt": "a", "messages": TALK},
  ]
  path = tmp_path / "a.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  found = read_references(str(path))
  assert found == [("hello",), ("hello",), ("a", "b"), ("hello",)]
