"""One decoder for every family: hidden states in, `ModelConfig` decides the rest.

Notable features:
  layers are stacked on a leading axis and scanned, so compile time does not grow
    with depth;
  the backbone stops at the final norm; whoever needs logits applies the head, so a
    loss can do so chunk by chunk (`losses.chunked`);
  one attention mask rule for padding on either side and for packed rows: a token
    sees earlier tokens of its own segment, segment 0 is padding;
  online modules of the top k layers live in the collection `adapter`; the layers
    below them are scanned on their own and cost no backward pass;
  the key-value cache is an argument and a result, written in place by XLA.

No sharding annotations here: `sharding.py` does it by parameter path.
"""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from okd_jax.adapters import AdapterConfig, lora_delta
from okd_jax.losses import Output
from okd_jax.models.config import ModelConfig, RopeScaling

_ACTIVATIONS = {
  "gelu": functools.partial(nn.gelu, approximate=False),
  "gelu_tanh": functools.partial(nn.gelu, approximate=True),
  "relu": nn.relu,
  "silu": nn.silu,
}


class Cache(NamedTuple):
  """Keys and values of the tokens seen so far: the first `length` of S slots.

  `segment_ids` marks which slots hold real tokens, so that left padding stays
  invisible. `length` is a plain number as long as it is known while tracing: the
  first pass then attends to the slots it fills and not to all S. Slots come last
  because that is how the attention's products read them; any other order makes XLA
  transpose a layer's whole cache for every token (4 times slower on a CPU).
  """

  key: Float[Array, "N B K D S"]
  value: Float[Array, "N B K D S"]
  segment_ids: Int[Array, "B S"]
  length: Int[Array, ""] | int


def init_cache(config: ModelConfig, batch: int, slots: int, dtype=jnp.float32) -> Cache:
  """An empty cache for `batch` rows of at most `slots` tokens each."""
  shape = (config.num_layers, batch, config.num_kv_heads, config.head_dim, slots)
  return Cache(
    key=jnp.zeros(shape, dtype),
    value=jnp.zeros(shape, dtype),
    segment_ids=jnp.zeros((batch, slots), jnp.int32),
    length=0,
  )


class Decoder(nn.Module):
  """Tokens to hidden states after the final norm.

  Attributes:
    config: the model's shape.
    adapter: the online module of the top layers, or None for the plain model.
    dtype: of activations and matmuls; parameters keep their own.
    remat: recompute each layer in the backward pass instead of storing it.
    dropout: rate on the embeddings and on each residual branch's output; needs
      the rng 'dropout' unless it is 0.
  """

  config: ModelConfig
  adapter: AdapterConfig | None = None
  dtype: jnp.dtype = jnp.float32
  remat: bool = False
  dropout: float = 0.0

  @nn.compact
  def __call__(
    self,
    tokens: Int[Array, "B L"],
    segment_ids: Int[Array, "B L"] | None = None,
    positions: Int[Array, "B L"] | None = None,
    cache: Cache | None = None,
  ) -> tuple[Float[Array, "B L D"], Cache | None]:
    config = self.config
    if segment_ids is None:
      segment_ids = jnp.ones_like(tokens)
    if positions is None:
      positions = positions_from_segments(segment_ids)
    x = nn.Embed(
      config.vocab_size,
      config.hidden_size,
      dtype=self.dtype,
      embedding_init=nn.initializers.normal(config.init_std),
      name="embed",
    )(tokens)
    if config.position == "learned":
      x += nn.Embed(
        config.max_length,
        config.hidden_size,
        dtype=self.dtype,
        embedding_init=nn.initializers.normal(config.init_std),
        name="position_embed",
      )(positions)
    if not config.tie_embeddings:
      self.param(
        "head",
        nn.initializers.normal(config.init_std),
        (config.vocab_size, config.hidden_size),
      )
    x = nn.Dropout(self.dropout, deterministic=self.dropout == 0)(x)
    x, cache = self._layers(x, segment_ids, positions, cache)
    return _Norm(config, self.dtype, name="norm")(x), cache

  def _layers(self, x, segment_ids, positions, cache):
    """Scans the stacked layers; those below the lowest adapted one first."""
    total = self.config.num_layers
    adapted = self.adapter.num_layers(total) if self.adapter else 0
    plain, block = (
      Block(self.config, module, self.dtype, self.dropout, parent=None)
      for module in (None, self.adapter)
    )
    params = self.param("layers", lambda key: _init_stack(plain, "params", key, total))
    adapter = {}
    if adapted:
      adapter = self.variable(
        "adapter",
        "layers",
        lambda: _init_stack(block, "adapter", self.make_rng("params"), adapted),
      ).value
    dropout = self.make_rng("dropout") if self.dropout else None
    if cache is not None:
      cache = _extend(cache, segment_ids)
    inputs = _attention_inputs(self.config, segment_ids, positions, cache)

    def body(layer, carry, xs):
      h, keys, values = carry
      index, weights, modules = xs
      rngs = {"dropout": jax.random.fold_in(dropout, index)} if self.dropout else {}
      slots = None if keys is None else (keys, values, index, cache.length)
      h, written = layer.apply(
        {"params": weights, "adapter": modules}, h, inputs, slots, rngs=rngs
      )
      return (h, *written), None

    carry = (x, None, None) if cache is None else (x, cache.key, cache.value)
    low = total - adapted
    for layer, start, stop, modules in (
      (plain, 0, low, {}),
      (block, low, total, adapter),
    ):
      if start < stop:
        step = functools.partial(body, layer)
        step = jax.checkpoint(step, prevent_cse=False) if self.remat else step
        weights = jax.tree.map(lambda w: w[start:stop], params)  # noqa: B023
        carry, _ = jax.lax.scan(
          step, carry, (jnp.arange(start, stop), weights, modules)
        )
    if cache is None:
      return carry[0], None
    x, keys, values = carry
    length = cache.length + segment_ids.shape[1]
    return x, Cache(keys, values, cache.segment_ids, length)


class Block(nn.Module):
  """One pre-norm layer: attention, then the MLP, each added to its input."""

  config: ModelConfig
  adapter: AdapterConfig | None
  dtype: jnp.dtype
  dropout: float = 0.0

  @nn.compact
  def __call__(self, x, inputs, slots):
    drop = nn.Dropout(self.dropout, deterministic=self.dropout == 0)
    common = (self.config, self.adapter, self.dtype)
    h = _Norm(self.config, self.dtype, name="attention_norm")(x)
    h, written = Attention(*common, name="attention")(h, inputs, slots)
    x += drop(h)
    h = _Norm(self.config, self.dtype, name="mlp_norm")(x)
    return x + drop(MLP(*common, name="mlp")(h)), written


class Attention(nn.Module):
  """Grouped-query attention; scores and softmax in float32."""

  config: ModelConfig
  adapter: AdapterConfig | None
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x, inputs, slots):
    c = self.config
    rotation, mask = inputs
    project = functools.partial(_Projection, c, self.adapter, self.dtype)
    query_BLHD = _heads(
      project(c.num_heads * c.head_dim, c.qkv_bias, name="query")(x), c.num_heads
    )
    width = c.num_kv_heads * c.head_dim
    key_BLKD = _heads(project(width, c.qkv_bias, name="key")(x), c.num_kv_heads)
    value_BLKD = _heads(project(width, c.qkv_bias, name="value")(x), c.num_kv_heads)
    if rotation is not None:
      query_BLHD = rotate(query_BLHD, *rotation)
      key_BLKD = rotate(key_BLKD, *rotation)
    written = (None, None)
    if slots is not None:
      key_BLKD, value_BLKD, written = _write(slots, key_BLKD, value_BLKD)
    out = jax.nn.dot_product_attention(query_BLHD, key_BLKD, value_BLKD, mask=mask)
    out = out.reshape(*x.shape[:2], c.num_heads * c.head_dim)
    return project(c.hidden_size, c.out_bias, name="out")(out), written


class MLP(nn.Module):
  """Gated (SwiGLU-like) or plain two-layer perceptron."""

  config: ModelConfig
  adapter: AdapterConfig | None
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x):
    c = self.config
    project = functools.partial(_Projection, c, self.adapter, self.dtype)
    h = project(c.mlp_size, c.mlp_bias, name="up")(x)
    activate = _ACTIVATIONS[c.activation]
    if c.gated_mlp:
      h = activate(project(c.mlp_size, c.mlp_bias, name="gate")(x)) * h
    else:
      h = activate(h)
    return project(c.hidden_size, c.mlp_bias, name="down")(h)


class _Projection(nn.Module):
  """A dense layer, plus its online module where the adapter names this one."""

  config: ModelConfig
  adapter: AdapterConfig | None
  dtype: jnp.dtype
  features: int
  use_bias: bool

  @nn.compact
  def __call__(self, x):
    init = nn.initializers.normal(self.config.init_std)
    kernel = self.param("kernel", init, (x.shape[-1], self.features))
    y = x @ kernel.astype(self.dtype)
    if self.use_bias:
      bias = self.param("bias", nn.initializers.zeros, (self.features,))
      y += bias.astype(self.dtype)[None, None]
    if self.adapter and self.name in self.adapter.targets:
      y += lora_delta(self, self.adapter, x, self.features)
    return y


class _Norm(nn.Module):
  """LayerNorm or RMSNorm, computed in float32."""

  config: ModelConfig
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x):
    scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
    h = x.astype(jnp.float32)
    if self.config.norm == "layernorm":
      h -= h.mean(-1, keepdims=True)
    h *= jax.lax.rsqrt(jnp.square(h).mean(-1, keepdims=True) + self.config.norm_eps)
    h *= scale.astype(jnp.float32)[None, None]
    if self.config.norm == "layernorm":
      h += self.param("bias", nn.initializers.zeros, (x.shape[-1],))[None, None]
    return h.astype(self.dtype)


def _init_stack(block: Block, collection: str, key, count: int):
  """`count` independent draws of one collection of `block`, stacked on axis 0."""
  x = jnp.zeros((1, 1, block.config.hidden_size), block.dtype)
  segment_ids = jnp.ones((1, 1), jnp.int32)
  inputs = _attention_inputs(block.config, segment_ids, segment_ids * 0, None)
  layer = block.clone(dropout=0.0)
  return jax.vmap(lambda k: layer.init({"params": k}, x, inputs, None)[collection])(
    jax.random.split(key, count)
  )


def positions_from_segments(segment_ids: Int[Array, "B L"]) -> Int[Array, "B L"]:
  """0, 1, 2, … from the first token of each segment; padding counts on harmlessly."""
  index = jnp.arange(segment_ids.shape[1])[None]
  previous = jnp.pad(segment_ids, ((0, 0), (1, 0)))[:, :-1]
  starts = jnp.where(segment_ids != previous, index, 0)
  return index - jax.lax.cummax(starts, axis=1)


def rope_frequencies(config: ModelConfig) -> Float[Array, " half"]:
  """Angular frequency of each pair of head channels, in radians per position.

  RoFormer, Su et al. 2021, arXiv 2104.09864; LLaMA-3's stretch where the config
  asks for it.
  """
  half = config.head_dim // 2
  exponents = jnp.arange(half, dtype=jnp.float32) / half
  frequencies = 1.0 / config.rope_theta**exponents
  scaling = config.rope_scaling
  return _scale_frequencies(frequencies, scaling) if scaling else frequencies


def _scale_frequencies(frequencies, scaling: RopeScaling):
  if scaling.kind == "linear":
    return frequencies / scaling.factor
  turns = scaling.original_max_length * frequencies / (2 * jnp.pi)
  low, high = scaling.low_freq_factor, scaling.high_freq_factor
  keep = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
  return keep * frequencies + (1 - keep) * frequencies / scaling.factor


def rotate(
  x_BLHD: Float[Array, "B L H D"],
  cos: Float[Array, "B L half"],
  sin: Float[Array, "B L half"],
) -> Float[Array, "B L H D"]:
  """Turns channel i against channel i + D/2 by the position's angle (HF layout)."""
  first, second = jnp.split(x_BLHD.astype(jnp.float32), 2, axis=-1)
  cos, sin = cos[:, :, None], sin[:, :, None]
  turned = (first * cos - second * sin, second * cos + first * sin)
  return jnp.concatenate(turned, axis=-1).astype(x_BLHD.dtype)


def _attention_inputs(config, segment_ids, positions, cache):
  """(rotation, mask): what is the same in all layers, computed once."""
  rotation = None
  if config.position == "rope":
    frequencies = rope_frequencies(config)[None, None]
    angles = positions[..., None].astype(jnp.float32) * frequencies
    rotation = (jnp.cos(angles), jnp.sin(angles))
  index = jnp.arange(segment_ids.shape[1])
  seen_ids, offset = segment_ids, 0
  if cache is not None:
    seen_ids, offset = cache.segment_ids, cache.length
    seen_ids = seen_ids[:, : _visible(offset, *index.shape, seen_ids.shape[1])]
  return rotation, _causal_mask(index + offset, segment_ids, seen_ids)


def _causal_mask(index, segment_ids, seen_ids) -> Bool[Array, "B 1 L S"]:
  seen = jnp.arange(seen_ids.shape[1])
  causal = seen[None, None, :] <= index[None, :, None]
  same = segment_ids[:, :, None] == seen_ids[:, None, :]
  real = seen_ids[:, None, :] != 0
  # A padding query sees itself alone: a row without any key would be all NaN.
  itself = seen[None, None, :] == index[None, :, None]
  return ((causal & same & real) | itself)[:, None]


def _extend(cache: Cache, segment_ids) -> Cache:
  start = (jnp.zeros((), jnp.int32), cache.length)
  ids = jax.lax.dynamic_update_slice(cache.segment_ids, segment_ids, start)
  return cache._replace(segment_ids=ids)


def _write(slots, key_BLKD, value_BLKD):
  """Puts this layer's new keys and values into the cache and returns all of them."""
  *stores, layer, length = slots
  zero = jnp.zeros((), jnp.int32)
  start = (layer, zero, zero, zero, length)
  seen = _visible(length, key_BLKD.shape[1], stores[0].shape[-1])
  read, written = [], []
  for store_NBKDS, new_BLKD in zip(stores, (key_BLKD, value_BLKD), strict=True):
    new = new_BLKD.transpose(0, 2, 3, 1)[None].astype(store_NBKDS.dtype)
    store_NBKDS = jax.lax.dynamic_update_slice(store_NBKDS, new, start)
    all_BKDS = store_NBKDS[layer, ..., :seen].astype(new_BLKD.dtype)
    read.append(all_BKDS.transpose(0, 3, 1, 2))
    written.append(store_NBKDS)
  return *read, tuple(written)


def _visible(length, new: int, slots: int) -> int:
  """How many slots can hold anything after `new` more tokens."""
  return length + new if isinstance(length, int) else slots


def _heads(x, heads: int):
  return x.reshape(*x.shape[:2], heads, -1)


def head_kernel(params, config: ModelConfig) -> Float[Array, "V D"]:
  """The unembedding matrix: the tied embedding or the model's own head."""
  return params["embed"]["embedding"] if config.tie_embeddings else params["head"]


def output(decoder: Decoder, variables, batch, key=None) -> Output:
  """A decoder's hidden states on a batch, and the head that makes logits of them.

  variables: {'params': …} or, for an adapted teacher, also {'adapter': …}.
  batch: 'tokens' and 'segment_ids', both [B, L].
  key: of dropout, where the decoder has any.
  """
  hidden, _ = decoder.apply(
    variables,
    batch["tokens"],
    batch["segment_ids"],
    rngs={"dropout": key} if decoder.dropout else {},
  )
  return Output(hidden, head_kernel(variables["params"], decoder.config))
