"""Losses over a vocabulary without ever holding [B, L, V].

The hidden states of one or several models are walked over in chunks of positions,
those that count alone: padding and prompts have no logits.
Each chunk gets its logits, its per-token loss and, in the same pass, the gradient of
that loss, so no logit is computed twice and none outlives its chunk. Any function of
the logits can be chunked, of any number of models at once: that is what lets one
pass serve the student and the online module (OKD) at the price of one.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, PyTree, Shaped

# (logits by model [B, C, V], labels [B, C], **knobs) -> (loss [B, C], metrics [B, C] by
# name): of any B * C positions, neither rows nor neighbours.
TokenLoss = Callable[..., tuple[Float[Array, "B C"], dict[str, Float[Array, "B C"]]]]
Labels = PyTree[Shaped[Array, "B L ..."]]


_CPU_BUDGET, _BUDGET = 16 << 20, 256 << 20  # bytes of a chunk's float32 logits
_ROW_AXES = ("data", "fsdp")  # of the mesh, which the rows of a batch are divided by


class Output(NamedTuple):
  """What a model hands to a loss: logits, not yet multiplied out."""

  hidden: Float[Array, "B L D"]
  head: Float[Array, "V D"]


def unembed(
  hidden: Float[Array, "*B D"], head: Float[Array, "V D"]
) -> Float[Array, "*B V"]:
  """float32 logits, multiplied in the dtype of the hidden states."""
  return jnp.einsum(
    "...d,vd->...v",
    hidden,
    head.astype(hidden.dtype),
    preferred_element_type=jnp.float32,
  )


def weighted_sums(
  token_loss: TokenLoss,
  outputs: Mapping[str, Output],
  labels: Labels,
  weights: Float[Array, "B L"],
  chunk: int,
  knobs: Mapping[str, Array] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
  """Sums of the token loss and of its metrics under `weights`.

  Differentiable in `outputs` only, and only the loss. Gradients of the heads
  accumulate in float32, on each device those of its own rows, which are added up once
  at the end; a model that nobody differentiates costs no gradient.
  Positions of weight 0 add exactly nothing, whatever their logits hold.

  Args:
    token_loss: a per-token loss; it must not close over traced values.
    outputs: hidden states and head of each model, by name.
    labels: gold next tokens, or any tree of arrays [B, L, …]: what the loss wants to
      know about each position.
    weights: float weight of each position, 0 where masked (`mean.token_weights`).
    chunk: positions, times rows, that have their logits in memory at once; 0 is
      `fitting_chunk`.
    knobs: traced scalars, which the loss gets as keywords.
  """
  chunk = chunk or fitting_chunk(outputs, len(weights))
  return _sums(token_loss, chunk, dict(outputs), labels, weights, dict(knobs or {}))


def fitting_chunk(outputs: Mapping[str, Output], rows: int) -> int:
  """The power of two whose logits of one model fill the budget of a device, or less.

  On a CPU that is what its caches hold: there a loss is bound by memory, and with
  eight times as much took 1.5 times as long. Elsewhere it is what keeps the matrix
  units busy and is small beside any model.
  """
  rows = -(-rows // _shards(rows))
  vocab = max(output.head.shape[0] for output in outputs.values())
  budget = _CPU_BUDGET if jax.default_backend() == "cpu" else _BUDGET
  return 1 << max(budget // (4 * rows * vocab), 1).bit_length() - 1


def _shards(rows: int) -> int:
  """How many devices share the rows; 1 where that does not come out even."""
  mesh = jax.sharding.get_abstract_mesh().shape
  shards = math.prod(mesh.get(axis, 1) for axis in _ROW_AXES)
  return 1 if rows % shards else shards


def _per_shard(x: Float[Array, "G ..."]):
  """`x`, each of its first axis's parts where its share of the rows is."""
  mesh = jax.sharding.get_abstract_mesh().shape
  axes = tuple(axis for axis in _ROW_AXES if axis in mesh)
  if len(x) == 1 or not axes:
    return x
  rest = (PartitionSpec.UNCONSTRAINED,) * (x.ndim - 1)
  return jax.lax.with_sharding_constraint(x, PartitionSpec(axes, *rest))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sums(token_loss, chunk, outputs, labels, weights, knobs):
  token_loss = functools.partial(token_loss, **knobs)
  chunks, used, _ = _counting_first(outputs, labels, weights, chunk)

  def body(i, sums):
    hidden, labels, weights = _chunk(chunks, i)
    logits = {name: unembed(h, outputs[name].head) for name, h in hidden.items()}
    new = _chunk_sums(token_loss, logits, labels, weights)
    return jax.tree.map(jnp.add, sums, new)

  return jax.lax.fori_loop(0, used, body, _zeros(token_loss, outputs, chunks))


def _sums_fwd(token_loss, chunk, outputs, labels, weights, knobs):
  trained = {  # (hidden states?, head?) that somebody differentiates, by model
    name: (output.hidden.perturbed, output.head.perturbed)
    for name, output in outputs.items()
  }
  outputs, labels, weights, knobs = jax.tree.map(
    lambda leaf: leaf.value, (outputs, labels, weights, knobs), is_leaf=_is_primal
  )
  token_loss = functools.partial(token_loss, **knobs)
  fitted = [name for name in outputs if any(trained[name])]

  chunks, used, order = _counting_first(outputs, labels, weights, chunk)
  shards = len(order)

  def body(i, carry):
    sums, head_grads, hidden_grads = carry
    hidden, labels, weights = _chunk(chunks, i)
    logits = {name: unembed(h, outputs[name].head) for name, h in hidden.items()}

    def loss_of(fitted_logits):
      return _chunk_sums(token_loss, logits | fitted_logits, labels, weights)

    loss, pull, metrics = jax.vjp(
      loss_of, {name: logits[name] for name in fitted}, has_aux=True
    )
    grads = pull(jnp.ones_like(loss))[0]
    sums = jax.tree.map(jnp.add, sums, (loss, metrics))
    head_grads, hidden_grads = dict(head_grads), dict(hidden_grads)
    for name, grad in grads.items():
      h, head = hidden[name], outputs[name].head
      grad = grad.astype(h.dtype)
      if trained[name][0]:
        product = jnp.einsum("bcv,vd->bcd", grad, head.astype(h.dtype))
        hidden_grads[name] = hidden_grads[name].at[i].set(product)
      if trained[name][1]:
        h, grad = (x.reshape(shards, -1, *x.shape[1:]) for x in (h, grad))
        product = jnp.einsum(
          "gbcd,gbcv->gdv", h, grad, preferred_element_type=jnp.float32
        )
        head_grads[name] += _per_shard(product)
    return sums, head_grads, hidden_grads

  # A sum of its own for each device, so that none waits for the others in the loop.
  head_grads = {
    name: _per_shard(jnp.zeros((shards, *outputs[name].head.shape[::-1]), jnp.float32))
    for name in fitted
    if trained[name][1]
  }
  hidden_grads = {
    name: jnp.zeros_like(chunks[0][name]) for name in fitted if trained[name][0]
  }
  init = (_zeros(token_loss, outputs, chunks), head_grads, hidden_grads)
  sums, head_grads, hidden_grads = jax.lax.fori_loop(0, used, body, init)
  grads = {
    name: Output(
      hidden=_put_back(hidden_grads[name], order, output.hidden.shape)
      if name in hidden_grads
      else None,
      head=head_grads[name].sum(0).T.astype(output.head.dtype)
      if name in head_grads
      else None,
    )
    for name, output in outputs.items()
  }
  return sums, grads


def _sums_bwd(token_loss, chunk, grads, cotangents):
  scale = cotangents[0]  # of the loss; metrics are not differentiated
  return jax.tree.map(lambda g: (g * scale).astype(g.dtype), grads), None, None, None


_sums.defvjp(_sums_fwd, _sums_bwd, symbolic_zeros=True)


def _chunk_sums(token_loss, logits, labels, weights):
  loss, metrics = token_loss(logits, labels)

  def weighted(x):
    return jnp.sum(jnp.where(weights != 0, x, 0) * weights)

  return weighted(loss), jax.tree.map(weighted, jax.lax.stop_gradient(metrics))


def _counting_first(outputs, labels, weights, chunk: int):
  """The positions that count, before all others, in chunks.

  Those of one device's rows are one group, so that short rows and long prompts leave
  no gaps: of padding and prompts hardly any logit is ever computed.

  Returns:
    ((hidden states, labels, weights) [chunks, B, C, …], how many chunks have a
    position that counts, order [G, N]: where each one came from).
  """
  rows, length = weights.shape
  shards = _shards(rows)
  group = functools.partial(_grouped, shards=shards)
  counts = group(weights) != 0
  order = jnp.argsort(~counts, axis=1, stable=True)
  size = min(chunk, length)

  def lay_out(x):
    x = _cut(_pick(group(x), order), size * rows // shards)
    return x.reshape(-1, rows, size, *x.shape[3:])

  # Where nothing counts the logits are made 0: no NaN there can reach a gradient.
  hidden = {
    name: jnp.where(weights[..., None] != 0, output.hidden, 0)
    for name, output in outputs.items()
  }
  chunks = jax.tree.map(lay_out, (hidden, labels, weights))
  return chunks, -(-counts.sum(1).max() * shards // (size * rows)), order


def _grouped(x, shards: int):
  """[B, L, …] to [G, N, …]: what is on one device, or was meant to be, in one group."""
  return _per_shard(x.reshape(shards, -1, *x.shape[2:]))


def _pick(x, places):
  """The values of each group at its `places`, [G, N, …] at [G, N]."""
  return jax.vmap(lambda group, places: group[places])(x, places)


def _cut(x, size: int):
  """[G, N, …] to [chunks, G, C, …]; the last chunk is filled with zeros."""
  groups, length = x.shape[:2]
  count = -(-length // size)
  pad = [(0, 0), (0, count * size - length)] + [(0, 0)] * (x.ndim - 2)
  x = jnp.pad(x, pad).reshape(groups, count, size, *x.shape[2:])
  return jnp.moveaxis(x, 1, 0)


def _chunk(chunks, i):
  return jax.tree.map(lambda x: x[i], chunks)


def _put_back(chunks, order, shape):
  """[chunks, B, C, …] to [B, L, …], each value where `order` says it came from."""
  groups, length = order.shape
  joined = _join(chunks.reshape(len(chunks), groups, -1, *chunks.shape[3:]), length)
  return _pick(joined, jnp.argsort(order, axis=1)).reshape(shape)


def _join(chunks, length: int):
  joined = jnp.moveaxis(chunks, 0, 1)
  return joined.reshape(joined.shape[0], -1, *joined.shape[3:])[:, :length]


def _zeros(token_loss, outputs, chunks):
  """Zeros shaped like one chunk's sums, found without computing one."""

  def first(outputs, chunks):
    hidden, labels, weights = _chunk(chunks, 0)
    logits = {name: unembed(h, outputs[name].head) for name, h in hidden.items()}
    return _chunk_sums(token_loss, logits, labels, weights)

  shapes = jax.eval_shape(first, outputs, chunks)
  return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


def _is_primal(leaf) -> bool:
  return isinstance(leaf, jax.custom_derivatives.CustomVJPPrimal)


def per_token(
  function: Callable,
  outputs: Mapping[str, Output],
  labels: Labels,
  chunk: int,
):
  """A function of the logits at every position, chunk by chunk; not differentiated.

  function: (logits by model [B, C, V], labels [B, C]) -> any tree of [B, C].
  """
  rows, length = jax.tree.leaves(labels)[0].shape[:2]
  chunk = chunk or fitting_chunk(outputs, rows)
  outputs = jax.lax.stop_gradient(dict(outputs))

  def body(_, inputs):
    hidden, labels = inputs
    logits = {name: unembed(h, outputs[name].head) for name, h in hidden.items()}
    return None, function(logits, labels)

  hidden = {name: output.hidden for name, output in outputs.items()}
  cut = functools.partial(_cut, size=min(chunk, length))
  _, values = jax.lax.scan(body, None, jax.tree.map(cut, (hidden, labels)))
  return jax.tree.map(lambda x: _join(x, length), values)
