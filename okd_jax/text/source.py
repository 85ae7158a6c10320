"""What comes next in a text: the interface that `rollout` samples through."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from okd_jax.losses import soft_cap
from okd_jax.models import (
  Cache,
  Decoder,
  ModelConfig,
  head_kernel,
  init_cache,
  logits,
)


class Side(NamedTuple):
  """A model and what it reads: {'params': …}, of an adapted one also 'adapter'."""

  decoder: Decoder
  variables: PyTree


class Source(NamedTuple):
  """What comes next, given what was read so far.

  init: `(batch, slots) -> state`, an empty memory of up to `slots` tokens a row.
  apply: `(variables, tokens [B, L], segment_ids [B, L], positions [B, L], state) ->
    (logits, state)`: reads L more tokens, of which those in segment 0 are padding,
    and gives the float32 logits [B, V] that follow the last one. A source made of
    several models may give any tree of such arrays, with a `choose` that knows it.
  max_length: how many tokens a row may have in all.

  It is hashed to find the compiled program: make each source once, and reuse it.
  """

  init: Callable[[int, int], PyTree]
  apply: Callable[..., tuple[PyTree, PyTree]]
  max_length: int


@functools.cache
def decoder_source(decoder: Decoder) -> Source:
  """The source of one decoder, the same object whenever it is asked for.

  Its variables are `{'params': …}`, or `{'params': …, 'adapter': …}` for the adapted
  model; its cache has the type of the decoder's activations.
  """
  config = decoder.config

  def init(batch: int, slots: int) -> Cache:
    return init_cache(config, batch, slots, decoder.dtype)

  def apply(
    variables: PyTree,
    tokens: Int[Array, "B L"],
    segment_ids: Int[Array, "B L"],
    positions: Int[Array, "B L"],
    cache: Cache,
  ) -> tuple[Float[Array, "B V"], Cache]:
    hidden, cache = decoder.apply(variables, tokens, segment_ids, positions, cache)
    return _logits(hidden[:, -1], variables["params"], config), cache

  return Source(init, apply, config.max_length)


def _logits(
  hidden: Float[Array, "B D"], params: PyTree, config: ModelConfig
) -> Float[Array, "B V"]:
  """`models.logits` of a token a row.

  On a CPU the head stands on the left, where XLA reads it 1.6 times as fast; it would
  turn the product around again if it saw through to the transpose.
  """
  if jax.default_backend() != "cpu":
    return logits(hidden, params, config)
  head = head_kernel(params, config).astype(hidden.dtype)
  turned = jnp.einsum("vd,bd->vb", head, hidden, preferred_element_type=jnp.float32)
  return soft_cap(jax.lax.optimization_barrier(turned).T, config.logit_cap)
