"""A learned gate over teachers: how much each one counts, token by token.

Ensembled CTR Prediction via Knowledge Distillation, Zhu et al. 2020, arXiv 2011.04106,
weighs the teachers' losses by a softmax of a linear map of all their outputs. For
language models [ours]: the map reads each teacher's log-probability of the gold token
and its entropy; and since the gate could win by picking whoever is easiest to imitate,
its loss also holds the mixture's own: sum_i a_i D_i - log sum_i a_i p_i(y).
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from okd_jax.data.batch import Batch
from okd_jax.methods.base import stop_gradient

PER = ("token", "example")


def init(
  key: Key[Array, ""], teachers: int, hidden_size: int
) -> dict[str, Float[Array, "..."]]:
  """A map of zeros: every teacher counts the same."""
  del key, hidden_size
  kernel = jnp.zeros((2 * teachers, teachers))
  return {"kernel": kernel, "bias": jnp.zeros(teachers)}


def weigh(
  params: Mapping[str, Float[Array, "..."]],
  facts: Mapping[str, Float[Array, "B L ..."]],
  batch: Batch,
  per: str,
) -> tuple[Float[Array, "B L n"], Float[Array, ""]]:
  """(a, the gate's loss): differentiable in the gate's parameters alone.

  facts: 'nll', 'entropy' and 'divergence' [B, L, n] of the teachers, constants.
  """
  features = jnp.concatenate([-facts["nll"], facts["entropy"]], axis=-1)
  mask = batch.mask[..., None]
  features = jnp.where(mask, features, 0.0)
  if per == "example":
    count = jnp.maximum(mask.sum(1, keepdims=True), 1)
    features = features.sum(1, keepdims=True) / count
  log_a = jax.nn.log_softmax(features @ params["kernel"] + params["bias"][None, None])
  log_a = jnp.broadcast_to(log_a, facts["nll"].shape)
  a = jnp.exp(log_a)
  pulled = jnp.sum(a * facts["divergence"], axis=-1)
  own = -jax.nn.logsumexp(log_a - facts["nll"], axis=-1)
  weights = batch.weights
  loss = jnp.sum(jnp.where(weights != 0, pulled + own, 0.0) * weights)
  return stop_gradient(a), loss
