"""What models hand to a loss, and how many logits of it may be there at once."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from okd_jax.losses.layout import Hidden, Name, row_shards

Heads = dict[Name, Float[Array, "V D"]]  # by model, as are
Logits = dict[Name, Float[Array, "B C _"]]  # each of its own vocabulary

_CPU_BUDGET, _BUDGET = 16 << 20, 256 << 20  # bytes of a chunk's float32 logits


class Output(NamedTuple):
  """What a model hands to a loss: logits, not yet multiplied out."""

  hidden: Float[Array, "B L D"]
  head: Float[Array, "V D"]


def unembed(
  hidden: Float[Array | np.ndarray, "*B D"], head: Float[Array | np.ndarray, "V D"]
) -> Float[Array, "*B V"]:
  """Hidden states times the head, in the dtype of the hidden states.

  Args:
    hidden: the last states of a decoder, after its norm.
    head: a vector for each token, the embedding where both are tied.

  Returns:
    float32 logits [*B, V], added up in float32.

  Raises:
    ValueError: from JAX, if the widths D differ.

  Source: Using the Output Embedding to Improve Language Models, Press and Wolf 2017,
  arXiv 1608.05859, where head and embedding are one.

  >>> head = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
  >>> print(unembed(jnp.array([1.0, 2.0]), head))
  [1. 2. 3.]
  """
  return jnp.einsum(
    "...d,vd->...v",
    hidden,
    head.astype(hidden.dtype),
    preferred_element_type=jnp.float32,
  )


def logits_of(hidden: Hidden, heads: Heads) -> Logits:
  """The logits of some positions, by model."""
  return {name: unembed(h, heads[name]) for name, h in hidden.items()}


def fitting_chunk(outputs: Mapping[Name, Output], rows: int) -> int:
  """The power of two whose logits of one model fill the budget of a device, or less.

  On a CPU that is what its caches hold: there a loss is bound by memory, and with
  eight times as much took 1.5 times as long. Elsewhere it is what keeps the matrix
  units busy and is small beside any model.
  """
  rows = -(-rows // row_shards(rows))
  vocab = max(output.head.shape[0] for output in outputs.values())
  budget = _CPU_BUDGET if jax.default_backend() == "cpu" else _BUDGET
  return 1 << max(budget // (4 * rows * vocab), 1).bit_length() - 1
