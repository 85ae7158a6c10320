"""One layer: attention and MLP around a residual stream, and what they are made of.

What an online module adds, it says itself (`adapters.base`); this file asks it where a
projection has its output and where attention has its keys.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from okd_jax.models.adapters import Adapter
from okd_jax.models.attention import Inputs, Slots, attend, recomputed
from okd_jax.models.config import ModelConfig
from okd_jax.models.product import project

# Keys and values: of virtual tokens, and what `attend` gives back.
Prefix = tuple[Float[Array, "#B m K d"], Float[Array, "#B m K d"]]
Stores = tuple[Float[Array, "..."], Float[Array, "..."]]

_ACTIVATIONS = {
  "gelu": functools.partial(nn.gelu, approximate=False),
  "gelu_tanh": functools.partial(nn.gelu, approximate=True),
  "relu": nn.relu,
  "silu": nn.silu,
}


class Block(nn.Module):
  """One pre-norm layer: attention, then the MLP, each added to its input."""

  config: ModelConfig
  adapter: Adapter
  dtype: DTypeLike
  dropout: float = 0.0
  kernel: str = "xla"

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "B L D"],
    inputs: Inputs,
    prefix: Prefix | None = None,
    slots: Slots | None = None,
  ) -> tuple[Float[Array, "B L D"], Stores]:
    drop = nn.Dropout(self.dropout, deterministic=self.dropout == 0)
    common = (self.config, self.adapter, self.dtype)
    h = Norm(self.config, self.dtype, name="attention_norm")(x)
    attention = Attention(*common, self.kernel, name="attention")
    h, written = attention(h, inputs, prefix, slots)
    x += drop(h)
    h = Norm(self.config, self.dtype, name="mlp_norm")(x)
    return x + drop(MLP(*common, name="mlp")(h)), written


class Attention(nn.Module):
  """Projections around `attend`, and the learned prefix where the adapter is one."""

  config: ModelConfig
  adapter: Adapter
  dtype: DTypeLike
  kernel: str = "xla"

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "B L D"],
    inputs: Inputs,
    prefix: Prefix | None = None,
    slots: Slots | None = None,
  ) -> tuple[Float[Array, "B L D"], Stores]:
    c = self.config
    project = functools.partial(_Projection, c, self.adapter, self.dtype)

    def heads(name: str, count: int) -> Float[Array, "B L N D"]:
      y = project(count * c.head_dim, c.qkv_bias, name=name)(x)
      return y.reshape(*x.shape[:2], count, c.head_dim)

    query_BLHD = heads("query", c.num_heads)
    key_BLKD = heads("key", c.num_kv_heads)
    value_BLKD = heads("value", c.num_kv_heads)
    size = (c.num_kv_heads, c.head_dim)
    prefix = self.adapter.prefix(self, *size, self.dtype) or prefix
    heads = (query_BLHD, key_BLKD, value_BLKD)
    out, written = attend(*heads, inputs, prefix, slots, self.kernel)
    out = out.reshape(*x.shape[:2], c.num_heads * c.head_dim)
    return project(c.hidden_size, c.out_bias, name="out")(out), written


class MLP(nn.Module):
  """Gated (SwiGLU-like) or plain two-layer perceptron."""

  config: ModelConfig
  adapter: Adapter
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
    c = self.config
    project = functools.partial(_Projection, c, self.adapter, self.dtype)
    h = project(c.mlp_size, c.mlp_bias, name="up")(x)
    activate = _ACTIVATIONS[c.activation]
    if c.gated_mlp:
      gate = project(c.mlp_size, c.mlp_bias, name="gate")(x)
      h = recomputed(lambda gate, h: activate(gate) * h)(gate, h)
    else:
      h = recomputed(activate)(h)
    return project(c.hidden_size, c.mlp_bias, name="down")(h)


class _Projection(nn.Module):
  """A dense layer, plus its online module where the adapter names this one."""

  config: ModelConfig
  adapter: Adapter
  dtype: DTypeLike
  features: int
  use_bias: bool

  @nn.compact
  def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L H"]:
    init = nn.initializers.normal(self.config.init_std)
    kernel = self.param("kernel", init, (x.shape[-1], self.features))
    y = project(x, kernel.astype(self.dtype))
    if self.use_bias:
      bias = self.param("bias", nn.initializers.zeros, (self.features,))
      y += bias.astype(self.dtype)[None, None]
    delta = self.adapter.delta(self, x, self.features)
    return y if delta is None else y + delta


class Norm(nn.Module):
  """LayerNorm or RMSNorm, computed in float32."""

  config: ModelConfig
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
    scale, bias = self.param("scale", nn.initializers.ones, (x.shape[-1],)), None
    if self.config.norm == "layernorm":
      bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
    normalize = functools.partial(_normalize, eps=self.config.norm_eps)
    return recomputed(normalize)(x, scale, bias).astype(self.dtype)


def _normalize(
  x: Float[Array, "B L D"],
  scale: Float[Array, " D"],
  bias: Float[Array, " D"] | None,
  eps: float,
) -> Float[Array, "B L D"]:
  """LayerNorm, or RMSNorm where there is no bias; in float32."""
  h = x.astype(jnp.float32)
  if bias is not None:
    h -= h.mean(-1, keepdims=True)
  h *= jax.lax.rsqrt(jnp.square(h).mean(-1, keepdims=True) + eps)
  h *= scale.astype(jnp.float32)[None, None]
  return h if bias is None else h + bias[None, None]
