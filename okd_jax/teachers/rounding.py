"""What a teacher's int8 weights cost: the KL from the whole teacher to the rounded one.

The whole teacher is not on the devices: its hidden states are taken through one layer
after the other, each read from its files and let go. Only of one that is drawn at
random or has an adapter merged in, for which there are no such files, the whole is made
once more.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, PyTree

from okd_jax import models
from okd_jax.config.schema import Settings
from okd_jax.data import PAD_ID, Example, eval_batches
from okd_jax.data.batch import Batch
from okd_jax.losses import Output, forward_kl, weighted_sums
from okd_jax.models import Decoder, ModelConfig, output
from okd_jax.runtime import sharding
from okd_jax.teachers import load

ROWS = 32  # held-out rows that are measured on, at most


def rounding_kl(
  settings: Settings,
  name: str,
  decoder: Decoder,
  rounded: PyTree,
  examples: Sequence[Example],
  mesh: Mesh,
) -> float:
  """KL(whole ‖ rounded) in nats a trained token, on the first `ROWS` held-out rows.

  Args:
    name: the teacher's.
    decoder: the teacher's, without an adapter.
    rounded: its parameters with int8 kernels.

  Raises:
    UserError: for weights that can no longer be read.
  """
  batches = _batches(settings, examples, mesh)
  whole = _whole(settings, name, decoder, batches, mesh)
  step = jax.jit(functools.partial(_sums, decoder, settings.train.loss_chunk))
  found = [step(out, rounded, b) for out, b in zip(whole, batches, strict=True)]
  kl, count = (sum(float(each[i]) for each in found) for i in (0, 1))
  return kl / max(count, 1.0)


def _batches(
  settings: Settings, examples: Sequence[Example], mesh: Mesh
) -> list[Batch]:
  rows = eval_batches(
    examples[:ROWS],
    batch_size=sharding.whole_rows(settings.eval.batch_size, mesh),
    length=settings.data.max_length,
    pad_id=PAD_ID,
  )
  where = sharding.batch_sharding(mesh)
  return [sharding.spread(Batch.of(each), where) for each in rows]


def _sums(
  decoder: Decoder, chunk: int, whole: Output, rounded: PyTree, batch: Batch
) -> tuple[Float[Array, ""], Float[Array, ""]]:
  outputs = {"whole": whole, "rounded": output(decoder, {"params": rounded}, batch)}
  weights = batch.mask.astype(jnp.float32)
  kl, _ = weighted_sums(_token_kl, outputs, batch.labels, weights, chunk)
  return kl, weights.sum()


def _token_kl(
  logits: dict[str, Float[Array, "B C V"]], labels: Array
) -> tuple[Float[Array, "B C"], dict]:
  return forward_kl(logits["whole"], logits["rounded"]), {}


def _whole(
  settings: Settings,
  name: str,
  decoder: Decoder,
  batches: list[Batch],
  mesh: Mesh,
) -> list[Output]:
  """What the teacher gives without any rounding, batch by batch."""
  path = load.teacher_path(settings, name)
  if path and not settings.teacher.adapter:
    return list(_layer_by_layer(path, settings, decoder, batches, mesh))
  # Drawn at random, or changed by an adapter: there is no file of its layers.
  [params] = load.load_whole(settings, {name: decoder.config}, mesh).values()
  run = jax.jit(lambda params, batch: output(decoder, {"params": params}, batch))
  return [run(params, batch) for batch in batches]


def _layer_by_layer(
  path: str, settings: Settings, decoder: Decoder, batches: list[Batch], mesh: Mesh
) -> Iterator[Output]:
  shape = decoder.config
  read = functools.partial(
    models.load,
    path,
    dtype=jnp.dtype(settings.teacher_dtype),
    where=functools.partial(sharding.place, mesh),
  )
  outer = read(layers=range(0)).params
  layer = read(layers=range(1)).params
  one = decoder.clone(config=shape.of_layers([0]))
  embed = jax.jit(functools.partial(one.apply, stop=0))
  ids = [(batch.tokens, batch.segment_ids) for batch in batches]
  states = [embed({"params": outer | layer}, *each)[0] for each in ids]
  for i in range(shape.num_layers):
    layer = read(layers=range(i, i + 1)).params
    step = _layer(decoder.clone(config=_bare(shape, i)))
    states = [step(layer, *each, x) for each, x in zip(ids, states, strict=True)]
  last = jax.jit(functools.partial(one.apply, start=1))
  head = models.head_kernel(outer, shape)
  for each, x in zip(ids, states, strict=True):
    hidden, _ = last({"params": outer | layer}, *each, hidden=x)
    yield Output(hidden, head, shape.logit_cap)


def _bare(shape: ModelConfig, layer: int) -> ModelConfig:
  """A layer alone: nothing before it and nothing after."""
  return dataclasses.replace(
    shape.of_layers([layer]),
    final_norm=False,
    logit_divisor=1.0,
    embed_size=shape.hidden_size,
  )


@functools.cache
def _layer(decoder: Decoder):  # the same program for all layers of a kind
  @jax.jit
  def step(params: PyTree, tokens: Array, segment_ids: Array, x: Array) -> Array:
    return decoder.apply({"params": params}, tokens, segment_ids, hidden=x)[0]

  return step
