"""Several distributions as one: their mean, in probability space."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from okd_jax.losses.logits import Knob, Logits, log_probs


def mixture(
  logits: Sequence[Logits], weights: Float[Array, "*B n"], temperature: Knob = 1.0
) -> Float[Array, "*B V"]:
  """Logits whose softmax at `temperature` is the mean of theirs at `temperature`.

  Args:
    logits: of n models over one vocabulary.
    weights: of each model at each position, of any sum above 0; where they are all 0
      they count as equal.
    temperature: T, by which all logits are divided.

  Returns:
    float32 logits [*B, V].

  Raises:
    ValueError: from JAX, if the vocabularies differ.

  Source: the mean of big_vision's teachers in probability space: one KL to it has the
  gradient of the mean of the KLs to each.

  >>> p, q = jnp.log(jnp.array([[0.75, 0.25], [0.5, 0.5]]))
  >>> print(jax.nn.softmax(mixture([p, q], jnp.array([1.0, 3.0]))).round(4))
  [0.5625 0.4375]
  """
  total = weights.sum(-1, keepdims=True)
  equal = 1 / len(logits)
  share = jnp.where(total > 0, weights / jnp.where(total > 0, total, 1), equal)
  each = [
    log_probs(z, temperature) + jnp.log(share[..., i, None])
    for i, z in enumerate(logits)
  ]
  return temperature * jax.nn.logsumexp(jnp.stack(each), axis=0)
