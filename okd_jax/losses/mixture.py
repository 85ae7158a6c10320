"""Several distributions as one: their mean, in probability space."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from okd_jax.losses.divergences import Knob, Logits, log_probs


def mixture(
  logits: Sequence[Logits], weights: Float[Array, "*B n"], temperature: Knob = 1.0
) -> Logits:
  """Logits whose softmax at `temperature` is the mean of theirs at `temperature`.

  weights: of any sum above 0; where they are all 0 they count as equal.
  """
  total = weights.sum(-1, keepdims=True)
  equal = 1 / len(logits)
  share = jnp.where(total > 0, weights / jnp.where(total > 0, total, 1), equal)
  each = [
    log_probs(z, temperature) + jnp.log(share[..., i, None])
    for i, z in enumerate(logits)
  ]
  return temperature * jax.nn.logsumexp(jnp.stack(each), axis=0)
