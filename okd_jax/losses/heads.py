"""Heads where a loss needs them, so that no chunk of it waits for another device.

Under fsdp a head is gathered once, before the chunks. Under tensor each device keeps
its share of the vocabulary from there to the gradient, so none computes all logits.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from okd_jax.losses.inline import inlined
from okd_jax.losses.layout import Hidden, Name, placed, vocabulary_shards
from okd_jax.losses.outputs import Heads, Logits, unembed


@flax.struct.dataclass
class Head:
  """One model's head, placed.

  kernel: [V and what fills the last share, D].
  size: V.
  """

  kernel: Any
  size: int = flax.struct.field(pytree_node=False)


Placed = dict[Name, Head]


def place(heads: Heads, hidden: Hidden) -> Placed:
  """The heads as the chunks need them, in the narrower dtype of head and states.

  A vocabulary that does not come out even is filled up to equal shares, and no
  further: then each logit is where XLA, too, has the share that it belongs to, and
  cutting the rest off moves nothing.
  """
  return {name: _placed(head, hidden[name].dtype) for name, head in heads.items()}


def _placed(head: Float[Array, "V D"], dtype: Any) -> Head:
  size = len(head)
  if jnp.dtype(dtype).itemsize < head.dtype.itemsize:
    head = head.astype(dtype)
  if missing := -size % vocabulary_shards():
    head = jnp.pad(head, ((0, missing), (0, 0)))
  return Head(placed(head, vocabulary=0), size)


def in_shares(function: Callable[..., Any]) -> Callable[..., Any]:
  """`function` of chunks, such that XLA keeps logits in shares, even or not."""
  return function if vocabulary_shards() == 1 else inlined(function)


def wide_logits(hidden: Hidden, heads: Placed) -> Logits:
  """The logits of some positions, by model, and those of what fills the heads up."""
  return {
    name: placed(unembed(h, heads[name].kernel), rows=0, vocabulary=2)
    for name, h in hidden.items()
  }


def cut_to_size(wide: Logits, heads: Placed) -> Logits:
  """The logits of tokens alone."""
  return {
    n: jax.lax.slice_in_dim(x, 0, heads[n].size, axis=-1) for n, x in wide.items()
  }


def logits_of(hidden: Hidden, heads: Placed) -> Logits:
  """The logits of some positions, by model, before any cap."""
  return cut_to_size(wide_logits(hidden, heads), heads)


def to_hidden(grad: Float[Array, "T C W"], head: Head) -> Float[Array, "S T C D"]:
  """The gradient of hidden states, a part from each share of the vocabulary.

  Added up over S when all chunks are done, they cost one sum between devices.
  """
  count = vocabulary_shards()
  grad = grad.reshape(*grad.shape[:2], count, -1)
  kernel = head.kernel.astype(grad.dtype).reshape(count, -1, head.kernel.shape[-1])
  product = jnp.einsum("tcsv,svd->stcd", grad, kernel)
  return placed(product, rows=1, vocabulary=0)
