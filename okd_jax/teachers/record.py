"""A teacher cache: what a teacher says about the rows of a run, written to disk."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from okd_jax.config.schema import Settings
from okd_jax.data import Example
from okd_jax.data.batch import Batch
from okd_jax.losses import stored
from okd_jax.models import Decoder, output
from okd_jax.teachers import load, precompute, store


def write(
  parts: Mapping[str, Sequence[Example]],
  teacher: Decoder,
  frozen: PyTree,
  settings: Settings,
  mesh: Mesh,
  folder: Path,
  *,
  k: int,
  dtype: str,
  vocab_size: int,
  heard: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> dict[str, store.Store]:
  """Stores the teacher's top k for every row, or what is missing of it.

  Every process calls it; each writes the rows that its devices computed.

  Args:
    parts: rows by part, 'train' and, if any are held out, 'eval'.
    frozen: the teacher's parameters.
    k: tokens kept a position, 0 for all of them; dtype: of the log-probabilities.
    vocab_size: ids that both models have; heard: as in `precompute.fill`.

  Returns:
    The stores by part, each a folder of that name in `folder`.
  """
  k, kept = min(k or vocab_size, vocab_size), {}
  record = _recorder(teacher, settings, k, dtype, vocab_size)
  made_by = {"k": k, "dtype": dtype, "vocab_size": vocab_size} | load.dtypes(settings)
  how = {"length": settings.data.form.teacher_length, "heard": heard}
  how["batch_size"] = settings.eval.batch_size
  for part, examples in parts.items():
    about = load.stored_key(settings, examples) | made_by
    kept[part] = store.begin(folder / part, len(examples), about)
    precompute.fill(
      examples, kept[part], record, "mask", frozen=frozen, mesh=mesh, **how
    )
  return kept


def _recorder(
  teacher: Decoder, settings: Settings, k: int, dtype: str, vocab_size: int
) -> Callable[[PyTree, Batch], dict[str, Array]]:
  def record(frozen: PyTree, batch: Batch) -> dict[str, Array]:
    """What the teacher of these weights says about a batch (`stored.record`)."""
    return stored.record(
      output(teacher, {"params": frozen}, batch),
      batch.labels,
      k=k,
      temperature=settings.method.temperature,
      dtype=jnp.dtype(dtype),
      vocab_size=vocab_size,
      chunk=settings.train.loss_chunk,
    )

  return record
