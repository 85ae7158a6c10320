"""The one place where per-token values become means."""

import flax.struct
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float


def token_weights(
  mask: Bool[Array, "B L"] | Bool[np.ndarray, "B L"],
) -> Float[Array, "B L"]:
  """1 / (number of valid tokens) on valid tokens, 0 elsewhere; they sum to 1.

  Computed once on the whole global batch: sums under these weights are the global
  token mean, however the batch is then cut into micro-batches, devices or chunks.

  Args:
    mask: which tokens count.

  Returns:
    The weight of each token; all 0 (and not NaN) where no token counts.

  Source: ours; papers leave open which mean over a batch's tokens they take.

  >>> print(token_weights(jnp.array([[True, True, False], [True, True, False]])))
  [[0.25 0.25 0.  ]
   [0.25 0.25 0.  ]]
  """
  count = jnp.sum(mask, dtype=jnp.float32)
  return mask / jnp.maximum(count, 1.0)


@flax.struct.dataclass
class Mean:
  """A mean under way: a weighted total and its weight. Means of means never arise.

  Args:
    total: the sum so far.
    count: of how much it is the sum.

  Source: kauldron's losses, which travel as (value sum, count) and merge.

  >>> short, long = (Mean(jnp.float32(n), jnp.float32(n)) for n in (2, 4))
  >>> (short + long).compute()
  1.0
  """

  total: Float[Array, ""] | float
  count: Float[Array, ""] | float

  def __add__(self, other: "Mean") -> "Mean":
    return Mean(self.total + other.total, self.count + other.count)

  def compute(self) -> float:
    """The mean as a Python float; NaN where nothing was counted."""
    return float(self.total) / float(self.count) if self.count else float("nan")
