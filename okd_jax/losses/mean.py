"""The one place where per-token values become means."""

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def token_weights(mask: Bool[Array, "B L"]) -> Float[Array, "B L"]:
  """1 / (number of valid tokens) on valid tokens, 0 elsewhere; they sum to 1.

  Computed once on the whole global batch: sums under these weights are the global
  token mean, however the batch is then cut into micro-batches, devices or chunks.
  A batch without any valid token weighs nothing (and not NaN).
  """
  count = jnp.sum(mask, dtype=jnp.float32)
  return mask / jnp.maximum(count, 1.0)


@flax.struct.dataclass
class Mean:
  """A mean under way: a weighted total and its weight. Means of means never arise."""

  total: Float[Array, ""]
  count: Float[Array, ""]

  def __add__(self, other: "Mean") -> "Mean":
    return Mean(self.total + other.total, self.count + other.count)

  def compute(self) -> float:
    """The mean as a Python float; NaN where nothing was counted."""
    return float(self.total) / float(self.count) if self.count else float("nan")
