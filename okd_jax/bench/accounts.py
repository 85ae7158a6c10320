"""A step by arithmetic alone: what it stores, computes, reads and sends on a device.

Weights, optimiser and batch are exact, from shapes and shardings. Activations are those
that the backward pass of `models.block` keeps. Collectives follow from the sharding
rules, as XLA's partitioner answers them: weights split by fsdp are gathered before each
use, gradients scattered; of weights split by tensor the products are added up. Nothing
of it is measured.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import PyTree

from okd_jax.bench import step
from okd_jax.bench.layouts import Layout, stand_in
from okd_jax.bench.roofline import Sent, span_of
from okd_jax.methods.base import STUDENT
from okd_jax.models import ModelConfig
from okd_jax.run.ahead import Ahead
from okd_jax.runtime import sharding

_LOGITS = 4 * (256 << 20)  # of two models with their gradients, a chunk of each
_LANES = 128  # of a TPU's vectors
# Gradients, updates and moments that wait until all are known to be finite; in
# programs for v5e it was four times the trained weights.
_GUARDED = 4
_UPDATE = 7  # times a trained weight's float32 passes: four are read, three written


class Account(NamedTuple):
  """What arithmetic says of a step.

  memory: bytes of a device by part; 'temporaries' is an estimate.
  operations: of a device. useful: of the whole step, by part, each once.
  traffic: bytes that a device reads and writes.
  sent: its collectives.
  """

  memory: dict[str, int]
  operations: float
  useful: dict[str, float]
  traffic: float
  sent: list[Sent]


class _Use(NamedTuple):
  """How a step uses a model's layers.

  config: its shape.
  tree, where: its weights and their shardings.
  trained: whether they learn.
  backward: the share of forward passes, by rows and layers, that is differentiated.
  copies: of its layers' weights that XLA makes, where adapted ones are cut off: a slice
    that a scan reads is an array of its own, for rows that teach and for others.
  """

  config: ModelConfig
  tree: PyTree
  where: PyTree
  trained: bool
  backward: float
  copies: int = 0


def account(run: Ahead, layout: Layout) -> Account:
  """The account of a step in this layout; whatever `run` says of it is overruled."""
  uses = list(_uses(run, layout))
  useful = useful_operations(run)
  return Account(
    memory(run, layout) | {"temporaries": _temporaries(run, layout, uses)},
    _operations(run, layout, useful, uses),
    useful,
    _traffic(run, layout, uses),
    [each for use in uses for each in _sent(run, layout, use)],
  )


def memory(run: Ahead, layout: Layout) -> dict[str, int]:
  """Bytes of a device by part that lie there from step to step, and its batch."""
  mesh, state = stand_in(layout), run.plan.abstract
  teachers, own = dict(run.frozen), {}
  if STUDENT in teachers:
    own = {STUDENT: teachers.pop(STUDENT)}
  trained = dict(state.params)
  parts = {
    "student": trained.pop(STUDENT),
    "modules": trained.pop("adapter", {}),
    "other trained": trained,
    "optimizers": state.opt_state,
  }
  found = {n: _bytes(t, sharding.shardings(t, mesh)) for n, t in parts.items()}
  for name, tree in (("teachers", teachers), ("frozen student", own)):
    found[name] = _bytes(
      tree, sharding.shardings(tree, mesh, layout.teacher == "replicate")
    )
  found["batch"] = (
    sum(x.size * x.dtype.itemsize for x in _leaves(run.batch)) // layout.rows
  )
  return {name: size for name, size in found.items() if size}


def useful_operations(run: Ahead) -> dict[str, float]:
  """{part: operations} of the whole step, each once, attention below its diagonal."""
  cast, half = run.cast, run.settings.data.max_length // 2
  total: dict[str, float] = {}
  for name in list(cast.teachers) or [""]:
    own = {n: d for n, d in cast.teachers.items() if n == name}
    adapted = {n: d for n, d in cast.adapted.items() if n == name}
    alone = dataclasses.replace(cast, teachers=own, adapted=adapted)
    parts = step.operations(run.job, alone, run.plan.abstract, half)
    for part, count in parts.items():
      # Of several teachers each has its own pass, the student one for all.
      several = total.get(part, 0.0) if part.startswith("teacher") else 0.0
      total[part] = several + count
  return total


def _uses(run: Ahead, layout: Layout) -> Iterator[_Use]:
  """The student and the teachers, as the step uses them."""
  mesh, params = stand_in(layout), run.plan.abstract.params
  own = params[STUDENT] if STUDENT not in run.frozen else run.frozen[STUDENT]
  trained = STUDENT not in run.frozen
  where = sharding.shardings(own, mesh)
  yield _Use(run.cast.student.config, own, where, trained, 1.0)
  taught = 1 / run.job.one_row_in
  for name, decoder in run.cast.teachers.items():
    tree, config = run.frozen.get(name, own), decoder.config
    share, below = 0.0, 0
    if name in run.cast.adapted:
      below = run.cast.adapter.trunk_layers(config.num_layers)
      share = taught * (1 - below / config.num_layers)
    where = sharding.shardings(tree, mesh, layout.teacher == "replicate")
    copies = min(below, 1) * min(run.job.one_row_in, 2)
    yield _Use(config, tree, where, False, share, copies)


def _operations(
  run: Ahead, layout: Layout, useful: dict[str, float], uses: list[_Use]
) -> float:
  """Of a device: with what is computed again, or by every device that shares it."""
  full = _attention_whole(run)
  parts = dict(useful)
  if full:
    parts = step.operations(
      run.job, run.cast, run.plan.abstract, run.settings.data.max_length
    )
  total = sum(parts.values())
  if layout.remat:
    taught = max([use.backward for use in uses if not use.trained], default=0.0)
    total += parts["student"] / 3 + taught * parts.get("teacher forward", 0.0)
  devices = math.prod(layout[:3])
  vocab = [d.config.vocab_size for d in run.cast.decoders.values()]
  if any(size % layout.tensor for size in vocab):
    # A head that tensor does not divide is multiplied by every device.
    total += parts["heads"] * (layout.tensor - 1)
  return total / devices


def _attention_whole(run: Ahead) -> bool:
  """Whether scores of later tokens are computed, too, and then masked."""
  return run.settings.train.attention in ("", "xla")


def _tokens(run: Ahead, layout: Layout) -> int:
  """Of a device, in a microbatch."""
  train = run.settings.train
  rows = train.batch_size // layout.rows // layout.microbatches
  return rows * run.settings.data.max_length


def _wide(config: ModelConfig) -> tuple[int, int, int]:
  """Channels of queries, of keys, and of all MLPs that a token passes."""
  heads, keys = (n * config.head_dim for n in (config.num_heads, config.num_kv_heads))
  mlp = config.mlp_size * (config.experts_per_token if config.experts else 1)
  return heads, keys, mlp


def _kept(use: _Use, remat: bool, tensor: int, lanes: int) -> float:
  """Numbers that a layer keeps of a token for the backward pass.

  The residual stream twice, what enters query, key and value, and what attention's
  kernel and the MLP's activation need; of trained products also what enters them.

  lanes: channels to which the kernel's arrays of heads are filled up.
  """
  config, width = use.config, use.config.hidden_size
  if remat:
    return width
  heads, keys, mlp = _wide(config)
  filled = -(-config.head_dim // lanes) * lanes / config.head_dim
  inner = filled * 2 * (heads + keys) + mlp * (2 if config.gated_mlp else 1)
  if not use.trained:
    return 3 * width + inner / tensor
  return 4 * width + (heads + inner + mlp) / tensor


def _temporaries(run: Ahead, layout: Layout, uses: list[_Use]) -> int:
  """An estimate: gradients and updates, activations, a layer at work, logits."""
  tokens, itemsize = _tokens(run, layout), jnp.dtype(run.settings.train.dtype).itemsize
  lanes = _LANES if run.settings.train.attention == "splash" else 1
  params = run.plan.abstract.params
  total = _GUARDED * _bytes(params, sharding.shardings(params, stand_in(layout)))
  for use in uses:
    kept = _kept(use, layout.remat, layout.tensor, lanes) * use.config.num_layers
    total += use.backward * kept * tokens * itemsize
    heads, keys, mlp = _wide(use.config)
    work = 6 * use.config.hidden_size + (3 * heads + 2 * keys + 3 * mlp) / layout.tensor
    total += work * tokens * itemsize
    layers = use.config.num_layers * _layer(use, itemsize)
    split = layout.fsdp if layout.fsdp > 1 and _split(use, "fsdp") else 1
    if split > 1:
      total += 2 * _layer(use, itemsize) / layout.tensor
    total += use.copies * layers / layout.tensor / split
    if use.trained:  # a head's gradient is added up in float32, on each device
      total += 4 * use.config.vocab_size * use.config.embed_size
  if _attention_whole(run):
    length = run.settings.data.max_length
    widest = max(use.config.num_heads for use in uses)
    total += 3 * 4 * tokens * length * widest / layout.tensor
  return int(total + _LOGITS)


def _traffic(run: Ahead, layout: Layout, uses: list[_Use]) -> float:
  """Bytes that pass between a device and its memory."""
  tokens, itemsize = _tokens(run, layout), jnp.dtype(run.settings.train.dtype).itemsize
  again, total = int(layout.remat), 0.0
  for use in uses:
    heads, keys, mlp = _wide(use.config)
    width, length = use.config.hidden_size, run.settings.data.max_length
    each = 12 * width + (2 * heads + 2 * keys) / layout.tensor
    each += mlp * (3 if use.config.gated_mlp else 2) / layout.tensor
    scores = 4 * 4 * length * use.config.num_heads / layout.tensor
    each = each * itemsize + (scores if _attention_whole(run) else 0.0)
    passes = 1 + use.backward * ((2 if use.trained else 1) + again)
    layers, vocab = use.config.num_layers, use.config.vocab_size
    moved = passes * layers * (each * tokens + _layer(use, itemsize) / layout.tensor)
    # Logits, in float32: written, read, their gradient written and read.
    moved += (
      6 * 4 * tokens * vocab / (layout.tensor if vocab % layout.tensor == 0 else 1)
    )
    total += moved * layout.microbatches
  params = run.plan.abstract.params
  trained = _bytes(params, sharding.shardings(params, stand_in(layout)))
  return total + _UPDATE * trained


def _sent(run: Ahead, layout: Layout, use: _Use) -> Iterator[Sent]:
  """The collectives of one model's weights and activations."""
  who = "student" if use.trained else "teacher"
  itemsize = jnp.dtype(run.settings.train.dtype).itemsize
  layers, parts = use.config.num_layers, layout.microbatches
  mesh, size = layout.mesh, int(_layer(use, itemsize) / layout.tensor)
  again = 1 if use.backward else 0
  split = layout.fsdp > 1 and _split(use, "fsdp")
  rows = tuple(axis for axis in ("data", "fsdp") if mesh[axis] > 1)
  outer = int(_outer(use) * itemsize / layout.tensor)

  def sent(kind: str, what: str, axes: tuple[str, ...], size: int, times: int) -> Sent:
    ways = math.prod(mesh[axis] for axis in axes)
    name, loop = "+".join(axes), times > 1
    span = span_of(axes, mesh)
    return Sent(kind, f"{who} {what}", name, size, times, loop, ways, span)

  if split:
    yield sent("all-gather", "layer", ("fsdp",), size, layers * (1 + again) * parts)
    yield sent("all-gather", "embedding, head", ("fsdp",), outer, parts)
  if use.trained and rows:
    kind = "reduce-scatter" if split else "all-reduce"
    axes = ("fsdp",) if split else rows
    yield sent(kind, "layer's gradient", axes, size, layers * parts)
    wide = outer * 4 // itemsize
    yield sent(kind, "embedding's, head's gradient", axes, wide, parts)
    if split and layout.data > 1:
      ways = layout.fsdp
      yield sent("all-reduce", "gradient", ("data",), layers * size // ways, parts)
  if layout.tensor > 1:
    tokens = _tokens(run, layout) * use.config.hidden_size * itemsize
    passes = 2 * (1 + again * (1 + int(layout.remat)))
    yield sent(
      "all-reduce", "activations", ("tensor",), tokens, passes * layers * parts
    )


def _layer(use: _Use, itemsize: int) -> float:
  """Bytes of a layer's weights, as they are multiplied."""
  size = sum(leaf.size for leaf in _leaves(use.tree.get("layers", {})))
  return size * itemsize / max(use.config.num_layers, 1)


def _outer(use: _Use) -> int:
  """Weights that are no layer's."""
  rest = {name: tree for name, tree in use.tree.items() if name != "layers"}
  return sum(leaf.size for leaf in _leaves(rest))


def _split(use: _Use, axis: str) -> bool:
  """Whether any of a model's weights are split along an axis."""
  return any(axis in where.spec for where in jax.tree.leaves(use.where))


def _leaves(tree: PyTree) -> list[jax.ShapeDtypeStruct]:
  return jax.tree.leaves(tree)


def _bytes(tree: PyTree, where: PyTree) -> int:
  """Bytes of a device's part of a tree."""

  def part(leaf: jax.ShapeDtypeStruct, place: NamedSharding) -> int:
    return math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize

  return sum(jax.tree.leaves(jax.tree.map(part, tree, where)))
