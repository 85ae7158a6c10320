"""Conversations with all that is in them: tools, calls, thoughts, in four templates."""

import json

import pytest
import transformers
from chats import CALL, CALLING, CHATML, GEMMA, LLAMA3, QWEN, R1, TOOLS, chat_tokenizer

from okd_jax.data import Record, encode, load_records, stop_ids
from okd_jax.data.encode import prepare
from okd_jax.data.format import answered_row
from okd_jax.data.sources import parse_record
from okd_jax.errors import UserError

ROOMY = {"max_length": 4096, "max_prompt_length": 4096}
CALLS = CALLING | {"messages": CALLING["messages"][:2]}  # ends where it should call


def spans(row, template):
  """(prompt, what is trained) as text."""
  tokenizer = chat_tokenizer(template)
  [example] = encode(parse_record(row, "f:1"), tokenizer, "chat", **ROOMY)
  start = example.prompt_length
  return tuple(map(tokenizer.decode, (example.tokens[:start], example.tokens[start:])))


@pytest.mark.parametrize(
  ("template", "called"),
  [
    (LLAMA3, '{"name": "add", "parameters": {"a": 1}}<|im_end|>'),
    (
      QWEN,
      '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call><|im_end|>',
    ),
  ],
)
def test_a_student_learns_to_call_where_it_should(template, called):
  """Guards A: a call that vanished taught it to stop there."""
  prompt, trained = spans(CALLS, template)
  assert trained == called
  assert json.dumps(TOOLS) in prompt and prompt.count("1 + 1?") == 1


@pytest.mark.parametrize("template", [LLAMA3, QWEN])
def test_earlier_calls_are_in_the_prompt(template):
  prompt, trained = spans(CALLING, template)
  assert trained == "It is 2.<|im_end|>"
  assert '"a": 1' in prompt and "2" in prompt.rpartition("tool")[2]


@pytest.mark.parametrize("template", [LLAMA3, QWEN])
def test_a_prompt_alone_is_written_as_one_before_an_answer(template):
  tokenizer, alone = chat_tokenizer(template), CALLING | {}
  alone["messages"] = CALLING["messages"][:-1]
  prompt, _ = spans(CALLING, template)
  record = parse_record(alone, "f:1", prompts=True)
  [example] = encode(record, tokenizer, "chat", **ROOMY)
  assert tokenizer.decode(example.tokens[: example.prompt_length]) == prompt
  with pytest.raises(UserError, match="no place for 'tools'"):
    encode(record, chat_tokenizer(GEMMA), "chat", **ROOMY)


def test_thoughts_reach_the_template():
  said = {"role": "assistant", "content": "4", "reasoning_content": "2 + 2"}
  row = {"messages": [{"role": "user", "content": "?"}, said]}
  assert spans(row, QWEN)[1] == "<think>\n2 + 2\n</think>\n\n4<|im_end|>"


@pytest.mark.parametrize(
  ("row", "template", "key"),
  [
    (CALLING, GEMMA, "tools"),
    (CALLING | {"tools": None}, GEMMA, "tool_calls"),
    (
      CALLS | {"tools": None},
      CHATML.replace("m['content']", "m.content|d('')"),
      "tool_",
    ),
    (
      {
        "messages": [
          {"role": "user", "content": "?"},
          {"role": "assistant", "content": "4", "reasoning_content": "2 + 2"},
        ]
      },
      GEMMA,
      "reasoning_content",
    ),
  ],
)
def test_a_template_without_a_place_refuses(row, template, key):
  with pytest.raises(UserError, match=f"f:1: .*template has no place for '{key}"):
    spans(row, template)


def test_other_templates_than_chat_refuse():
  with pytest.raises(UserError, match="'tools' cannot be written with this template"):
    encode(parse_record(CALLING, "f:1"), chat_tokenizer(), "default", **ROOMY)


@pytest.mark.parametrize(
  ("content", "trained"),
  [
    ("<think>\nso\n</think>\n\n4", "so\n</think>\n\n4<|im_end|>"),
    ("<think>so</think>4", "so</think>4<|im_end|>"),
    ("so\n</think>\n\n4", "so\n</think>\n\n4<|im_end|>"),
  ],
)
def test_what_the_prompt_has_opened_is_not_said_again(content, trained):
  """R1-Distill: its prompt ends in <think>, and its turns end as the template says."""
  row = {"messages": [{"role": "user", "content": "2 + 2?"}]}
  row["messages"].append({"role": "assistant", "content": content})
  assert spans(row, R1) == ("<|user|>2 + 2?<|bot|><think>\n", trained)
  tokenizer = chat_tokenizer(R1)
  end = tokenizer.convert_tokens_to_ids("<|im_end|>")
  assert set(stop_ids(tokenizer, "chat")) == {end, tokenizer.eos_token_id}


def test_rows_that_went_another_way_are_counted(caplog):
  caplog.set_level("INFO", logger="okd_jax")
  row = {"messages": [{"role": "user", "content": "?"}]}
  row["messages"].append({"role": "assistant", "content": "<think>a</think>b"})
  _, counts = prepare([parse_record(row, "f:1")] * 3, chat_tokenizer(R1), "chat")
  assert counts.rewritten == 3
  assert "3 that the chat template writes anew" in caplog.text


def test_rows_are_written_back_whole(tmp_path):
  """`sample` keeps tools, calls and names; what was null stays away."""
  row = answered_row(parse_record(CALLING, "f:1"), "Two.")
  assert row["tools"] == TOOLS
  assert row["messages"][1] == {"role": "assistant", "tool_calls": [CALL]}
  assert row["messages"][2]["tool_call_id"] == "7"
  assert row["messages"][3] == {"role": "assistant", "content": "Two."}
  path = tmp_path / "rows.jsonl"
  path.write_text(json.dumps(row) + "\n")
  [again] = load_records(str(path))
  assert answered_row(again, "Two.") == row


@pytest.mark.parametrize(
  ("row", "words"),
  [
    (CALLING | {"tools": 3}, "'tools' is a number, not a list"),
    (CALLING | {"tools": "[1"}, "'tools': not valid JSON"),
    (
      {"messages": [{"role": "user", "content": "?"}, {"role": "assistant"}]},
      "message 2: key 'content' is missing or null",
    ),
  ],
)
def test_mistakes(row, words):
  with pytest.raises(UserError, match=words):
    parse_record(row, "f:1")


def test_tools_written_out_as_json():
  assert parse_record(CALLING | {"tools": json.dumps(TOOLS)}, "f:1").tools == (*TOOLS,)
  assert parse_record(CALLING | {"tools": "[]"}, "f:1").tools is None


@pytest.mark.parametrize(
  ("prompt", "response"),
  [("a: ", "b"), ("a", "b"), ("a b", " c"), ("The answer is", " 4"), ("x\n", "y")],
)
def test_a_row_decodes_to_prompt_and_response(prompt, response, shared):
  """SentencePiece puts a space before what it is given alone."""
  folder = shared / "models" / "stories260K"
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
  record = Record("completion", "f:1", prompt=prompt, references=(response,))
  [example] = encode(record, tokenizer, **ROOMY)
  text = tokenizer.decode(example.tokens, skip_special_tokens=True)
  assert text == prompt + response
