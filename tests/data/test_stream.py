"""A corpus that is read as it is asked for: the same batches wherever it is resumed."""

import concurrent.futures
import dataclasses
import gzip
import json
import resource
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from orbax.checkpoint import v1 as ocp

from okd_jax.data import make_tokenizer, stream
from okd_jax.data.position import Position
from okd_jax.data.shard import make_shard
from okd_jax.data.sources import shards_of
from okd_jax.data.stream import BLOCK, Corpus, Stream
from okd_jax.errors import UserError

LENGTH, PAD = 16, 0
BYTES = make_tokenizer("bytes", [])
SMALL = 8  # rows of a block in most tests


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  monkeypatch.setattr(stream, "BLOCK", SMALL)
  monkeypatch.setattr(stream, "_RECORDS", 3)
  # Not in a thread: whatever checks types there draws random numbers of hypothesis's.
  monkeypatch.setattr(Stream, "_read", at_once)


def at_once(self):
  """A block that is made when it is asked for."""
  made = concurrent.futures.Future()
  try:
    made.set_result(next(self._blocks))
  except Exception as error:
    made.set_exception(error)
  return made


def text(i):
  """A text of its own, of every length from 1 to some windows."""
  return chr(97 + i % 26) * (1 + 7 * i % 53)


def shard_of(name, texts):
  rows = [({"text": t}, f"{name}:{i}") for i, t in enumerate(texts, 1)]
  return make_shard(name, lambda: rows, lambda: name)


def corpus(sizes=(5, 3, 7), seed=3, **changes):
  texts = iter(range(1000))
  shards = [
    shard_of(f"s{i}", [text(next(texts)) for _ in range(size)])
    for i, size in enumerate(sizes)
  ]
  changes = {"length": LENGTH, "seed": seed, "sizes": {}} | changes
  return Corpus(shards, BYTES, **changes)


def batches(source, size=4, **options):
  return Stream(source, batch_size=size, pad_id=PAD, **options)


def same(one, other):
  assert one.keys() == other.keys()
  for name, value in one.items():
    np.testing.assert_array_equal(value, other[name])
    assert value.dtype == other[name].dtype
  return True


def take(loader, count):
  return [next(loader) for _ in range(count)]


def texts_of(batch):
  """The texts' tokens of each row."""
  for tokens, labels, segments in zip(
    batch["tokens"], batch["labels"], batch["segment_ids"], strict=True
  ):
    for segment in range(1, segments.max() + 1):
      at = np.flatnonzero(segments == segment)
      assert (np.diff(at) == 1).all()
      yield [int(tokens[at[0]]), *labels[at].tolist()]


def test_an_epoch_holds_every_token_once():
  """Cut in windows of a row's length, each text's end behind it."""
  source = corpus((4,))
  texts = [text(i) for i in range(4)]
  wanted = [BYTES(t)["input_ids"] + [BYTES.eos_token_id] for t in texts]
  windows = sorted(t[i : i + LENGTH] for t in wanted for i in range(0, len(t), LENGTH))
  windows = [w for w in windows if len(w) > 1]
  pieces = source._pieces(stream.Place())
  found = [next(pieces) for _ in range(2 * len(windows))]
  for epoch in (0, 1):
    mine = [e.tokens.tolist() for e, place in found if place.epoch == epoch]
    assert sorted(mine) == windows


def test_rows_are_those_of_packing():
  for batch in take(batches(corpus()), 12):
    assert {n: (a.shape, str(a.dtype)) for n, a in batch.items()} == {
      "tokens": ((4, LENGTH), "int32"),
      "labels": ((4, LENGTH), "int32"),
      "mask": ((4, LENGTH), "bool"),
      "segment_ids": ((4, LENGTH), "int32"),
      "row": ((4,), "int64"),
      "all_rows": ((4,), "int64"),
    }
    assert (batch["mask"] == (batch["segment_ids"] > 0)).all()
    for ids in texts_of(batch):
      assert len(set(ids) - {BYTES.eos_token_id}) == 1  # nobody else's tokens


def test_short_texts_share_rows_and_little_is_padding():
  source = Corpus([shard_of("s", ["abcd"] * 50)], BYTES, LENGTH, 0, {})
  found = take(batches(source), 4)
  segments = np.concatenate([batch["segment_ids"] for batch in found])
  assert (segments.max(1) == 4).all() and (segments > 0).mean() == 1


def test_rows_of_a_block_are_shuffled_and_no_others():
  found = np.concatenate([batch["row"] for batch in take(batches(corpus()), 6)])
  for i, block in enumerate(found.reshape(3, SMALL)):
    assert sorted(block) == list(range(i * SMALL, (i + 1) * SMALL))
    assert block.tolist() != sorted(block)
  other = np.concatenate([b["row"] for b in take(batches(corpus(seed=4)), 6)])
  assert found.tolist() != other.tolist()


def test_each_epoch_has_its_own_order_of_shards():
  source = corpus((2,) * 9)
  pieces, orders = source._pieces(stream.Place()), {}
  for example, place in pieces:
    if place.epoch == 3:
      break
    seen = orders.setdefault(place.epoch, [])
    name = example.where.split(":")[0]
    seen.append(name) if name not in seen else None
  assert len({tuple(order) for order in orders.values()}) == 3
  assert all(sorted(order) == sorted(orders[0]) for order in orders.values())


@settings(max_examples=15, deadline=None)
@given(
  stop=st.integers(0, 30),
  size=st.sampled_from([1, 2, 3, 5, 8, 11]),
  sizes=st.lists(st.integers(1, 6), min_size=1, max_size=4),
  before=st.integers(0, 3),
)
def test_resumed_anywhere_the_batches_are_the_same(stop, size, sizes, before):
  """Inside a block, at its end, inside a text of many rows, at an epoch's end."""
  loader = batches(corpus(tuple(sizes)), size)
  take(loader, stop)
  state = json.loads(json.dumps(loader.get_state()))
  wanted = take(loader, 12)
  again = batches(corpus(tuple(sizes)), size)
  take(again, before)  # wherever it was
  again.set_state(state)
  assert all(map(same, take(again, 12), wanted))
  assert again.get_state() == loader.get_state()


def test_what_was_read_before_the_block_is_not_tokenised_again(monkeypatch):
  source, seen = corpus((40,)), []
  loader = batches(source)
  take(loader, 9)
  state, plain = loader.get_state(), Corpus._record
  monkeypatch.setattr(
    Corpus, "_record", lambda self, row, w: seen.append(w) or plain(self, row, w)
  )
  again = batches(source)
  again.set_state(state)
  next(again)
  first = min(int(where.split(":")[1]) for where in seen)
  assert state["begin"]["place"]["record"] > 5
  assert first == state["begin"]["place"]["record"] + 1


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_see_together_what_one_sees(processes):
  alone = take(batches(corpus()), 9)
  shards = [
    take(batches(corpus(), own=own), 9) for own in np.split(np.arange(4), processes)
  ]
  for whole, *parts in zip(alone, *shards, strict=True):
    for part in parts:
      np.testing.assert_array_equal(part.pop("all_rows"), whole["all_rows"])
    del whole["all_rows"]
    assert same(whole, {k: np.concatenate([p[k] for p in parts]) for k in whole})


def test_orbax_saves_the_position(tmp_path):
  loader = batches(corpus())
  take(loader, 5)
  ocp.save_checkpointables(tmp_path / "c", {"data": Position(loader)})
  again = batches(corpus())
  ocp.load_checkpointables(tmp_path / "c", {"data": Position(again)})
  assert all(map(same, take(again, 7), take(loader, 7)))


def test_files_of_all_kinds(tmp_path):
  """The same texts in whatever they lie in."""
  lines = [json.dumps({"text": text(i)}) + "\n" for i in range(20)]
  raw = "".join(lines).encode()
  (tmp_path / "a.jsonl").write_bytes(raw)
  (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(raw))
  (tmp_path / "c.jsonl.zst").write_bytes(zstandard.compress(raw))
  table = pa.table({"text": [text(i) for i in range(20)]})
  pyarrow.parquet.write_table(table, tmp_path / "d.parquet")
  found = [
    take(batches(Corpus(shards_of(str(path)), BYTES, LENGTH, 0, {})), 20)
    for path in sorted(tmp_path.iterdir())
  ]
  assert len(found) == 4
  for other in found[1:]:
    assert all(map(same, found[0], other))
  whole = Corpus(shards_of(f"{tmp_path}/*"), BYTES, LENGTH, 0, {})
  assert len(whole.shards) == 4 and batches(whole).shards == 4


def test_the_digest_is_of_names_and_sizes(tmp_path):
  path = tmp_path / "a.jsonl"
  path.write_text('{"text": "abc"}\n')
  digest = lambda: Corpus(shards_of(str(path)), BYTES, 8, 0, {}).digest  # noqa: E731
  before = digest()
  path.write_text('{"text": "abd"}\n')
  assert digest() == before
  path.write_text('{"text": "abcd"}\n')
  assert digest() != before


@pytest.mark.parametrize(
  "line, message",
  [
    ('{"text": ""}', r"b.jsonl:12: 'text' is empty"),
    ("{", r"b.jsonl:12: not valid JSON"),
    ('{"prompt": "a", "completion": "b"}', r"b.jsonl:12: data.stream reads plain"),
  ],
)
def test_bad_rows_are_named(line, message, tmp_path):
  path = tmp_path / "b.jsonl"
  path.write_text('{"text": "words"}\n' * 11 + line + "\n")
  loader = batches(Corpus(shards_of(str(path)), BYTES, LENGTH, 0, {}))
  with pytest.raises(UserError, match=message):
    take(loader, 9)


def test_tokens_that_a_model_lacks_are_told_of():
  source = dataclasses.replace(corpus(), sizes={"student": 100})
  loader = batches(source)
  with pytest.raises(UserError, match="data holds token id 256, but student has only"):
    next(loader)


def test_rows_say_where_they_come_from():
  loader = batches(corpus())
  for _ in range(20):
    assert all(":" in loader.where(int(row)) for row in next(loader)["row"])
  assert loader.where(0) == "row 0 of the stream"  # long ago


def test_columns_by_other_names():
  shard = make_shard("s", lambda: [({"body": "words"}, "s:1")], lambda: "s")
  source = Corpus([shard], BYTES, LENGTH, 0, {}, renames={"text": "body"})
  assert next(batches(source))["mask"].any()


def test_hub_sets_are_read_in_shards(monkeypatch, tmp_path):
  import datasets
  import huggingface_hub

  for i in range(3):
    (tmp_path / f"{i}.jsonl").write_text(json.dumps({"text": text(i)}) + "\n")
  asked = []

  def load_dataset(path, name=None, split=None, **options):
    asked.append((path, split, options))
    files = sorted(map(str, tmp_path.glob("*.jsonl")))
    return plain("json", data_files=files, split="train", **options)

  plain = datasets.load_dataset
  monkeypatch.setattr(datasets, "load_dataset", load_dataset)
  monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *a, **k: None)
  shards = shards_of("org/set", streamed=True)
  assert asked == [("org/set", "train", {"streaming": True})]
  assert [s.name for s in shards] == [
    f"org/set:train shard {i} of 3" for i in (1, 2, 3)
  ]
  assert [[row["text"] for row, _ in s.rows()] for s in shards] == [
    [text(i)] for i in range(3)
  ]
  assert take(batches(Corpus(shards, BYTES, LENGTH, 0, {})), 3)


GROWTH = """
import itertools, resource, sys
from okd_jax.data import make_tokenizer
from okd_jax.data.shard import make_shard
from okd_jax.data.stream import Corpus, Stream

def rows():
  for i in itertools.count():
    yield {"text": f"{i} " * 200}, f"s:{i}"

source = Corpus([make_shard("s", rows, str)], make_tokenizer("bytes", []), 512, 0, {})
loader = Stream(source, batch_size=64, pad_id=0)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
for _ in range(64): next(loader)
before = peak()
for _ in range(int(sys.argv[1])): next(loader)
print(peak() - before)
"""


def test_memory_does_not_grow():
  """Of 12,000 rows after 4,000 as little is kept as of these."""
  assert BLOCK == 1024 and resource.RUSAGE_SELF == 0
  done = subprocess.run(
    [sys.executable, "-c", GROWTH, "192"], capture_output=True, text=True, check=False
  )
  assert not done.returncode, done.stderr
  assert float(done.stdout) < 30
