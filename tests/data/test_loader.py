"""The stream of batches: order, epochs, processes, and restarting it."""

import json

import grain
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from okd_jax.data import Example, eval_batches, pad_row, train_loader
from okd_jax.data.position import Position

LENGTH, PAD = 8, 0


def make_examples(count):
  return [
    Example(np.arange(i, i + 3 + i % 4, dtype=np.int32), 1 + i % 2, (), f"f:{i}")
    for i in range(count)
  ]


def loader(count=10, batch_size=4, seed=3, **options):
  return train_loader(
    make_examples(count),
    batch_size=batch_size,
    length=LENGTH,
    pad_id=PAD,
    seed=seed,
    **options,
  )


def take(iterator, count):
  return [next(iterator)["row"].tolist() for _ in range(count)]


def test_batches_are_padded_rows():
  examples = make_examples(10)
  batch = next(loader())
  assert {name: (a.shape, str(a.dtype)) for name, a in batch.items()} == {
    "tokens": ((4, LENGTH), "int32"),
    "labels": ((4, LENGTH), "int32"),
    "mask": ((4, LENGTH), "bool"),
    "segment_ids": ((4, LENGTH), "int32"),
    "row": ((4,), "int32"),
    "all_rows": ((4,), "int32"),
  }
  for i, row in enumerate(batch["row"]):
    for name, value in pad_row(examples[row], LENGTH, PAD).items():
      np.testing.assert_array_equal(batch[name][i], value)


def test_epochs_follow_without_a_gap():
  # 10 rows in batches of 4: 5 batches are 2 epochs, the third of them in both.
  rows = np.concatenate(take(loader(), 10)).reshape(4, 10)
  for epoch in rows:
    assert sorted(epoch.tolist()) == list(range(10))
  assert len({tuple(epoch) for epoch in rows.tolist()}) == 4  # each in its own order


def test_the_seed_decides_the_order():
  assert take(loader(seed=3), 6) == take(loader(seed=3), 6)
  assert take(loader(seed=3), 6) != take(loader(seed=4), 6)


@pytest.mark.parametrize("count, batch_size", [(3, 8), (1, 4), (5, 5)])
def test_a_dataset_no_larger_than_a_batch(count, batch_size):
  rows = np.concatenate(take(loader(count, batch_size), 6))
  for start in range(0, len(rows) - count + 1, count):
    assert sorted(rows[start : start + count].tolist()) == list(range(count))


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 5, 7])  # 10 rows: 2.5 batches an epoch
def test_restarting_at_the_exact_next_batch(steps):
  iterator = loader()
  take(iterator, steps)
  state = json.loads(json.dumps(iterator.get_state()))
  expected = [next(iterator) for _ in range(6)]
  restarted = loader()
  take(restarted, 1)  # wherever it was before
  restarted.set_state(state)
  for batch in expected:
    for name, value in next(restarted).items():
      np.testing.assert_array_equal(value, batch[name])


def test_orbax_reads_positions_as_grain_itself_saves_them(tmp_path):
  """Runs that were begun so go on, on any number of processes."""
  iterator = loader()
  take(iterator, 4)
  ocp.save_checkpointables(tmp_path / "c", {"data": iterator})
  [file] = (tmp_path / "c/data").glob("process_*.json")
  file.rename(file.with_name("process_1-of-2.json"))
  restarted = loader()
  ocp.load_checkpointables(tmp_path / "c", {"data": Position(restarted)})
  assert take(restarted, 5) == take(iterator, 5)


def test_orbax_saves_the_position(tmp_path):
  iterator = loader()
  take(iterator, 4)
  ocp.save_checkpointables(tmp_path / "c", {"data": Position(iterator)})
  restarted = loader()
  ocp.load_checkpointables(tmp_path / "c", {"data": Position(restarted)})
  assert isinstance(restarted, grain.DatasetIterator)
  assert take(restarted, 5) == take(iterator, 5)


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_global_batch(processes):
  """Any number of processes sees the very batches that one does."""
  parts = np.split(np.arange(4), processes)
  shards = [take(loader(own=own), 7) for own in parts]
  assert all(len(rows) == 4 // processes for shard in shards for rows in shard)
  together = [sum(rows, []) for rows in zip(*shards, strict=True)]
  assert together == take(loader(), 7)
  flat = [set(sum(shard[:2], [])) for shard in shards]  # within the first epoch
  assert sum(map(len, flat)) == len(set.union(*flat)) == 8


def test_a_position_moves_to_another_number_of_processes():
  alone = loader()
  take(alone, 3)
  second = loader(own=np.array([2, 3]))
  second.set_state(alone.get_state())
  assert take(second, 3) == [rows[2:] for rows in take(alone, 3)]


def test_what_cannot_be_loaded():
  with pytest.raises(ValueError, match="no examples"):
    loader(count=0)
  with pytest.raises(ValueError, match="batch size 0"):
    loader(batch_size=0)


def test_eval_batches_cover_everything_once():
  examples = make_examples(10)
  batches = list(eval_batches(examples, batch_size=4, length=LENGTH, pad_id=5))
  rows = np.concatenate([batch["row"] for batch in batches])
  assert rows.tolist() == [*range(10), -1, -1]
  assert all(batch["tokens"].shape == (4, LENGTH) for batch in batches)
  assert {n: str(a.dtype) for n, a in batches[-1].items()} == {
    n: str(a.dtype) for n, a in next(loader()).items() if n != "all_rows"
  }
  last = batches[-1]
  assert not last["mask"][2:].any() and not last["segment_ids"][2:].any()
  assert (last["tokens"][2:] == 5).all() and (last["labels"][2:] == 5).all()
  assert last["mask"][:2].any(axis=1).all()


def test_eval_batches_of_nothing():
  assert list(eval_batches([], batch_size=4, length=LENGTH, pad_id=PAD)) == []
