"""Losses over a vocabulary without ever holding [B, L, V].

The hidden states of one or several models are walked over in chunks of positions,
those that count alone: padding and prompts have no logits.
Each chunk gets its logits, its per-token loss and, in the same pass, the gradient of
that loss, so no logit is computed twice and none outlives its chunk. Any function of
the logits can be chunked, of any number of models at once: that is what lets one
pass serve the student and the online module (OKD) at the price of one.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree, Shaped

from okd_jax.losses.heads import (
  Head,
  Placed,
  cut_to_size,
  in_shares,
  logits_of,
  place,
  to_hidden,
  wide_logits,
)
from okd_jax.losses.layout import (
  Chunk,
  Chunks,
  Hidden,
  Labels,
  Name,
  chunk_at,
  counting_first,
  placed,
  put_back,
  row_shards,
  vocabulary_shards,
)
from okd_jax.losses.logits import Knob
from okd_jax.losses.outputs import (
  Heads,
  Logits,
  Output,
  fitting_chunk,
  of_capped,
)

# (logits by model [B, C, V], labels [B, C], **knobs) -> (loss [B, C], metrics [B, C] by
# name): of any B * C positions, neither rows nor neighbours.
TokenLoss = Callable[..., tuple[Float[Array, "B C"], dict[str, Float[Array, "B C"]]]]
Sums = tuple[Float[Array, ""], dict[str, Float[Array, ""]]]  # of loss and metrics

_Labels = PyTree[Shaped[Array, "B C ..."]]
_HeadGrads = dict[Name, Float[Array, "G _ _"]]  # by model, a sum for each group of rows
# By model, from each share of the vocabulary, chunk by chunk.
_HiddenGrads = dict[Name, Float[Array, "S N B C _"]]


def weighted_sums(
  token_loss: TokenLoss,
  outputs: Mapping[Name, Output],
  labels: Labels,
  weights: Float[Array | np.ndarray, "B L"],
  chunk: int,
  knobs: Mapping[str, Knob] | None = None,
) -> Sums:
  """Sums of the token loss and of its metrics under `weights`.

  Differentiable in `outputs` only, and only the loss; a model that nobody asks about
  costs no gradient. Heads' gradients add up in float32, on each device those of its own
  rows. Positions of weight 0 add exactly nothing, whatever their logits hold.

  Args:
    token_loss: a per-token loss; it must not close over traced values.
    outputs: hidden states and head of each model, by name.
    labels: gold next tokens, or any tree of arrays [B, L, …]: what the loss wants to
      know about each position.
    weights: float weight of each position, 0 where masked (`mean.token_weights`).
    chunk: positions, times rows, that have their logits in memory at once; 0 is
      `fitting_chunk`.
    knobs: traced scalars, which the loss gets as keywords.

  Returns:
    (sum of the loss, {name: sum of the metric}).

  Source: the gradient in the same pass is Liger Kernel's, Hsu et al. 2024, arXiv
  2410.10989; here it is of any loss, of several models at once.

  >>> def gold(logits, labels):
  ...   return -jax.nn.log_softmax(logits["student"])[..., 0], {"first": labels}
  >>> outputs = {"student": Output(jnp.ones((1, 2, 3)), jnp.zeros((4, 3)))}
  >>> labels, weights = jnp.array([[5.0, 7.0]]), jnp.array([[1.0, 0.0]])
  >>> loss, metrics = weighted_sums(gold, outputs, labels, weights, chunk=1)
  >>> print(f"{loss:.4f} {metrics['first']:.1f}")  # log 4; the second does not count
  1.3863 5.0
  """
  return sums_of_parts([Part(token_loss, outputs, labels, weights)], chunk, knobs)


class Part(NamedTuple):
  """Some rows, and what their loss is: arguments of `weighted_sums`."""

  token_loss: TokenLoss
  outputs: Mapping[Name, Output]
  labels: Labels
  weights: Float[Array | np.ndarray, "B L"]


def sums_of_parts(
  parts: Sequence[Part], chunk: int, knobs: Mapping[str, Knob] | None = None
) -> Sums:
  """`weighted_sums` of several groups of rows, each with a loss of its own, added up.

  A model has one head in all parts, that of the first part that has the model, and its
  gradient is added up in one place.

  Args:
    parts: the groups; metrics that not all of them have are sums over those that do.
    chunk, knobs: as in `weighted_sums`.

  Returns:
    (sum of the losses, {name: sum of the metric}).

  Source: as `weighted_sums`.

  >>> first = lambda logits, labels: (logits["student"][..., 0] * labels, {})
  >>> head, one = jnp.array([[3.0]]), jnp.array([[1.0]])
  >>> rows = {"student": Output(jnp.array([[[2.0]]]), head)}
  >>> parts = [Part(first, rows, one, one), Part(first, rows, 2 * one, one)]
  >>> print(sums_of_parts(parts, chunk=1)[0])
  18.0
  """
  heads: dict[Name, Float[Array, "V D"]] = {}
  for part in parts:
    heads = {name: output.head for name, output in part.outputs.items()} | heads
  sizes = [_positions(part, chunk) for part in parts]
  return _sums(
    tuple(of_capped(part.token_loss, part.outputs) for part in parts),
    tuple(sizes),
    tuple({n: o.hidden for n, o in part.outputs.items()} for part in parts),
    heads,
    tuple(part.labels for part in parts),
    tuple(part.weights for part in parts),
    dict(knobs or {}),
  )


def _positions(part: Part, chunk: int) -> int:
  """How many positions of each device's rows have logits at once."""
  rows, length = part.weights.shape
  rows //= row_shards(rows)
  return min(chunk * rows or fitting_chunk(part.outputs, 1), length * rows)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sums(
  token_losses: tuple[TokenLoss, ...],
  sizes: tuple[int, ...],
  hidden: tuple[Hidden, ...],
  heads: Heads,
  labels: tuple[Labels, ...],
  weights: tuple[Float[Array | np.ndarray, "B L"], ...],
  knobs: dict[str, Knob],
) -> Sums:
  found, at_hand = [], place(heads, _all_states(hidden))
  for token_loss, size, *rows in zip(
    token_losses, sizes, hidden, labels, weights, strict=True
  ):
    found.append(_part_sums(token_loss, size, *rows, at_hand, knobs))
  return _added(found)


def _part_sums(
  token_loss: TokenLoss,
  size: int,
  hidden: Hidden,
  labels: Labels,
  weights: Float[Array | np.ndarray, "B L"],
  heads: Placed,
  knobs: dict[str, Knob],
) -> Sums:
  token_loss = functools.partial(token_loss, **knobs)
  chunks, used, _ = counting_first(hidden, labels, weights, size)

  def body(i: Int[Array, ""], sums: Sums) -> Sums:
    hidden, labels, weights = chunk_at(chunks, i)
    new = _chunk_sums(token_loss, logits_of(hidden, heads), labels, weights)
    return jax.tree.map(jnp.add, sums, new)

  zeros = _zeros(token_loss, heads, chunks)
  return jax.lax.fori_loop(0, used, in_shares(body), zeros)


def _all_states(parts: Sequence[Hidden]) -> Hidden:
  """Some states of each model."""
  return {name: states for part in parts for name, states in part.items()}


def _added(sums: Sequence[Sums]) -> Sums:
  """All parts' losses, and of each metric those of the parts that have it."""
  loss, metrics = sums[0]
  metrics = dict(metrics)
  for more, others in sums[1:]:
    loss = loss + more
    for name, value in others.items():
      metrics[name] = metrics[name] + value if name in metrics else value
  return loss, metrics


# What JAX hands to `_sums_fwd`: arrays in wrappers that say who is differentiated.
_Primals = PyTree[Any]
_Grads = tuple[tuple[dict[Name, Any], ...], dict[Name, Any]]  # of hidden states, heads


def _sums_fwd(
  token_losses: tuple[TokenLoss, ...],
  sizes: tuple[int, ...],
  hidden: _Primals,
  heads: _Primals,
  labels: _Primals,
  weights: _Primals,
  knobs: _Primals,
) -> tuple[Sums, _Grads]:
  """The sums, and the gradients of the loss for whoever is differentiated."""
  trained = [{n: x.perturbed for n, x in part.items()} for part in hidden]
  learned = [name for name, head in heads.items() if head.perturbed]
  hidden, heads, labels, weights, knobs = jax.tree.map(
    lambda leaf: leaf.value, (hidden, heads, labels, weights, knobs), is_leaf=_is_primal
  )
  head_grads: _HeadGrads = {}
  found, hidden_grads, at_hand = [], [], place(heads, _all_states(hidden))
  for token_loss, size, names, *rows in zip(
    token_losses, sizes, trained, hidden, labels, weights, strict=True
  ):
    token_loss = functools.partial(token_loss, **knobs)
    own = [name for name, perturbed in names.items() if perturbed]
    sums, head_grads, grads = _part_grads(
      token_loss, size, *rows, at_hand, own, learned, head_grads
    )
    found.append(sums)
    hidden_grads.append({name: grads.get(name) for name in names})
  summed = {
    name: grad.sum(0).T[: len(heads[name])].astype(heads[name].dtype)
    for name, grad in head_grads.items()
  }
  return _added(found), (
    tuple(hidden_grads),
    {name: summed.get(name) for name in heads},
  )


def _part_grads(
  token_loss: TokenLoss,
  size: int,
  hidden: Hidden,
  labels: Labels,
  weights: Float[Array | np.ndarray, "B L"],
  heads: Placed,
  trained: list[Name],
  learned: list[Name],
  head_grads: _HeadGrads,
) -> tuple[Sums, _HeadGrads, Hidden]:
  """One part's sums, the heads' gradients with its own added, those of its states.

  trained, learned: the models whose states, whose heads somebody differentiates.
  """
  fitted = [name for name in hidden if name in trained or name in learned]
  chunks, used, places = counting_first(hidden, labels, weights, size)
  groups = len(places)  # Of each its own sum: none waits for others in the loop.
  head_grads = head_grads | {
    name: _zero_sums(heads[name], groups)
    for name in fitted
    if name in learned and name not in head_grads
  }
  grads = {name: _zero_states(chunks[0][name]) for name in trained}

  def body(
    i: Int[Array, ""], carry: tuple[Sums, _HeadGrads, _HiddenGrads]
  ) -> tuple[Sums, _HeadGrads, _HiddenGrads]:
    part = chunk_at(chunks, i)
    new, grads = _chunk_grads(token_loss, heads, part, fitted)
    sums = jax.tree.map(jnp.add, carry[0], new)
    return sums, *_add_grads(i, carry[1:], grads, part[0], heads)

  init = (_zeros(token_loss, heads, chunks), head_grads, grads)
  sums, head_grads, grads = jax.lax.fori_loop(0, used, in_shares(body), init)
  back = {n: put_back(g.sum(0), places, hidden[n].shape) for n, g in grads.items()}
  return sums, head_grads, back


def _zero_sums(head: Head, groups: int) -> Float[Array, "G D W"]:
  shape = (groups, *head.kernel.shape[::-1])
  return placed(jnp.zeros(shape, jnp.float32), rows=0, vocabulary=2)


def _zero_states(chunks: Float[Array, "N T C D"]) -> Float[Array, "S N T C D"]:
  """Room for the gradients of hidden states, from each share of the vocabulary."""
  shape = (vocabulary_shards(), *chunks.shape)
  return placed(jnp.zeros(shape, chunks.dtype), rows=2, vocabulary=0)


def _chunk_grads(
  token_loss: TokenLoss,
  heads: Placed,
  chunk: Chunk,
  fitted: list[Name],
) -> tuple[Sums, Logits]:
  """A chunk's sums, and the gradient of its loss in the logits of those `fitted`."""
  hidden, labels, weights = chunk
  logits = wide_logits(hidden, heads)

  def loss_of(fitted_logits: Logits) -> Sums:
    tokens = cut_to_size(logits | fitted_logits, heads)
    return _chunk_sums(token_loss, tokens, labels, weights)

  loss, pull, metrics = jax.vjp(
    loss_of, {name: logits[name] for name in fitted}, has_aux=True
  )
  return (loss, metrics), pull(jnp.ones_like(loss))[0]


def _add_grads(
  i: Int[Array, ""],
  sums: tuple[_HeadGrads, _HiddenGrads],
  grads: Logits,
  hidden: Hidden,
  heads: Placed,
) -> tuple[_HeadGrads, _HiddenGrads]:
  """Chunk i's gradients, taken from the logits to the heads and hidden states."""
  head_grads, hidden_grads = map(dict, sums)
  for name, grad in grads.items():
    h = hidden[name]
    grad = placed(grad.astype(h.dtype), rows=0, vocabulary=2)
    if name in hidden_grads:
      product = to_hidden(grad, heads[name])
      hidden_grads[name] = hidden_grads[name].at[:, i].set(product)
    if name in head_grads:
      groups = len(head_grads[name])
      h, grad = (x.reshape(groups, -1, *x.shape[1:]) for x in (h, grad))
      product = jnp.einsum(
        "gbcd,gbcv->gdv", h, grad, preferred_element_type=jnp.float32
      )
      head_grads[name] += placed(product, rows=0, vocabulary=2)
  return head_grads, hidden_grads


def _sums_bwd(
  token_losses: tuple[TokenLoss, ...],
  sizes: tuple[int, ...],
  grads: _Grads,
  cotangents: tuple[Any, Any],
) -> tuple[Any, ...]:
  scale = cotangents[0]  # of the loss; metrics are not differentiated
  hidden, heads = jax.tree.map(lambda g: (g * scale).astype(g.dtype), grads)
  return hidden, heads, None, None, None


_sums.defvjp(_sums_fwd, _sums_bwd, symbolic_zeros=True)


def _chunk_sums(
  token_loss: TokenLoss,
  logits: Logits,
  labels: _Labels,
  weights: Float[Array, "B C"],
) -> Sums:
  loss, metrics = token_loss(logits, labels)

  def weighted(x: Shaped[Array, "B C"]) -> Float[Array, ""]:
    return jnp.sum(jnp.where(weights != 0, x, 0) * weights)

  return weighted(loss), jax.tree.map(weighted, jax.lax.stop_gradient(metrics))


def _zeros(token_loss: TokenLoss, heads: Placed, chunks: Chunks) -> Sums:
  """Zeros shaped like one chunk's sums, found without computing one."""

  def first(heads: Placed, chunks: Chunks) -> Sums:
    hidden, labels, weights = chunk_at(chunks, 0)
    return _chunk_sums(token_loss, logits_of(hidden, heads), labels, weights)

  shapes = jax.eval_shape(first, heads, chunks)
  return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


def _is_primal(leaf: object) -> bool:
  return isinstance(leaf, jax.custom_derivatives.CustomVJPPrimal)
