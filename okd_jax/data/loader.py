"""Batches: an endless shuffled stream to train on, one plain pass to evaluate with."""

from collections.abc import Callable, Iterator, Sequence

import grain
import numpy as np
from jaxtyping import Int

from okd_jax.data.example import Example
from okd_jax.data.pack import Packs, whole_row

Batch = dict[str, np.ndarray]


def train_loader(
  examples: Sequence[Example],
  *,
  batch_size: int,
  length: int,
  pad_id: int,
  seed: int,
  packs: Sequence[tuple[int, ...]] | None = None,
  teacher_length: int = 0,
  own: Int[np.ndarray, " M"] | None = None,
) -> grain.DatasetIterator:
  """Endless shuffled batches, of which this process makes its rows.

  Global batch n is the same for any number of processes; the state is one number.

  Args:
    batch_size: B of all processes; length, pad_id, teacher_length: as in `whole_row`.
    seed: any integer from 0 to 2^32 - 1.
    packs: which of `examples` share a row (`pack`); None: each has its own.
    own: which rows of a batch are this process's (`sharding.own_rows`); None: all.

  Returns:
    Stacked `whole_row`s [M, L], `row` [M] and `all_rows` [B], indices into `packs`.

  Raises:
    ValueError: without examples, or for a batch size below 1.

  >>> texts = [Example(np.arange(3), 1, (), "here")] * 4
  >>> batch = next(train_loader(texts, batch_size=4, length=3, pad_id=0, seed=0))
  >>> sorted(batch["row"].tolist())
  [0, 1, 2, 3]
  """
  packs = _checked(examples, packs, batch_size)

  def make(rows: Int[np.ndarray, " B"]) -> Batch:
    mine = rows if own is None else rows[own]
    batch = _batch(examples, packs, mine, length, pad_id, teacher_length)
    return batch | {"all_rows": np.asarray(rows, np.int32)}

  return _stream(len(packs), batch_size, seed, make)


def eval_batches(
  examples: Sequence[Example],
  *,
  batch_size: int,
  length: int,
  pad_id: int,
  teacher_length: int = 0,
) -> Iterator[Batch]:
  """All examples once and in order, in batches of one size.

  Args:
    batch_size: rows of each batch.
    length, pad_id, teacher_length: of the rows, as in `whole_row`.

  Returns:
    An iterator over batches as `train_loader` has them, [B, L]. The last one is filled
    up with rows that count for nothing: `segment_ids` 0, `mask` false, `row` -1.

  Raises:
    ValueError: when it comes to a text that does not fit.

  >>> texts = [Example(np.array([5, 6, 7], np.int32), 1, (), "here")] * 3
  >>> [b["row"].tolist() for b in eval_batches(texts, batch_size=2, length=3, pad_id=0)]
  [[0, 1], [2, -1]]
  """
  packs = each_alone(examples)
  for start in range(0, len(examples), batch_size):
    rows = np.arange(start, min(start + batch_size, len(examples)))
    batch = _batch(examples, packs, rows, length, pad_id, teacher_length)
    yield _filled(batch, batch_size, pad_id)


def each_alone(examples: Sequence[Example]) -> Packs:
  """The packs of rows with one text each."""
  return Packs.alone(len(examples))


def _checked(
  examples: Sequence[Example],
  packs: Sequence[tuple[int, ...]] | None,
  batch_size: int,
) -> Sequence[tuple[int, ...]]:
  """The packs, if there can be batches of them."""
  if not examples:
    raise ValueError("there are no examples to train on")
  if batch_size < 1:
    raise ValueError(f"batch size {batch_size} is none")
  return packs or each_alone(examples)


def _stream(
  count: int,
  batch_size: int,
  seed: int,
  make: Callable[[Int[np.ndarray, " B"]], Batch],
) -> grain.DatasetIterator:
  """Batches made of `count` rows' numbers, shuffled, without an end.

  Every epoch has an order of its own in which each row comes once; epochs follow each
  other without a gap, so a batch may hold the end of one and the start of the next,
  nothing is left over, and a dataset may be smaller than a batch. The position is one
  number.
  """
  # As good as endless; grain's own endless repetition overflows in batches of one row.
  epochs = 2**40 // count + 1
  order = grain.MapDataset.range(count).seed(seed).shuffle().repeat(epochs)
  # No threads: rows are in memory already, and nothing is ahead of the state.
  options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
  return iter(order.batch(batch_size).map(make).to_iter_dataset(options))


def _batch(
  examples: Sequence[Example],
  packs: Sequence[tuple[int, ...]],
  rows: Int[np.ndarray, " B"],
  length: int,
  pad_id: int,
  teacher_length: int,
) -> Batch:
  texts = [[examples[index] for index in packs[row]] for row in rows]
  padded = [whole_row(row, length, pad_id, teacher_length) for row in texts]
  batch = {name: np.stack([row[name] for row in padded]) for name in padded[0]}
  return batch | {"row": np.asarray(rows, np.int32)}


def _filled(batch: Batch, batch_size: int, pad_id: int) -> Batch:
  missing = batch_size - len(batch["row"])
  filler = {"tokens": pad_id, "labels": pad_id, "teacher_tokens": pad_id, "row": -1}
  return {
    name: np.concatenate(
      [value, np.full((missing, *value.shape[1:]), filler.get(name, 0), value.dtype)]
    )
    for name, value in batch.items()
  }
