"""How active a teacher's heads and MLP channels are on some rows of training text.

What a narrower student is cut out by (`student.width`), found once and kept in a file.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from okd_jax.data.batch import Batch
from okd_jax.errors import UserError
from okd_jax.models import Decoder, Kept
from okd_jax.runtime.files import read_json
from okd_jax.runtime.sharding import batch_sharding, spread
from okd_jax.runtime.workdir import Workdir

_PROJECTIONS = ("attention", "out"), ("mlp", "down")


def mean_squares(
  decoder: Decoder, params: Mapping[str, Any], batches: Iterable[Batch], mesh: Mesh
) -> dict[str, Float[np.ndarray, "N F"]]:
  """Mean squares over all real tokens of what enters each layer's 'out' and 'down'.

  Args:
    batches: whole batches, the same in every process.
  """

  def sums(params: Mapping[str, Any], batch: Batch) -> dict[str, Float[Array, "N F"]]:
    _, seen = decoder.apply(
      {"params": params}, batch.tokens, batch.segment_ids, mutable=["intermediates"]
    )
    [[layers]] = seen["intermediates"].values()
    return {name: layers[part][f"into_{name}"][0] for part, name in _PROJECTIONS}

  step = jax.jit(sums, out_shardings=NamedSharding(mesh, PartitionSpec()))
  totals, tokens = {}, 0
  for batch in batches:
    tokens += int(np.sum(batch.segment_ids != 0))
    rows = spread(batch, batch_sharding(mesh))
    found = {k: np.asarray(v, np.float64) for k, v in step(params, rows).items()}
    totals = {k: v + totals.get(k, 0.0) for k, v in found.items()}
  return {name: total / max(tokens, 1) for name, total in totals.items()}


def write(path: Path, kept: Kept) -> None:
  """Keeps the choice for a run that resumes; process 0 alone writes."""
  raw = {name: value.tolist() for name, value in kept._asdict().items()}
  Workdir(path.parent).write_json(path.name, raw)


def read(path: Path) -> Kept | None:
  """The choice that `write` kept, None if there is none.

  Raises:
    UserError: if the file is damaged: another choice would not fit what is trained.
  """
  if not path.exists():
    return None
  try:
    raw = read_json(path)
    return Kept(*(np.array(raw[name], np.int64) for name in Kept._fields))
  except (KeyError, TypeError, ValueError, UserError) as error:
    raise UserError(f"{path} is damaged ({error}); name another workdir") from error
