"""Which of a teacher's own blocks are to learn: those its loss depends on least.

The choice of `adapter.kind=blocks` (`methods.clda`), made once and kept in a file.
"""

import dataclasses
import functools
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from okd_jax.data.batch import Batch
from okd_jax.errors import UserError
from okd_jax.losses import cross_entropy, weighted_sums
from okd_jax.models import Decoder, output
from okd_jax.runtime.files import read_json
from okd_jax.runtime.sharding import batch_sharding, shardings, spread
from okd_jax.runtime.workdir import Workdir

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Choice:
  """Saliency by block, from the lowest layer up, and the blocks that are to learn."""

  share: float
  blocks: tuple[int, ...]
  saliency: tuple[float, ...]


def choose(saliency: Iterable[float], share: float) -> Choice:
  """The least salient `share` of the blocks, rounded, at least one; ties: the lowest.

  Raises:
    UserError: if a saliency is not finite.
  """
  saliency = tuple(map(float, saliency))
  if not np.isfinite(saliency).all():
    raise UserError(
      "the teacher's saliency is not finite, so no blocks can be chosen: its loss on "
      "the evaluation rows or that loss's gradient overflows"
    )
  count = max(1, int(share * len(saliency) + 0.5))
  order = sorted(range(len(saliency)), key=saliency.__getitem__)
  chosen = Choice(share, tuple(sorted(order[:count])), saliency)
  _log.info(
    "blocks %s of the teacher are to learn; saliency by block: %s",
    list(chosen.blocks),
    ", ".join(f"{value:.3g}" for value in saliency),
  )
  return chosen


def block_saliency(
  decoder: Decoder,
  params: Mapping[str, Any],
  batches: Iterable[Batch],
  mesh: Mesh,
  chunk: int,
) -> np.ndarray:
  """mean |theta dCE/dtheta| over the parameters of each block, [N].

  CE is the mean over the valid tokens of all batches together: gradients are summed
  before their absolute value is taken. After the weight importance of pruning
  (Molchanov et al. 2019, arXiv 1906.10771), without its square.

  batches: whole batches, the same in every process.
  """
  layers = params["layers"]
  where = shardings(layers, mesh)
  replicated = NamedSharding(mesh, PartitionSpec())
  zeros = jax.jit(
    lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), layers),
    out_shardings=where,
  )

  # Of the size of the layers in float32, so the sums are split as the layers are.
  add = functools.partial(_add, decoder, chunk)
  step = jax.jit(add, out_shardings=where, donate_argnums=0)
  sums, tokens = zeros(), 0
  for batch in batches:
    tokens += int(np.sum(batch.mask))
    rows = spread(batch, batch_sharding(mesh))
    sums = step(sums, params, rows)
  means = jax.jit(_means, out_shardings=replicated)(layers, sums)
  return np.asarray(means, np.float64) / max(tokens, 1)


def _add(
  decoder: Decoder,
  chunk: int,
  sums: Any,
  params: Mapping[str, Any],
  batch: Batch,
) -> Any:
  """sums and a batch's gradients by the layers, of the sum of the loss over tokens."""

  def loss(layers: Any) -> Float[Array, ""]:
    out = output(decoder, {"params": params | {"layers": layers}}, batch)
    weights = batch.mask.astype(jnp.float32)
    labels = batch.labels
    return weighted_sums(_token_loss, {"teacher": out}, labels, weights, chunk)[0]

  grads = jax.grad(loss)(params["layers"])
  return jax.tree.map(lambda s, g: s + g.astype(s.dtype), sums, grads)


def _token_loss(
  logits: Mapping[str, Float[Array, "... V"]], labels: Int[Array, "..."]
) -> tuple[Float[Array, "..."], dict]:
  return cross_entropy(logits["teacher"], labels), {}


def _means(layers: Any, grads: Any) -> Float[Array, " N"]:
  """mean |theta g| over all leaves, by the leading axis."""
  products = jax.tree.leaves(
    jax.tree.map(lambda x, g: jnp.abs(x.astype(jnp.float32) * g), layers, grads)
  )
  total = sum(x.reshape(len(x), -1).sum(axis=1) for x in products)
  return total / sum(x[0].size for x in products)


def write(path: Path, choice: Choice) -> None:
  """Keeps the choice for a run that resumes; process 0 alone writes."""
  Workdir(path.parent).write_json(path.name, dataclasses.asdict(choice))


def read(path: Path) -> Choice | None:
  """The choice that `write` kept, None if there is none.

  Raises:
    UserError: if the file is damaged: another choice would not fit the checkpoints.
  """
  if not path.exists():
    return None
  try:
    raw = read_json(path)
    return Choice(raw["share"], tuple(raw["blocks"]), tuple(raw["saliency"]))
  except (KeyError, TypeError, UserError) as error:
    raise UserError(f"{path} is damaged ({error}); name another workdir") from error
