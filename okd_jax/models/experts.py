"""A mixture of experts: a router, and MLPs that compute for their own tokens alone.

Outrageously Large Neural Networks, Shazeer et al. 2017, arXiv 1701.06538; the softmax
before the choice is Qwen3's. Tokens are sorted by expert, so that each projection is
one `jax.lax.ragged_dot` over groups of rows: no expert computes for a token that is not
its own, none has a capacity, and no token is dropped.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from okd_jax.models.int8 import widened

Activation = Callable[[Float[Array, "*B F"]], Float[Array, "*B F"]]


def mixture(
  x: Float[Array, "B L D"],
  weights: Mapping[str, tuple[Num[Array, "..."], Float[Array, "..."] | None]],
  how: tuple[int, bool, Activation],
) -> Float[Array, "B L D"]:
  """The chosen experts' outputs, weighted by the router's shares.

  Args:
    x: what enters the layer's MLP.
    weights: 'router' [D, E]; 'experts_gate' and 'experts_up' [E, D, F], 'experts_down'
      [E, F, D]; each with its scales (`int8`) or None.
    how: (experts a token has, whether their shares add up to 1, the gate's activation).
  """
  count, normalize, activation = how
  wide = {name: widened(*each, x.dtype) for name, each in weights.items()}
  tokens = x.reshape(-1, x.shape[-1])
  shares, experts = route(tokens, wide["router"], count, normalize)
  order = jnp.argsort(
    experts.ravel(), stable=True
  )  # of T * k pairs of token and expert
  rows = tokens[order // count]
  sizes = jnp.bincount(experts.ravel(), length=wide["router"].shape[1])
  gate = jax.lax.ragged_dot(rows, wide["experts_gate"], sizes)
  up = jax.lax.ragged_dot(rows, wide["experts_up"], sizes)
  out = jax.lax.ragged_dot(activation(gate) * up, wide["experts_down"], sizes)
  out = out * shares.ravel()[order][:, None]
  back = jnp.argsort(order)  # no scatter: each token finds its own rows
  return out[back].reshape(-1, count, x.shape[-1]).sum(1).reshape(x.shape)


def route(
  tokens: Float[Array, "T D"], router: Float[Array, "D E"], count: int, normalize: bool
) -> tuple[Float[Array, "T k"], Int[Array, "T k"]]:
  """(shares, numbers) of the likeliest `count` experts of each token."""
  logits = (tokens @ router).astype(jnp.float32)
  shares, experts = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), count)
  if normalize:
    shares /= shares.sum(-1, keepdims=True)
  return shares.astype(tokens.dtype), experts
