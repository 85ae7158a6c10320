"""Kinds of data files: each read back as it was written, and what can be wrong."""

import csv
import gzip
import io
import itertools
import json

import hypothesis
import hypothesis.strategies as st
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from okd_jax.data import load_records, unpack
from okd_jax.data.files import shards
from okd_jax.data.sources import read_rows, shards_of
from okd_jax.errors import UserError

PAIR = {"prompt": "007", "completion": "NA"}
ROWS = [PAIR, {"prompt": 'say "hi", or\nnot', "completion": "ünï\tcode"}]
PACKS = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}


def table(rows, delimiter=","):
  file = io.StringIO()
  writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
  writer.writeheader()
  writer.writerows(rows)
  return file.getvalue().encode()


def lines(rows):
  return "".join(json.dumps(row) + "\n" for row in rows).encode()


WRITERS = {
  "a.jsonl": lines,
  "a.ndjson": lines,
  "a.json": lines,
  "b.json": lambda rows: json.dumps(rows).encode(),
  "c.json": lambda rows: json.dumps({"v": 1, "data": rows}, indent=1).encode(),
  "d.json": lambda rows: json.dumps({"data": rows}).encode(),
  "a.csv": table,
  "a.tsv": lambda rows: table(rows, "\t"),
}


def parquet(path, rows):
  pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)


def arrow_stream(path, rows):
  data = pyarrow.Table.from_pylist(rows)
  with pyarrow.ipc.new_stream(path, data.schema) as writer:
    writer.write_table(data, max_chunksize=2)


def arrow_file(path, rows):
  data = pyarrow.Table.from_pylist(rows)
  with pyarrow.ipc.new_file(path, data.schema) as writer:
    writer.write_table(data, max_chunksize=2)


def fails(spec, *parts):
  with pytest.raises(UserError) as caught:
    load_records(str(spec))
  message = str(caught.value)
  assert "\n" not in message
  for part in parts:
    assert part in message, message


def pairs(spec):
  return [
    {"prompt": r.prompt, "completion": r.references[0]} for r in load_records(str(spec))
  ]


# Every kind


@pytest.mark.parametrize("pack", PACKS)
@pytest.mark.parametrize("name", WRITERS)
def test_texts_are_read_as_they_were_written(name, pack, tmp_path):
  path = tmp_path / (name + pack)
  path.write_bytes(PACKS[pack](WRITERS[name](ROWS)))
  assert pairs(path) == ROWS


@pytest.mark.parametrize(
  "name, write",
  [("a.parquet", parquet), ("a.arrow", arrow_stream), ("b.arrow", arrow_file)],
)
def test_tables_of_arrow(name, write, tmp_path):
  path = tmp_path / name
  write(path, ROWS * 3)
  assert pairs(path) == ROWS * 3
  assert load_records(str(path))[-1].where == f"{path} row 6"


@pytest.mark.parametrize("pack", PACKS)
def test_a_text_of_every_packing(pack, tmp_path):
  path = tmp_path / ("a.txt" + pack)
  path.write_bytes(PACKS[pack](b"One.\n\nTwo.\n"))
  assert load_records(str(path))[0].text == "One.\n\nTwo.\n"


WORDS = st.text(
  st.characters(codec="utf-8", exclude_characters="\0"), min_size=1
).filter(str.strip)


@hypothesis.settings(deadline=None, max_examples=40)
@hypothesis.given(
  st.lists(st.fixed_dictionaries({"prompt": WORDS, "completion": WORDS}), min_size=1)
)
def test_any_rows_come_back(tmp_path_factory, rows):
  folder = tmp_path_factory.mktemp("rows")
  parquet(folder / "a.parquet", rows)
  arrow_stream(folder / "a.arrow", rows)
  for name, write in WRITERS.items():
    (folder / name).write_bytes(write(rows))
  for path in folder.iterdir():
    assert pairs(path) == rows, path.name


# CSV


def test_cells_stay_text_and_empty_ones_are_absent(tmp_path):
  path = tmp_path / "a.csv"
  path.write_bytes(
    b"\xef\xbb\xbfinstruction,input,output\r\n\r\n007,,NA\r\n"
    b'"two\nlines",1.50,"say ""x"""\r\nlast,null,3'
  )
  first, second, third = load_records(str(path))
  assert (first.prompt, first.input, first.references) == ("007", "", ("NA",))
  assert (second.prompt, second.input) == ("two\nlines", "1.50")
  assert second.references == ('say "x"',)
  assert third.input == "null"
  assert [r.where for r in (first, second, third)] == [f"{path}:{i}" for i in (3, 4, 6)]


def test_a_cell_may_be_long(tmp_path):
  path = tmp_path / "a.csv"
  path.write_bytes(table([{"text": "x" * 300_000}]))
  assert len(load_records(str(path))[0].text) == 300_000


@pytest.mark.parametrize(
  "content, words",
  [
    ("", "the file is empty"),
    ("\n\n", "the file is empty"),
    ("prompt,completion\n", "holds no records"),
    ("prompt,prompt\na,b\n", ":1: two columns are named 'prompt'"),
    ("prompt,,completion\na,b,c\n", ":1: column 2 has no name"),
    ("prompt,completion\na,b\na\n", ":3: has 1 cells, but the header has 2"),
    ("prompt,completion\na,b,c\n", ":2: has 3 cells, but the header has 2"),
    ('prompt,completion\na,b\na,"b\n', ":3: not a valid row of a table"),
    ('prompt,completion\n"a"x,b\n', ":2: not a valid row of a table"),
    ("prompt,completion\na,\n", ":2: key 'completion' is null"),
  ],
)
def test_bad_tables(content, words, tmp_path):
  path = tmp_path / "a.csv"
  path.write_text(content)
  fails(path, str(path), words)


def test_a_table_that_is_no_utf8(tmp_path):
  path = tmp_path / "a.csv"
  path.write_bytes("text\nok\ncafé\n".encode("latin-1"))
  fails(path, f"{path}:3: not UTF-8")


# JSON


def test_an_object_alone_is_a_row_or_holds_the_rows(tmp_path):
  path = tmp_path / "a.json"
  talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
  for row, kind in [({"messages": talk}, "messages"), (PAIR, "completion")]:
    for indent in (None, 2):
      path.write_text(json.dumps(row, indent=indent))
      assert [record.kind for record in load_records(str(path))] == [kind]
  path.write_text(json.dumps({"data": [PAIR, PAIR]}))
  places = [record.where for record in load_records(str(path))]
  assert places == [f"{path}: record 1", f"{path}: record 2"]
  path.write_text(json.dumps({"data": []}))
  fails(path, "holds no records")
  path.write_text(json.dumps({"train": [PAIR], "test": [PAIR]}))
  fails(path, "no usable keys (found: 'train', 'test')")


def test_keys_of_other_rows_are_not_added(tmp_path):
  """What `datasets` would do, whose rows all have the same keys."""
  path = tmp_path / "a.jsonl"
  path.write_bytes(lines([{"text": "a", "x": {"y": 1}}, {"text": "b", "z": 2}]))
  assert [row for row, _ in read_rows(str(path))][1] == {"text": "b", "z": 2}


# Arrow


def test_rows_whose_keys_differ_come_back_from_datasets_parquet(tmp_path):
  import datasets

  datasets.disable_progress_bars()

  def talk(name, **arguments):
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    final = {"role": "assistant", "content": "", "tool_calls": [call]}
    return {"messages": [{"role": "user", "content": "go"}, final]}

  rows = [talk("f", x=1), talk("g", y="2", z=None)]
  (tmp_path / "a.jsonl").write_bytes(lines(rows))
  data = datasets.load_dataset(
    "json",
    data_files=str(tmp_path / "a.jsonl"),
    split="train",
    cache_dir=str(tmp_path / "cache"),
  )
  data.to_parquet(str(tmp_path / "a.parquet"))
  [own, theirs] = (load_records(str(tmp_path / n)) for n in ("a.jsonl", "a.parquet"))
  assert [r.final for r in own] == [r.final for r in theirs]


def test_nulls_that_structs_add_to_tools_are_absent(tmp_path):
  path = tmp_path / "a.parquet"

  def row(call, **properties):
    function = {"name": "f", "parameters": {"properties": properties, "default": None}}
    talk = [{"role": "user", "content": "a"}]
    talk += [{"role": "assistant", "content": "", "tool_calls": [call]}]
    return {"messages": talk, "tools": [{"type": "function", "function": function}]}

  x = {"id": "1", "function": {"name": "f", "arguments": {"x": 1}}}
  y = {"type": "function", "function": {"arguments": {"y": None}, "name": "f"}}
  parquet(path, [row(x, x={"type": "number"}), row(y, y={"enum": ["a"]})])
  first, second = load_records(str(path))
  assert first.tools == tuple(row(x, x={"type": "number"})["tools"])
  assert second.tools == tuple(row(y, y={"enum": ["a"]})["tools"])
  [call] = first.final["tool_calls"]
  # A null that is passed may be meant.
  passed = {"name": "f", "arguments": {"x": 1, "y": None}}
  assert call == {"id": "1", "function": passed}
  assert "id" not in second.final["tool_calls"][0]


def test_nulls_that_structs_add_to_messages_are_absent(tmp_path):
  path = tmp_path / "a.parquet"
  call = {"function": {"name": "f", "arguments": {"x": 1}}}
  talk = [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [call]}]
  parquet(path, [{"messages": talk, "text": None}, {"text": "t"}])
  first, second = load_records(str(path))
  assert first.messages == (talk[0],) and second.text == "t"
  assert first.final == {"tool_calls": [call]}


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_broken_tables(name, tmp_path):
  path = tmp_path / name
  for content in (b"", b"no such thing", b"ARROW1\0\0"):
    path.write_bytes(content)
    fails(path, f"{path}: cannot be read")
  path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
  fails(path, "git lfs pull")
  write = parquet if name == "a.parquet" else arrow_file
  write(path, ROWS)
  path.write_bytes(path.read_bytes()[:-20])
  fails(path, f"{path}: cannot be read")


# Packed files


@pytest.mark.parametrize("cut", [1, 9, 50])
def test_a_zst_file_that_was_cut_off(cut, tmp_path):
  """The library's own stream reader ends there in silence."""
  path = tmp_path / "a.jsonl.zst"
  content = zstandard.compress(lines([{"text": f"{i * 7919}"} for i in range(30_000)]))
  path.write_bytes(content[:-cut])
  fails(path, f"{path}: cannot be read", "zstd frame")
  path.write_bytes(b"not zstd")
  fails(path, f"{path}: cannot be read")


def test_zst_in_several_frames(tmp_path):
  path = tmp_path / "a.jsonl.zst"
  path.write_bytes(b"".join(zstandard.compress(lines([row])) for row in ROWS))
  assert pairs(path) == ROWS


def test_lines_longer_than_a_piece(tmp_path):
  path = tmp_path / "a.jsonl"
  rows = [{"text": c * n} for c, n in zip("abc", (3_000_000, 5, 1 << 20), strict=True)]
  path.write_bytes(lines(rows))
  assert [row for row, _ in read_rows(str(path))] == rows


# Shards


def test_one_shard_for_each_file_read_as_far_as_asked(tmp_path):
  for name in ("a.jsonl", "a.csv"):
    (tmp_path / name).write_bytes(WRITERS[name](ROWS))
  parts = shards_of([str(tmp_path), "embedded:eval"])
  names = [part.name for part in parts]
  assert names == [f"{tmp_path}/a.csv", f"{tmp_path}/a.jsonl", "embedded:eval"]
  assert next(parts[1].rows()) == (PAIR, f"{tmp_path}/a.jsonl:1")
  (tmp_path / "long.jsonl").write_bytes(lines(ROWS) + b"{broken")
  [part] = shards(f"{tmp_path}/long.jsonl")
  assert list(itertools.islice(part.rows(), 2))  # the third is not looked at


def test_digests_are_of_what_shards_hold(tmp_path):
  import datasets

  datasets.disable_progress_bars()
  for name in ("a.jsonl", "b.jsonl", "c.jsonl"):
    (tmp_path / name).write_bytes(lines(ROWS if name != "c.jsonl" else ROWS[:1]))
  same, also, other = [part.digest() for part in shards(str(tmp_path))]
  assert same == also != other and len(same) == 16
  for folder, rows in (("x", ROWS), ("y", ROWS), ("z", ROWS[:1])):
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / folder)
  same, also, other = [shards(f"{tmp_path}/{x}")[0].digest() for x in "xyz"]
  assert same == also != other
  [train], [held_out] = shards("embedded"), shards("embedded:eval")
  assert train.digest() == shards("embedded:train")[0].digest() != held_out.digest()


def test_every_file_must_hold_records(tmp_path):
  (tmp_path / "a.jsonl").write_bytes(lines(ROWS))
  (tmp_path / "b.json").write_text("[]")
  fails(tmp_path, f"{tmp_path}/b.json: holds no records")


def test_a_folder_of_several_kinds(tmp_path):
  for name in ("train.csv", "train-1.jsonl.zst", "test.tsv"):
    plain = name.removesuffix(".zst").replace("train", "a").replace("test", "a")
    content = WRITERS[plain.replace("-1", "")](ROWS)
    (tmp_path / name).write_bytes(PACKS[".zst" if ".zst" in name else ""](content))
  parquet(tmp_path / "train-2.parquet", ROWS)
  (tmp_path / "README.md").write_text("About.")
  found = [part.name.rpartition("/")[2] for part in shards(str(tmp_path))]
  assert found == ["train-1.jsonl.zst", "train-2.parquet", "train.csv"]
  assert pairs(f"{tmp_path}:test") == ROWS


def test_twins(tmp_path, caplog):
  caplog.set_level("INFO", logger="okd_jax")
  for name in ("a.csv", "a.csv.gz", "a.csv.zst", "b.csv.gz", "b.csv.zst", "c.csv.zst"):
    pack = name.removeprefix(name[:5])
    (tmp_path / name).write_bytes(PACKS[pack](table(ROWS)))
  for spec in (tmp_path, tmp_path / "*.csv*"):
    found = [part.name.rpartition("/")[2] for part in shards(str(spec))]
    assert found == ["a.csv", "b.csv.gz", "c.csv.zst"]
  assert "a.csv.zst stands beside the file without .zst" in caplog.text
  assert "b.csv.zst stands beside its .gz" in caplog.text


def test_patterns(tmp_path, monkeypatch):
  (tmp_path / "deep" / "er").mkdir(parents=True)
  for name in ("b.jsonl", "a.jsonl", "deep/er/c.jsonl", "d[1].jsonl"):
    (tmp_path / name).write_bytes(lines(ROWS))

  def names(pattern):
    found = shards(f"{tmp_path}/{pattern}")
    return [part.name.removeprefix(f"{tmp_path}/") for part in found]

  assert names("[ab].jsonl") == ["a.jsonl", "b.jsonl"]
  assert names("deep/**/*.jsonl") == ["deep/er/c.jsonl"]
  assert names("**/*.jsonl") == ["a.jsonl", "b.jsonl", "d[1].jsonl", "deep/er/c.jsonl"]
  assert names("d[1].jsonl") == ["d[1].jsonl"]  # a file is no pattern
  fails(tmp_path / "*.csv", "no file has a name like that")
  (tmp_path / "notes.md").write_text("x")
  fails(tmp_path / "*", "notes.md: not a known kind of data file")
  monkeypatch.setenv("HOME", str(tmp_path))
  assert [part.name for part in shards("~/deep/*/*")] == [f"{tmp_path}/deep/er/c.jsonl"]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_what_unpacks_to_more_than_memory_is_refused(tmp_path, monkeypatch, suffix):
  monkeypatch.setattr(unpack, "LINE", 1 << 20)
  monkeypatch.setattr(unpack, "WHOLE", 1 << 20)
  pack = PACKS[suffix]
  for name, what in (
    ("a.jsonl", "a line of more than 1 MB"),
    ("a.txt", "more than 1 MB"),
  ):
    path = tmp_path / f"{name}{suffix}"
    path.write_bytes(pack(b"a" * (3 << 20)))
    with pytest.raises(UserError, match=f"{path.name}: has {what}"):
      load_records(str(path))
