"""One decoder for every family: hidden states in, `ModelConfig` decides the rest.

Notable features:
  layers are stacked on a leading axis and scanned, so compile time does not grow
    with depth;
  the backbone stops at the final norm; whoever needs logits applies the head, so a
    loss can do so chunk by chunk (`losses.chunked`);
  masks, positions and the key-value cache are those of `attention.py`;
  online modules of the top k layers live in the collection `adapter`; the layers
    below them are scanned on their own and cost no backward pass; what a module adds
    and which layers are alike, it says itself (`adapters.base`);
  virtual tokens come before all others and so depend on none of them: they run through
    the layers once, in a batch of one, and the real tokens see their keys and values as
    a prefix. Lengths and the cache stay as they are;
  a pass may stop below some layer and go on from there later, even in a decoder of
    nothing but the layers above.

Of shardings one is said here, that the residual stream is divided by rows (`by_rows`);
`sharding.py` says all others, by parameter path.
"""

import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from okd_jax.data.batch import Batch
from okd_jax.losses import Output, soft_cap, unembed
from okd_jax.models.adapters import Adapter
from okd_jax.models.adapters.base import Run, Tree
from okd_jax.models.attention import (
  Cache,
  Kinds,
  Slots,
  attention_inputs,
  extend,
  init_cache,
  positions_from_segments,
)
from okd_jax.models.block import Block, Norm, Stores
from okd_jax.models.config import ModelConfig
from okd_jax.runtime.sharding import by_rows, with_whole_rows

__all__ = [
  "Cache",
  "Decoder",
  "Mix",
  "head_kernel",
  "init_cache",
  "logits",
  "output",
  "positions_from_segments",
]


_PLAIN = Adapter()


class Mix(NamedTuple):
  """A second text to mix into the first one's embeddings, token by token.

  The embedding becomes share * e(the first) + (1 - share) * e(tokens) (MixKD, Liang
  et al. 2021, arXiv 2011.00593).
  """

  tokens: Int[Array | np.ndarray, "B L"]
  share: Float[Array, "B L"]


class Decoder(nn.Module):
  """Tokens to hidden states after the final norm.

  Attributes:
    config: the model's shape.
    adapter: the online module of the top layers, or None for the plain model.
    dtype: of activations and matmuls; parameters keep their own.
    remat: recompute each layer in the backward pass instead of storing it.
    dropout: rate on the embeddings and on each residual branch's output; needs
      the rng 'dropout' unless it is 0.
    attention: the kernel, of `kernels.KERNELS`; '' is the platform's.
    only_top: whether these are the top layers of a deeper model, to be entered by
      `hidden` alone.
    frozen: whether nobody trains the parameters, but for an adapter's.
  """

  config: ModelConfig
  adapter: Adapter | None = None
  dtype: DTypeLike = jnp.float32
  remat: bool = False
  dropout: float = 0.0
  attention: str = ""
  only_top: bool = False
  frozen: bool = False

  @nn.compact
  def __call__(
    self,
    tokens: Int[Array | np.ndarray, "B L"],
    segment_ids: Int[Array | np.ndarray, "B L"] | None = None,
    positions: Int[Array | np.ndarray, "B L"] | None = None,
    cache: Cache | None = None,
    *,
    mix: Mix | None = None,
    hidden: Float[Array, "B L D"] | None = None,
    start: int = 0,
    stop: int | None = None,
  ) -> tuple[Float[Array, "B L E"], Cache | None]:
    """Hidden states, of the width that the head has, and the cache if there was one.

    hidden: what enters layer `start`; the embedding and all below is skipped.
    stop: the layer to stop before; the result is what enters it [B, L, D], without
      the norm.
    """
    total = self.config.num_layers
    stop = total if stop is None else stop
    self._check(cache, mix, hidden, start, stop)
    if segment_ids is None:
      segment_ids = jnp.ones_like(tokens)
    if positions is None:
      positions = positions_from_segments(segment_ids)
    # Initialising makes all parameters, whatever part is asked for.
    if hidden is None or self.is_initializing():
      x = self._embed(tokens, positions, mix)
    else:
      x = hidden.astype(self.dtype)
    x, cache = self._layers(by_rows(x), segment_ids, positions, cache, start, stop)
    if stop < total and not self.is_initializing():
      return x, cache
    return self._last(x), cache

  def _last(self, x: Float[Array, "B L D"]) -> Float[Array, "B L E"]:
    """What the head is applied to: of the width of the tokens' vectors."""
    config = self.config
    if config.final_norm:
      x = Norm(config, self.dtype, name="norm")(x)
    if config.embed_size != config.hidden_size:
      x = self._projection("narrow", config.embed_size)(x)
    return x if config.logit_divisor == 1 else x / config.logit_divisor

  def _projection(self, name: str, features: int) -> nn.Dense:
    """Between the width of the layers and that of the tokens' vectors."""
    init = nn.initializers.normal(self.config.init_std)
    return nn.Dense(features, False, self.dtype, kernel_init=init, name=name)

  @nn.nowrap
  def _check(
    self,
    cache: Cache | None,
    mix: Mix | None,
    hidden: Float[Array, "B L D"] | None,
    start: int,
    stop: int,
  ) -> None:
    """Raises a ValueError for a part of a pass that cannot be had."""
    total = self.config.num_layers
    if not 0 <= start <= stop <= total:
      raise ValueError(f"layers {start} to {stop} of {total} are none")
    if hidden is None and start:
      raise ValueError(f"start={start} needs the hidden states that enter that layer")
    if self.only_top and hidden is None:
      raise ValueError("the layers below were dropped; give what enters these")
    if hidden is not None and mix is not None:
      raise ValueError("mix is of embeddings, which hidden takes the place of")
    if cache is not None and (hidden is not None or stop < total):
      raise ValueError("a part of the layers cannot be combined with a cache")
    module = self.adapter or _PLAIN
    if module.whole and (start or stop < total):
      raise ValueError(
        f"a {module.kind}'s virtual tokens must pass through all layers at once"
      )

  def _embed(
    self,
    tokens: Int[Array | np.ndarray, "B L"],
    positions: Int[Array, "B L"],
    mix: Mix | None,
  ) -> Float[Array, "B L D"]:
    """Input vectors of tokens at positions; declares the head beside them."""
    config = self.config
    init = nn.initializers.normal(config.init_std)
    make = functools.partial(nn.Embed, dtype=self.dtype, embedding_init=init)
    embed = make(config.vocab_size, config.embed_size, name="embed")
    x = _looked_up(embed, tokens, not self.frozen)
    if mix is not None:
      share = mix.share.astype(self.dtype)[..., None]
      x = share * x + (1 - share) * _looked_up(embed, mix.tokens, not self.frozen)
    if config.embed_scale != 1:
      x *= jnp.asarray(config.embed_scale, self.dtype)
    if config.embed_size != config.hidden_size:
      x = self._projection("widen", config.hidden_size)(x)
    if config.position == "learned":
      places = make(config.max_length, config.hidden_size, name="position_embed")
      x += _looked_up(places, positions, not self.frozen)
    if not config.tie_embeddings:
      self.param("head", init, (config.vocab_size, config.embed_size))
    return nn.Dropout(self.dropout, deterministic=self.dropout == 0)(x)

  def _layers(
    self,
    x: Float[Array, "B L D"],
    segment_ids: Int[Array | np.ndarray, "B L"],
    positions: Int[Array | np.ndarray, "B L"],
    cache: Cache | None,
    start: int,
    stop: int,
  ) -> tuple[Float[Array, "B L D"], Cache | None]:
    """Scans the layers from `start` to `stop`; plain and adapted ones apart."""
    if cache is not None:
      cache = extend(cache, segment_ids)
    virtual, virtual_inputs = self._virtual()
    kinds = self.config.kinds
    of_layer = [kinds.index(kind) for kind in self.config.layer_kinds]
    of_layer = jnp.array(of_layer or [0] * self.config.num_layers)
    common = _Common(
      inputs=attention_inputs(self.config, segment_ids, positions, cache),
      virtual_inputs=virtual_inputs,
      length=None if cache is None else cache.length,
      dropout=self.make_rng("dropout") if self.dropout else None,
      real=segment_ids != 0 if self.is_mutable_collection("intermediates") else None,
    )
    carry = (x, virtual, None if cache is None else (cache.key, cache.value))
    for block, run in self._runs(start, stop):
      step = functools.partial(_step, block, common)
      step = jax.checkpoint(step, prevent_cse=False) if self.remat else step
      index = jnp.arange(run.first, run.last)
      xs = (index, of_layer[run.first : run.last], run.layers, run.modules)
      carry, sums = jax.lax.scan(step, carry, xs)
      if common.real is not None:
        self.sow("intermediates", "layers", sums)
    x, _, stores = carry
    if cache is None:
      return x, None
    return x, Cache(*stores, cache.segment_ids, cache.length + segment_ids.shape[1])

  def _virtual(self) -> tuple[Float[Array, "1 m D"] | None, Kinds | None]:
    """Virtual tokens' vectors and attention inputs; None where there are none.

    They stand at -m … -1, so that the real ones keep their positions, and have no
    learned position: what that would add, their vectors can learn.
    """
    module = self.adapter or _PLAIN
    x = module.virtual(self, self.config.hidden_size, self.dtype)
    if x is None:
      return None, None
    index = jnp.arange(x.shape[1])[None]
    ones = jnp.ones_like(index)
    return x, attention_inputs(self.config, ones, index - x.shape[1])

  def _runs(self, start: int, stop: int) -> Iterator[tuple[Block, Run]]:
    """The runs of equal layers to scan, each with the layer that computes it."""
    total, module = self.config.num_layers, self.adapter or _PLAIN
    options = (self.dtype, self.dropout, self.attention)
    plain, adapted = (
      Block(self.config, each, *options, parent=None) for each in (_PLAIN, module)
    )
    if self.has_variable("params", "layers"):
      layers = self.get_variable("params", "layers")  # of any number format (`int8`)
    else:
      init = functools.partial(_init_stack, plain, "params", count=total)
      layers = self.param("layers", init)

    def draw(count: int) -> Tree:
      return _init_stack(adapted, "adapter", self.make_rng("params"), count)

    for run in module.runs(self, layers, draw, start, stop):
      yield adapted if run.modules else plain, run


def _looked_up(
  embed: nn.Embed, ids: Int[Array | np.ndarray, "B L"], trained: bool
) -> Float[Array, "B L D"]:
  """`embed` of ids, its rows whole where they are looked up."""
  table = embed.embedding.astype(embed.dtype)
  table = with_whole_rows(table, f"{embed.name}/embedding", trained)
  return jnp.take(table, ids, axis=0)


class _Common(NamedTuple):
  """What is the same in all layers of one pass."""

  inputs: Kinds
  virtual_inputs: Kinds | None
  length: Int[Array, ""] | int | None
  dropout: Array | None
  real: Bool[Array | np.ndarray, "B L"] | None


def _step(
  block: Block,
  common: _Common,
  carry: tuple[Float[Array, "B L D"], Float[Array, "1 m D"] | None, Stores | None],
  xs: tuple[Int[Array, ""], Int[Array, ""], Tree, Tree],
) -> tuple[tuple, Tree | None]:
  """One layer of the scan: the virtual tokens, where there are any, go first.

  Beside the carry, where somebody asks: over the real tokens, the sums of squares [F]
  of what the layer has sown.
  """
  x, virtual, stores = carry
  index, kind, weights, modules = xs
  rngs = {}
  if common.dropout is not None:
    rngs["dropout"] = jax.random.fold_in(common.dropout, index)
  variables = {"params": weights, "adapter": modules}
  apply = functools.partial(block.apply, variables, rngs=rngs)
  prefix, slots = None, None
  if virtual is not None:
    virtual, prefix = apply(virtual, common.virtual_inputs.at(kind))
  if stores is not None:
    slots = Slots(*stores, index, common.length)
  inputs = (x, common.inputs.at(kind), prefix, slots)
  sums = None
  if common.real is None:
    x, written = apply(*inputs)
  else:
    (x, written), seen = apply(*inputs, mutable=["intermediates"])
    real = common.real[..., None]
    sums = jax.tree.map(
      lambda h: jnp.sum(jnp.square(h.astype(jnp.float32)) * real, (0, 1)),
      seen["intermediates"],
    )
  return (by_rows(x), virtual, None if stores is None else written), sums


def _init_stack(block: Block, collection: str, key: Array, count: int) -> Tree:
  """`count` independent draws of one collection of `block`, stacked on axis 0."""
  x = jnp.zeros((1, 1, block.config.hidden_size), block.dtype)
  segment_ids = jnp.ones((1, 1), jnp.int32)
  inputs = attention_inputs(block.config, segment_ids, segment_ids * 0).inputs
  layer = block.clone(dropout=0.0)
  return jax.vmap(lambda k: layer.init({"params": k}, x, inputs)[collection])(
    jax.random.split(key, count)
  )


def logits(
  hidden: Float[Array, "*B D"], params: Tree, config: ModelConfig
) -> Float[Array, "*B V"]:
  """float32 logits of a decoder's hidden states, by its `params` and config."""
  return soft_cap(unembed(hidden, head_kernel(params, config)), config.logit_cap)


def head_kernel(params: Tree, config: ModelConfig) -> Float[Array | np.ndarray, "V D"]:
  """The unembedding matrix: the tied embedding or the model's own head."""
  return params["embed"]["embedding"] if config.tie_embeddings else params["head"]


def output(
  decoder: Decoder,
  variables: Mapping[str, Tree],
  batch: Batch,
  key: Array | None = None,
  as_teacher: bool = False,
  **kwargs: Any,
) -> Output:
  """A decoder's hidden states on a batch, and the head that makes logits of them.

  Args:
    decoder: with the online module, for an adapted teacher.
    variables: {'params': …} or, for an adapted teacher, also {'adapter': …}.
    batch: whose `tokens` and `segment_ids` [B, L] are read.
    key: of dropout, where the decoder has any.
    as_teacher: whether it reads `teacher_tokens`, where the batch has them; its states
      then come where the student predicts the same tokens of the answer.
    **kwargs: mix, hidden, start, stop, for the decoder. With `stop` the hidden states
      are those that enter that layer, on which the head makes no sense.
  """
  tokens, segment_ids = batch.tokens, batch.segment_ids
  own = as_teacher and batch.align is not None
  if own:
    tokens, segment_ids = batch.teacher_tokens, batch.teacher_segments
  hidden, _ = decoder.apply(
    variables,
    tokens,
    segment_ids,
    rngs={"dropout": key} if decoder.dropout else {},
    **kwargs,
  )
  if own and "stop" not in kwargs:  # else its own layers go on from there
    hidden = jnp.take_along_axis(hidden, batch.align[..., None], axis=1)
  config = decoder.config
  return Output(hidden, head_kernel(variables["params"], config), config.logit_cap)
