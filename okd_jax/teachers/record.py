"""What a teacher says about the rows of a run, written to disk."""

from pathlib import Path

import jax
import jax.numpy as jnp

from okd_jax.methods import Models, stored
from okd_jax.models import output
from okd_jax.teachers import load as teachers
from okd_jax.teachers import precompute, store


def write(run, folder: Path, k: int, dtype: str) -> dict[str, store.Store]:
  """Stores the teacher's top k for every row of the run, or what is missing of it.

  Every process calls it; each writes the rows that its devices computed.

  Returns:
    The stores by part: 'train' and, if the run holds out any rows, 'eval'.
  """
  size = min(run.decoders[role].config.vocab_size for role in ("student", "teacher"))
  decoder, temperature = run.decoders["teacher"], run.config.method.temperature
  models = Models(None, None, None, run.config.train.loss_chunk, vocab_size=size)
  k = min(k or size, size)

  @jax.jit
  def record(frozen, batch):
    out = output(decoder, {"params": frozen}, batch)
    labels, kind = batch["labels"], jnp.dtype(dtype)
    return stored.record(models, out, labels, k, temperature, kind)

  parts = {"train": run.train} | ({"eval": run.eval} if run.eval else {})
  kept = {}
  for part, examples in parts.items():
    about = teachers.stored_key(run.config, examples)
    about |= {"k": k, "dtype": dtype, "vocab_size": size} | teachers.dtypes(run.config)
    where = folder / part
    if jax.process_index() == 0:
      store.begin(where, len(examples), about)
    precompute.barrier(f"{part} begun")
    kept[part] = store.Store(where, len(examples), about)
    precompute.fill(run, examples, kept[part], record, "mask")
  return kept
