"""What models hand to a loss, and how many logits of it may be there at once."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from okd_jax.losses.layout import Name, row_shards, vocabulary_shards

Heads = dict[Name, Float[Array, "V D"]]  # by model, as are
Logits = dict[Name, Float[Array, "B C _"]]  # each of its own vocabulary

_CPU_BUDGET, _BUDGET = 16 << 20, 256 << 20  # bytes of a chunk's float32 logits


@flax.struct.dataclass
class Output:
  """What a model hands to a loss: logits, not yet multiplied out.

  A tree: like any other it may also hold gradients, shapes or shardings.

  hidden: the last states [B, L, D] of a decoder, after its norm.
  head: [V, D], a vector for each token.
  cap: of the logits, see `soft_cap`.
  """

  hidden: Any
  head: Any
  cap: float = flax.struct.field(pytree_node=False, default=0.0)

  def logits(self) -> Float[Array, "B L V"]:
    """float32 logits of all positions at once."""
    return soft_cap(unembed(self.hidden, self.head), self.cap)

  def first_ids(self, size: int) -> "Output":
    """The same over so many tokens alone."""
    return self.replace(head=self.head[:size])


def soft_cap(x: Float[Array, "*B"], cap: float) -> Float[Array, "*B"]:
  """c tanh(x / c), which stays within -c and c; x itself where c is 0.

  Source: Gemma 2, Gemma Team 2024, arXiv 2408.00118, Section 2.

  >>> print(soft_cap(jnp.array([0.0, 100.0]), 30.0).round(2), soft_cap(jnp.ones(1), 0))
  [ 0.   29.92] [1.]
  """
  return cap * jnp.tanh(x / cap) if cap else x


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


def of_capped(
  function: Callable[..., Any], outputs: Mapping[Name, Output]
) -> Callable[..., Any]:
  """`function` of logits by model, as one of logits that nobody has capped yet."""
  caps = {name: output.cap for name, output in outputs.items() if output.cap}
  return functools.partial(_cap_first, function, caps) if caps else function


def _cap_first(
  function: Callable[..., Any],
  caps: Mapping[Name, float],
  logits: Logits,
  *args: Any,
  **kwargs: Any,
) -> Any:
  capped = {name: soft_cap(logits[name], cap) for name, cap in caps.items()}
  return function({**logits, **capped}, *args, **kwargs)


def fitting_chunk(outputs: Mapping[Name, Output], rows: int) -> int:
  """The power of two whose logits of one model fill the budget of a device, or less.

  On a CPU that is what its caches hold: there a loss is bound by memory, and with
  eight times as much took 1.5 times as long. Elsewhere it is what keeps the matrix
  units busy and is small beside any model.
  """
  rows = -(-rows // row_shards(rows))
  vocab = max(output.head.shape[0] for output in outputs.values())
  vocab = -(-vocab // vocabulary_shards())
  budget = _CPU_BUDGET if jax.default_backend() == "cpu" else _BUDGET
  return 1 << max(budget // (4 * rows * vocab), 1).bit_length() - 1
