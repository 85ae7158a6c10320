"""Whatever a frozen teacher gives for the data of a run, computed once and kept."""

import functools
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from okd_jax.data import PAD_ID, Example, pad_row
from okd_jax.data.batch import Batch
from okd_jax.data.rows import column
from okd_jax.runtime import sharding
from okd_jax.runtime.workdir import barrier
from okd_jax.teachers.store import Memory, Store

_BATCHES = 8  # whose rows are written at once
_log = logging.getLogger("okd_jax")


def fill(
  examples: Sequence[Example],
  kept: Store | Memory,
  compute: Callable[[Any, Batch], dict],
  where: str,
  *,
  frozen: Any,
  mesh: Mesh,
  length: int,
  batch_size: int,
  heard: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> None:
  """Computes those rows of `examples` that `kept` lacks.

  Every process calls it; each keeps the rows that its own devices computed. Rows are
  always computed in the same company, so that it does not matter where a run was cut.

  compute: (frozen, batch) -> {name: [B, L, ...]}.
  where: the array of a batch that is true, or above 0, where a row has values.
  frozen: the teacher's parameters, on `mesh`.
  length: of a row; batch_size: rows at once, rounded up to what the mesh splits.
  heard: what the batches pass through; it may raise before any of them.
  """
  todo, total = set(kept.missing()), len(examples)
  barrier("listed")  # before anyone writes, so that all agree on what is missing
  if not todo:
    return
  size, by_rows = sharding.whole_rows(batch_size, mesh), sharding.batch_sharding(mesh)
  compute = functools.partial(jax.jit(compute, out_shardings=by_rows), frozen)
  with _bar(total, total - len(todo)) as bar:
    for first in range(0, total, _BATCHES * size):
      rows = range(first, min(first + _BATCHES * size, total))
      if missing := todo.intersection(rows):
        own = _compute_rows(examples, compute, where, rows, size, length, mesh, heard)
        if new := {row: own[row] for row in sorted(own) if row in missing}:
          kept.write(list(new), list(new.values()))
        bar.update(len(missing))
  barrier("computed")
  kept.reload()
  _log_size(examples, kept)


def _bar(total: int, done: int) -> tqdm:
  hidden = not sys.stderr.isatty()
  return tqdm(total=total, initial=done, unit="row", desc="teacher", disable=hidden)


def _log_size(examples: Sequence[Example], kept: Store | Memory) -> None:
  tokens = int((column(examples, "length") - 1).sum())
  _log.info(
    "%s: %d rows, %.1f MB, %.0f bytes per token",
    kept.name,
    len(examples),
    kept.bytes / 1e6,
    kept.bytes / max(tokens, 1),
  )


def _compute_rows(
  examples: Sequence[Example],
  compute: Callable[[Batch], dict],
  where: str,
  rows: range,
  size: int,
  length: int,
  mesh: Mesh,
  heard: Callable[[Iterable[Any]], Iterable[Any]],
) -> dict[int, dict]:
  """{row: its arrays} of those rows that this process computed."""
  own = {}
  for first in heard(range(rows.start, rows.stop, size)):
    mine = first + sharding.own_rows(size, mesh)
    # The last batch is filled up with its last row, which is nobody's twice.
    # As the teacher reads them: the same answers, after its own prompts.
    real = [examples[min(row, rows.stop - 1)].for_teacher() for row in mine]
    padded = [pad_row(example, length, PAD_ID) for example in real]
    arrays = {name: np.stack([row[name] for row in padded]) for name in padded[0]}
    valid = dict(zip(mine.tolist(), arrays[where] > 0, strict=True))
    values = compute(sharding.put_batch(Batch.of(arrays), mesh))
    for name, array in values.items():
      for i, value in _first_copies(array):
        if (row := first + i) < rows.stop:
          own.setdefault(row, {})[name] = value[valid[row]]
  return own


def _first_copies(array: jax.Array) -> Iterator[tuple[int, np.ndarray]]:
  """(number, value) of the rows of which this process holds the first copy."""
  for shard in array.addressable_shards:
    if shard.replica_id == 0:
      yield from enumerate(np.asarray(shard.data), shard.index[0].start or 0)
