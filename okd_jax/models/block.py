"""One layer: attention and MLP around a residual stream, and what they are made of.

What an online module adds, it says itself (`adapters.base`); this file asks it where a
projection has its output and where attention has its keys.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Num

from okd_jax.models import int8
from okd_jax.models.adapters import Adapter
from okd_jax.models.attention import Inputs, Slots, attend, recomputed
from okd_jax.models.config import ModelConfig
from okd_jax.models.experts import mixture
from okd_jax.models.kernels import Scores
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
  """One layer: attention, then the MLP, each added to its input.

  `ModelConfig.norm_place` says where the norms stand.
  """

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
    common = (self.config, self.adapter, self.dtype)
    attention = Attention(*common, self.kernel, name="attention")
    h, written = attention(self._before("attention", x), inputs, prefix, slots)
    x = self._after("attention", x, h)
    mlp = Experts if self.config.experts else MLP
    h = mlp(*common, name="mlp")(self._before("mlp", x))
    return self._after("mlp", x, h), written

  def _before(self, part: str, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
    """What enters attention or the MLP."""
    if self.config.norm_place in ("before", "both"):
      x = Norm(self.config, self.dtype, name=f"{part}_norm")(x)
    return x

  def _after(
    self, part: str, x: Float[Array, "B L D"], h: Float[Array, "B L D"]
  ) -> Float[Array, "B L D"]:
    """The residual stream with what came out added to it."""
    place = self.config.norm_place
    if place in ("on_output", "both"):
      h = Norm(self.config, self.dtype, name=f"{part}_out_norm")(h)
    h = nn.Dropout(self.dropout, deterministic=self.dropout == 0)(h)
    if (scale := self.config.residual_scale) != 1:
      h *= scale
    x = x + h
    if place == "on_sum":
      x = Norm(self.config, self.dtype, name=f"{part}_norm")(x)
    return x


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

    def heads(name: str, count: int, normed: str) -> Float[Array, "B L N D"]:
      y = project(count * c.head_dim, c.qkv_bias, name=name)(x)
      norm = functools.partial(Norm, c, self.dtype, name=f"{name}_norm")
      y = norm()(y) if normed == "projection" else y
      y = y.reshape(*x.shape[:2], count, c.head_dim)
      return norm()(y) if normed == "head" else y

    query_BLHD = heads("query", c.num_heads, c.qk_norm)
    key_BLKD = heads("key", c.num_kv_heads, c.qk_norm)
    value_BLKD = heads("value", c.num_kv_heads, "")
    size = (c.num_kv_heads, c.head_dim)
    prefix = self.adapter.prefix(self, *size, self.dtype) or prefix
    heads = (query_BLHD, key_BLKD, value_BLKD)
    scores = Scores(c.attention_scale or None, c.attention_cap)
    out, written = attend(*heads, inputs, prefix, slots, self.kernel, scores)
    out = out.reshape(*x.shape[:2], c.num_heads * c.head_dim)
    self.sow("intermediates", "into_out", out)  # for whoever asks what enters there
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
    self.sow("intermediates", "into_down", h)
    return project(c.hidden_size, c.mlp_bias, name="down")(h)


class Experts(nn.Module):
  """Several gated MLPs, of which a router chooses some for each token.

  Their weights are one array [E, in, out] a projection; online modules leave them be.
  """

  config: ModelConfig
  adapter: Adapter
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
    c = self.config
    sizes = {
      "router": (c.hidden_size, c.experts),
      "experts_gate": (c.experts, c.hidden_size, c.mlp_size),
      "experts_up": (c.experts, c.hidden_size, c.mlp_size),
      "experts_down": (c.experts, c.mlp_size, c.hidden_size),
    }
    weights = {
      name: _Kernel(size, c.init_std, name=name)() for name, size in sizes.items()
    }
    how = (c.experts_per_token, c.normalize_experts, _ACTIVATIONS[c.activation])
    return recomputed(functools.partial(mixture, how=how))(x, weights)


class _Kernel(nn.Module):
  """A weight alone, for whoever multiplies by it in a way of his own.

  Its call gives (kernel, its scale where it is quantised).
  """

  shape: tuple[int, ...]
  std: float

  @nn.compact
  def __call__(self) -> tuple[Num[Array, "..."], Float[Array, "..."] | None]:
    kernel = self.param("kernel", nn.initializers.normal(self.std), self.shape)
    return kernel, self.get_variable("params", int8.SCALE)


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
    if self.has_variable("params", int8.SCALE):
      y = int8.project(x, kernel, self.get_variable("params", int8.SCALE))
    else:
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
  def __call__(self, x: Float[Array, "B L *H D"]) -> Float[Array, "B L *H D"]:
    from_one, bias = self.config.norm_from_one, None
    init = nn.initializers.zeros if from_one else nn.initializers.ones
    scale = self.param("scale", init, (x.shape[-1],))
    if self.config.norm == "layernorm":
      bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
    eps = self.config.norm_eps
    normalize = functools.partial(_normalize, eps=eps, from_one=from_one)
    return recomputed(normalize)(x, scale, bias).astype(self.dtype)


def _normalize(
  x: Float[Array, "B L *H D"],
  scale: Float[Array, " D"],
  bias: Float[Array, " D"] | None,
  eps: float,
  from_one: bool,
) -> Float[Array, "B L *H D"]:
  """LayerNorm, or RMSNorm where there is no bias; in float32."""
  h = x.astype(jnp.float32)
  if bias is not None:
    h -= h.mean(-1, keepdims=True)
  h *= jax.lax.rsqrt(jnp.square(h).mean(-1, keepdims=True) + eps)
  lead = (None,) * (x.ndim - 1)
  scale = scale.astype(jnp.float32)
  h *= (scale + 1 if from_one else scale)[lead]
  return h if bias is None else h + bias[lead]
