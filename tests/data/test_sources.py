"""Reading data: every form, every kind of source, and every way it can be wrong."""

import gzip
import json
import re
from pathlib import Path

import pytest

from okd_jax.data import Record, load_records, read_references
from okd_jax.data.sources import parse_record
from okd_jax.errors import UserError

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
ROW = {"instruction": "Add.", "input": "1, 2", "output": "3"}
TALK = [
  {"role": "user", "content": "hi"},
  {"role": "assistant", "content": "hello"},
]


def write(path, *rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
  return str(path)


def fails(spec, *parts):
  """Reading fails with one sentence that holds all parts; returns it."""
  with pytest.raises(UserError) as caught:
    load_records(spec)
  message = str(caught.value)
  assert "\n" not in message
  for part in parts:
    assert part in message, message
  return message


# Forms


def test_instruction_form(tmp_path):
  path = write(tmp_path / "a.jsonl", ROW, {"instruction": "Say x.", "output": "x"})
  assert load_records(path) == [
    Record("instruction", f"{path}:1", prompt="Add.", input="1, 2", references=("3",)),
    Record("instruction", f"{path}:2", prompt="Say x.", references=("x",)),
  ]


def test_output_may_be_a_list_of_references(tmp_path):
  path = write(tmp_path / "a.jsonl", ROW | {"output": ["3", "three"]})
  assert load_records(path)[0].references == ("3", "three")


def test_completion_messages_and_text_forms(tmp_path):
  path = write(
    tmp_path / "a.jsonl",
    {"prompt": "Once", "completion": " upon a time"},
    {"messages": TALK},
    {"text": "All of this."},
  )
  completion, messages, text = load_records(path)
  assert (completion.kind, completion.prompt) == ("completion", "Once")
  assert completion.references == (" upon a time",)
  assert (messages.kind, messages.references) == ("messages", ("hello",))
  assert messages.messages == (TALK[0],)
  assert (text.kind, text.text, text.references) == ("text", "All of this.", ())


def test_the_first_complete_form_wins():
  # Published sets carry other forms' keys along: alpaca a 'text', ultrachat a 'prompt'.
  alpaca = ROW | {"text": "the wrapper, with both"}
  ultrachat = {"prompt": "hi", "prompt_id": "1", "messages": TALK, "completion": None}
  assert parse_record(alpaca, "w").kind == "instruction"
  assert parse_record(ultrachat, "w").kind == "messages"


def test_what_a_folder_holds_by_accident(tmp_path, caplog):
  caplog.set_level("INFO", logger="okd_jax")
  write(tmp_path / "data.jsonl", ROW)
  (tmp_path / "data.jsonl.gz").write_bytes(gzip.compress(json.dumps(ROW).encode()))
  (tmp_path / "._data.jsonl").write_bytes(b"\x00\x05\x16\x07")
  (tmp_path / "other.jsonl.gz").write_bytes(gzip.compress(json.dumps(ROW).encode()))
  assert len(load_records(str(tmp_path))) == 2
  assert "._data.jsonl is hidden: left out" in caplog.text
  assert "data.jsonl.gz stands beside the file without .gz" in caplog.text


@pytest.mark.parametrize("name", ["data.jsonl", "data.txt", "data.json"])
def test_a_pointer_of_git_lfs_is_no_data(name, tmp_path):
  path = tmp_path / name
  path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
  fails(str(path), "is a pointer of git-lfs", "git lfs pull")


@pytest.mark.parametrize(
  ("row", "wanted"),
  [
    # Data sets that were put together: each row has the others' keys, as null.
    ({"input": None, "output": None}, ("c", ("r",))),
    ({"input": None, "prompt": None, "completion": None, "text": None}, ("c", ("r",))),
    ({"input": "", "output": None}, ("c", ("r",))),
    ({"input": "c", "output": "r"}, ("c", ("r",))),
    ({"context": None, "input": "x"}, ("x", ("r",))),
    ({"context": "", "input": "x"}, ("x", ("r",))),
    ({"response": None, "output": ["a", "b"]}, ("c", ("a", "b"))),
    ({"input": None, "context": None}, ("", ("r",))),
  ],
)
def test_null_is_absence(row, wanted):
  row = {"instruction": "i", "context": "c", "response": "r"} | row
  record = parse_record(row, "f:1")
  assert record.kind == "instruction"
  assert (record.input, record.references) == wanted


def test_null_beside_other_forms():
  null = dict.fromkeys(("instruction", "input", "output", "response", "messages"))
  assert parse_record(null | {"text": "t", "prompt": None}, "f:1").text == "t"
  row = null | {"prompt": "p", "completion": "c", "context": "of something else"}
  assert parse_record(row, "f:1").prompt == "p"


@pytest.mark.parametrize(
  ("row", "words"),
  [
    ({"output": "other"}, "'output' is 'other' and 'response' is 'r', two names"),
    ({"input": "x" * 50}, f"'input' is '{'x' * 39}… and 'context' is 'c'"),
  ],
)
def test_two_names_of_one_thing_that_differ(row, words):
  row = {"instruction": "i", "context": "c", "response": "r"} | row
  with pytest.raises(UserError, match=f"f:1: {re.escape(words)}"):
    parse_record(row, "f:1")


def test_dolly_by_its_own_names():
  row = {"instruction": "i", "context": "c", "response": "r", "category": "qa"}
  record = parse_record(row, "w")
  assert (record.prompt, record.input, record.references) == ("i", "c", ("r",))


def test_a_response_may_say_that_it_was_cut_off(tmp_path):
  ends = [{}, {"ended": None}, {"ended": True}, {"ended": False}]
  forms = [ROW, {"prompt": "a", "completion": "b"}, {"messages": TALK}, {"text": "a"}]
  for form in forms:
    path = write(tmp_path / "a.jsonl", *(form | end for end in ends))
    assert [record.ended for record in load_records(path)] == [True, True, True, False]


# Kinds of sources


def test_gzip_blank_lines_and_byte_order_mark(tmp_path):
  path = tmp_path / "a.jsonl.gz"
  line = json.dumps(ROW).encode()
  path.write_bytes(gzip.compress(b"\xef\xbb\xbf" + line + b"\r\n\n  \n" + line))
  assert [r.where for r in load_records(str(path))] == [f"{path}:1", f"{path}:4"]


def test_a_line_separator_inside_a_string_is_text(tmp_path):
  path = tmp_path / "a.jsonl"
  row = ROW | {"output": "a\u2028b\x85c"}
  path.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
  assert load_records(str(path))[0].references == ("a\u2028b\x85c",)


def test_text_file_is_one_record(tmp_path):
  path = tmp_path / "a.txt"
  path.write_text("One.\n\nTwo.\n")
  [record] = load_records(str(path))
  assert (record.text, record.where) == ("One.\n\nTwo.\n", str(path))


def test_json_list_and_json_lines(tmp_path):
  (tmp_path / "a.json").write_text(json.dumps([ROW, ROW], indent=2))
  write(tmp_path / "b.json", ROW)
  records = load_records([str(tmp_path / "a.json"), str(tmp_path / "b.json")])
  places = [record.where.rpartition("/")[2] for record in records]
  assert places == ["a.json: record 1", "a.json: record 2", "b.json:1"]


def test_several_sources_in_order(tmp_path):
  a = write(tmp_path / "a.jsonl", ROW | {"output": "A"})
  b = write(tmp_path / "b.jsonl", ROW | {"output": "B"})
  assert [r.references[0] for r in load_records([b, a])] == ["B", "A"]
  assert [r.references[0] for r in load_records((a, b))] == ["A", "B"]


def test_folder_of_jsonl(tmp_path):
  for name in ("train-0", "train-1", "test", "trainer"):
    write(tmp_path / f"{name}.jsonl", ROW | {"output": name})

  def outputs(spec):
    return [record.references[0] for record in load_records(spec)]

  assert outputs(str(tmp_path)) == ["train-0", "train-1"]
  assert outputs(f"{tmp_path}:test") == ["test"]
  fails(f"{tmp_path}:dev", "no data file of split 'dev'", "test.jsonl")
  (tmp_path / "train-0.jsonl").unlink()
  (tmp_path / "train-1.jsonl").unlink()
  assert outputs(str(tmp_path)) == ["test", "trainer"]  # no split at all: everything


def test_choosing_among_a_folders_files_is_said(tmp_path, caplog):
  write(tmp_path / "train.jsonl", ROW)
  write(tmp_path / "test.jsonl", ROW)
  with caplog.at_level("INFO", logger="okd_jax"):
    load_records(str(tmp_path))
  assert "reading train.jsonl alone" in caplog.text


def test_folder_without_data(tmp_path):
  fails(str(tmp_path), "holds no data file", ".jsonl")


def test_saved_datasets(tmp_path):
  import datasets

  datasets.disable_progress_bars()
  train = datasets.Dataset.from_list([ROW, ROW | {"input": None}])
  train.save_to_disk(tmp_path / "one")
  both = datasets.DatasetDict({"train": train, "test": train.select([0])})
  both.save_to_disk(tmp_path / "two")
  one = load_records(str(tmp_path / "one"))
  assert [r.where for r in one] == [f"{tmp_path}/one row {i}" for i in (1, 2)]
  assert [r.input for r in one] == ["1, 2", ""]
  assert len(load_records(f"{tmp_path}/two")) == 2
  assert len(load_records(f"{tmp_path}/two:test")) == 1
  fails(f"{tmp_path}/two:dev", "has no split 'dev'", "train, test")
  fails(f"{tmp_path}/one:test", "without splits")
  (tmp_path / "one" / "state.json").write_text("{")
  fails(f"{tmp_path}/one", "cannot be loaded")


def test_hub_ids(monkeypatch):
  import datasets
  import huggingface_hub

  asked = []

  def load_dataset(path, name=None, split=None):
    asked.append((path, name, split))
    return [ROW]

  monkeypatch.setattr(datasets, "load_dataset", load_dataset)
  monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *a, **k: None)
  specs = ["org/set", "org/set:test", "set@en:train[:10]"]
  places = [record.where for record in load_records(specs)]
  assert places == ["org/set:train row 1", "org/set:test row 1"] + [
    "set@en:train[:10] row 1"
  ]
  assert asked == [
    ("org/set", None, "train"),
    ("org/set", None, "test"),
    ("set", "en", "train[:10]"),
  ]


def test_hub_failures_say_why(monkeypatch):
  import huggingface_hub

  def unreachable(*args, **kwargs):
    raise ConnectionError("Name or service not known\nRetrying")

  monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
  fails("org/set", "org/set: not a file", "(Name or service not known)")


def test_embedded():
  assert load_records("embedded")[0].kind == "instruction"
  assert len(load_records("embedded:eval")) < len(load_records("embedded"))
  fails("embedded:dev", "embedded:dev", "embedded:eval")


# What can be wrong

BAD_LINES = [
  (b'{"instruction": "a" "output": "b"}', "not valid JSON (Expecting ',' delimiter"),
  (b'{"instruction": "a"', "not valid JSON"),
  (b"[" * 100_000, "not valid JSON"),
  (b'{"text": ' + b"9" * 5000 + b"}", "not valid JSON"),
  (b'{"text": "\xff"}', "not UTF-8 text (invalid start byte at byte 11)"),
  (b"[1, 2]", "is a list, not an object"),
  (b"null", "is null, not an object"),
  (b"{}", "no usable keys (found: none)"),
  (b'{"question": "a", "answer": "b"}', "no usable keys (found: 'question', 'answer'"),
  (b'{"instruction": "a"}', "key 'output' is missing"),
  (b'{"instruction": "a", "output": null}', "key 'output' is null"),
  (b'{"output": "a"}', "key 'instruction' is missing"),
  (b'{"prompt": "a", "output": "b"}', "key 'instruction' is missing"),
  (b'{"prompt": "a"}', "key 'completion' is missing"),
  (b'{"instruction": "a", "output": ""}', "'output' is empty"),
  (b'{"instruction": "a", "output": " \\n"}', "'output' is empty"),
  (b'{"instruction": " ", "output": "a"}', "'instruction' is empty"),
  (b'{"instruction": "a", "output": []}', "'output' is an empty list"),
  (b'{"instruction": "a", "output": ["b", ""]}', "'output[1]' is empty"),
  (b'{"instruction": "a", "output": ["b", 3]}', "'output[1]' is a number"),
  (b'{"instruction": "a", "output": 3}', "'output' is a number, not a string"),
  (b'{"instruction": ["a"], "output": "b"}', "'instruction' is a list, not a string"),
  (b'{"instruction": "a", "input": 1, "output": "b"}', "'input' is a number"),
  (b'{"prompt": "a", "completion": ""}', "'completion' is empty"),
  (b'{"prompt": "", "completion": "a"}', "'prompt' is empty"),
  (b'{"text": "a", "ended": 0}', "'ended' is a number, not true or false"),
  (b'{"text": "a", "ended": "no"}', "'ended' is a string, not true or false"),
  (b'{"text": ""}', "'text' is empty"),
  (b'{"text": true}', "'text' is true or false, not a string"),
  (b'{"text": "a\\ud800b"}', "half a surrogate pair at character 2"),
  (b'{"messages": "hi"}', "'messages' must be a list of at least two"),
  (b'{"messages": []}', "'messages' must be a list of at least two"),
  (b'{"messages": [{"role": "assistant", "content": "a"}]}', "at least two"),
  (b'{"messages": ["a", "b"]}', "message 1 is a string, not an object"),
  (b'{"messages": [{"role": "user"}, {}]}', "message 1: key 'content' is missing"),
]
BAD_TALKS = [
  ([*TALK, {"role": "user", "content": "and?"}], "the last message is by 'user'"),
  ([TALK[0], TALK[1] | {"content": " "}], "message 2: 'content' is empty"),
  ([TALK[0], TALK[1] | {"content": 5}], "message 2: 'content' is a number"),
  ([{"role": 1, "content": "a"}, TALK[1]], "message 1: 'role' is a number"),
]


@pytest.mark.parametrize("line, message", BAD_LINES)
def test_a_bad_line_is_named(tmp_path, line, message):
  """Guards G5: lists cut to the shorter one in silence (LMOps)."""
  path = tmp_path / "train.jsonl"
  good = json.dumps(ROW).encode()
  path.write_bytes(good + b"\n\n" + line + b"\n" + good + b"\n")
  fails(str(path), f"{path}:3: ", message)


@pytest.mark.parametrize("messages, message", BAD_TALKS)
def test_bad_messages_are_named(tmp_path, messages, message):
  path = write(tmp_path / "train.jsonl", {"messages": TALK}, {"messages": messages})
  fails(path, f"{path}:2: ", message)


@pytest.mark.parametrize(
  "name", ["gone.jsonl", "gone.jsonl.gz", "gone.txt", "gone.json", "gone", "a b"]
)
def test_a_missing_file_is_never_looked_for_on_the_hub(tmp_path, name, monkeypatch):
  import huggingface_hub

  monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", None)  # would not work
  fails(str(tmp_path / name), f"{name}: no such file or folder")
  monkeypatch.chdir(tmp_path)
  if "." in name:
    fails(name, f"{name}: no such file or folder")
  fails(f"./{name}", f"./{name}: no such file or folder")
  fails(f"several/parts/{name}", "no such file or folder")


@pytest.mark.parametrize("content", [b"", b" \n\n", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.json"])
def test_an_empty_file(tmp_path, name, content):
  path = tmp_path / name
  path.write_bytes(content)
  fails(str(path), f"{path}: the file is empty")


def test_other_unreadable_files(tmp_path):
  (tmp_path / "a.docx").write_text("a,b\n")
  fails(str(tmp_path / "a.docx"), "not a known kind of data file", ".jsonl")
  (tmp_path / "b.jsonl.gz").write_bytes(b"not gzip")
  fails(str(tmp_path / "b.jsonl.gz"), "b.jsonl.gz: cannot be read")
  (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}')[:-9])
  fails(str(tmp_path / "c.jsonl.gz"), "c.jsonl.gz: cannot be read")
  (tmp_path / "d.txt").write_bytes("café".encode("latin-1"))
  fails(str(tmp_path / "d.txt"), "d.txt: not UTF-8 text", "save the file as UTF-8")
  (tmp_path / "e.json").write_text('[{"text": "a"},\n {"text": }]')
  fails(str(tmp_path / "e.json"), "e.json: not valid JSON", "line 2 column 11")
  (tmp_path / "f.json").write_text("[]")
  fails(str(tmp_path / "f.json"), "f.json: holds no records")


@pytest.mark.parametrize("spec", ["", " ", [], [""], [3]])
def test_no_source_at_all(spec):
  fails(spec, "names no data")


# References alone


def test_references_need_no_prompt(tmp_path):
  path = write(
    tmp_path / "f.jsonl",
    {"output": "a"},
    {"output": ["a", "b"]},
    {"completion": "c"},
    {"messages": TALK},
  )
  assert read_references(path) == [("a",), ("a", "b"), ("c",), ("hello",)]


def test_rows_without_references(tmp_path):
  path = write(tmp_path / "f.jsonl", {"output": "a"}, {"text": "a"})
  with pytest.raises(UserError, match=re.escape(f"{path}:2: no reference")):
    read_references(path)


# Real data


@pytest.mark.skipif(not SHARED.is_dir(), reason="no shared data")
@pytest.mark.parametrize(
  "name, rows",
  [
    ("train/dolly.jsonl", 763),
    ("eval/vicuna.jsonl", 80),
    ("train/seed_tasks.jsonl", 175),
  ],
)
def test_real_data(name, rows):
  records = load_records(str(SHARED / name))
  assert len(records) == rows
  assert records[-1].where == f"{SHARED / name}:{rows}"


@pytest.mark.skipif(not SHARED.is_dir(), reason="no shared data")
def test_a_large_gzipped_file():
  assert len(load_records(str(SHARED / "train/p3_30k.jsonl.gz"))) == 30_000
