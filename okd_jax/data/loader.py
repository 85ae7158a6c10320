"""Batches: an endless shuffled stream to train on, one plain pass to evaluate with."""

from collections.abc import Iterator, Sequence

import grain
import numpy as np

from okd_jax.data.encode import Example
from okd_jax.data.pack import pack_row

Batch = dict[str, np.ndarray]


def train_loader(
  examples: Sequence[Example],
  *,
  batch_size: int,
  length: int,
  pad_id: int,
  seed: int,
  packs: Sequence[tuple[int, ...]] | None = None,
  process_index: int = 0,
  process_count: int = 1,
) -> grain.DatasetIterator:
  """An endless iterator over shuffled batches of this process's rows.

  Every epoch has an order of its own in which each row comes once; epochs follow
  each other without a gap, so a batch may hold the end of one and the start of the
  next, nothing is left over, and a dataset may be smaller than a batch. Global batch
  n has the same rows in the same order for any number of processes; each takes its
  slice of it. The position of the stream is one number: `get_state` and `set_state`
  continue at exactly the next batch.

  Args:
    batch_size: the global one; process i yields rows i * B / P to (i + 1) * B / P.
    seed: any integer from 0 to 2^32 - 1.
    packs: which of `examples` share a row (`pack`); None gives each a row of its own.

  Yields:
    What `pack_row` gives, stacked to [B / P, L], and `row` int32 [B / P], the index
    into `packs`, or into `examples`.
  """
  if not examples:
    raise ValueError("there are no examples to train on")
  if batch_size < 1 or batch_size % process_count:
    raise ValueError(
      f"batch size {batch_size} cannot be divided among {process_count} processes"
    )
  packs = packs or each_alone(examples)
  share = batch_size // process_count
  mine = slice(process_index * share, (process_index + 1) * share)
  # As good as endless; grain's own endless repetition overflows in batches of one row.
  epochs = 2**40 // len(packs) + 1
  order = grain.MapDataset.range(len(packs)).seed(seed).shuffle().repeat(epochs)
  batches = order.batch(batch_size).map(
    lambda rows: _batch(examples, packs, rows[mine], length, pad_id)
  )
  # No threads: rows are in memory already, and nothing is ahead of the state.
  options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
  return iter(batches.to_iter_dataset(options))


def eval_batches(
  examples: Sequence[Example], *, batch_size: int, length: int, pad_id: int
) -> Iterator[Batch]:
  """All examples once and in order, in batches of one size.

  The last batch is filled up with rows that count for nothing: `segment_ids` 0,
  `mask` false, `row` -1.
  """
  packs = each_alone(examples)
  for start in range(0, len(examples), batch_size):
    rows = np.arange(start, min(start + batch_size, len(examples)))
    batch = _batch(examples, packs, rows, length, pad_id)
    yield _filled(batch, batch_size, pad_id)


def each_alone(examples: Sequence[Example]) -> list[tuple[int, ...]]:
  """The packs of rows with one text each."""
  return [(index,) for index in range(len(examples))]


def _batch(
  examples: Sequence[Example],
  packs: Sequence[tuple[int, ...]],
  rows: np.ndarray,
  length: int,
  pad_id: int,
) -> Batch:
  texts = [[examples[index] for index in packs[row]] for row in rows]
  padded = [pack_row(row, length, pad_id) for row in texts]
  batch = {name: np.stack([row[name] for row in padded]) for name in padded[0]}
  return batch | {"row": np.asarray(rows, np.int32)}


def _filled(batch: Batch, batch_size: int, pad_id: int) -> Batch:
  missing = batch_size - len(batch["row"])
  filler = {"tokens": pad_id, "labels": pad_id, "mask": False, "segment_ids": 0}
  filler["row"] = -1
  return {
    name: np.concatenate(
      [value, np.full((missing, *value.shape[1:]), filler[name], value.dtype)]
    )
    for name, value in batch.items()
  }
