"""Attention on given queries, keys and values: masks and the cache.

Notable features:
  one mask rule for padding on either side and for packed rows: a token sees earlier
    tokens of its own segment, those in its window where there is one, segment 0 is
    padding;
  layers of different kinds (windows, rotary bases) are one program: the scan picks each
    layer's mask and angles by the number of its kind;
  a prefix of keys and values that belongs to no token is visible to every position
    of every segment, and never enters the cache;
  the key-value cache is an argument and a result, written in place by XLA.

Plain functions: the modules that own the parameters are in `block.py`.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from okd_jax.models import kernels
from okd_jax.models.config import LayerKind, ModelConfig
from okd_jax.models.rope import Ids, Rotation, rotate, rotation

Length = Int[Array, ""] | int  # a plain number where it is known while tracing


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
  length: Length


def init_cache(
  config: ModelConfig, batch: int, slots: int, dtype: DTypeLike = jnp.float32
) -> Cache:
  """An empty cache for `batch` rows of at most `slots` tokens each."""
  shape = (config.num_layers, batch, config.num_kv_heads, config.head_dim, slots)
  return Cache(
    key=jnp.zeros(shape, dtype),
    value=jnp.zeros(shape, dtype),
    segment_ids=jnp.zeros((batch, slots), jnp.int32),
    length=0,
  )


class Inputs(NamedTuple):
  """What attention gets beside heads, computed once: see `attention_inputs`.

  rotation: of each token, None without rotary positions.
  mask: which keys a query sees.
  segment_ids: what the mask was made of, for kernels that make their own.
  window: likewise; None where only the scan knows it.
  """

  rotation: Rotation | None
  mask: Bool[Array, "B 1 L S"]
  segment_ids: Int[Array, "B L"]
  window: int | None = 0


class Kinds(NamedTuple):
  """`Inputs` of each kind of layer.

  inputs: those that all layers share, or what `at` finds the layers' own in.
  rotations, masks: of each kind, stacked; None where all layers have the same.
  """

  inputs: Inputs
  rotations: Rotation | None = None
  masks: Bool[Array, "kinds B 1 L S"] | None = None

  def at(self, kind: Int[Array, ""]) -> Inputs:
    """The inputs of layers of this kind, by its number in `ModelConfig.kinds`."""
    inputs = self.inputs
    if self.rotations is not None:
      inputs = inputs._replace(rotation=jax.tree.map(lambda x: x[kind], self.rotations))
    if self.masks is not None:
      inputs = inputs._replace(mask=self.masks[kind])
    return inputs


class Slots(NamedTuple):
  """Where a layer finds its part of the cache: all layers' stores and its index."""

  key: Float[Array, "N B K D S"]
  value: Float[Array, "N B K D S"]
  layer: Int[Array, ""]
  length: Length


def attend(
  query_BLHD: Float[Array, "B L H D"],
  key_BLKD: Float[Array, "B L K D"],
  value_BLKD: Float[Array, "B L K D"],
  inputs: Inputs,
  prefix: tuple[Float[Array, "#B m K D"], Float[Array, "#B m K D"]] | None = None,
  slots: Slots | None = None,
  kernel: str = "xla",
  scores: kernels.Scores = kernels.PLAIN,
) -> tuple[Float[Array, "B L H D"], tuple[Float[Array, "..."], Float[Array, "..."]]]:
  """Grouped-query attention; scores and softmax in float32.

  Args:
    prefix: keys and values before all others. Keys are taken as they are: turned for
      their positions, if they have any.
    slots: the layer's part of the cache, where there is one.
    kernel: of `kernels.KERNELS`, or '' for the platform's; XLA's where it cannot do it.
    scores: what is done to them before the softmax.

  Returns:
    (out, (keys, values)): the latter as the new tokens have them, turned, or with
    `slots` all layers' stores with these written into them.
  """
  mask = inputs.mask
  if inputs.rotation is not None:
    query_BLHD = rotate(query_BLHD, inputs.rotation)
    key_BLKD = rotate(key_BLKD, inputs.rotation)
  written = (key_BLKD, value_BLKD)
  if slots is not None:
    key_BLKD, value_BLKD, written = _write(slots, key_BLKD, value_BLKD)
  if prefix is not None:
    key_BLKD, value_BLKD = map(_prepend, prefix, (key_BLKD, value_BLKD))
    width = ((0, 0), (0, 0), (0, 0), (prefix[0].shape[1], 0))
    mask = jnp.pad(mask, width, constant_values=True)
  heads = (query_BLHD, key_BLKD, value_BLKD)
  sizes = (query_BLHD.shape[3], query_BLHD.shape[1], key_BLKD.shape[1])
  form = kernels.Form(query_BLHD.dtype, *sizes, scores.cap, inputs.window)
  kernel = kernels.choose(kernel, form, cached=slots is not None)
  return _by_kernel(kernel, heads, inputs._replace(mask=mask), scores), written


def _by_kernel(
  kernel: str,
  heads: tuple[Float[Array, "..."], ...],
  inputs: Inputs,
  scores: kernels.Scores,
) -> Float[Array, "B L H D"]:
  match kernel:
    case "splash":
      segments = inputs.segment_ids
      return kernels.splash(*heads, segments, scores, inputs.window or 0)
    case "cudnn":
      return kernels.cudnn(*heads, inputs.mask, scores)
  xla = functools.partial(kernels.xla, mask=inputs.mask, scores=scores)
  return recomputed(xla)(*heads)


def recomputed(function: Callable) -> Callable:
  """`function`, of which the backward pass keeps the arguments and nothing else.

  For what costs little arithmetic beside the arrays it makes on its way.
  """
  return jax.checkpoint(function, prevent_cse=False)


def _prepend(
  prefix: Float[Array, "#B m K D"], keys_BSKD: Float[Array, "B S K D"]
) -> Float[Array, "B T K D"]:
  batch, _, *heads = keys_BSKD.shape
  prefix = jnp.broadcast_to(prefix, (batch, prefix.shape[1], *heads))
  return jnp.concatenate([prefix.astype(keys_BSKD.dtype), keys_BSKD], axis=1)


def positions_from_segments(segment_ids: Ids) -> Int[Array, "B L"]:
  """0, 1, 2, … from the first token of each segment; padding counts on harmlessly."""
  index = jnp.arange(segment_ids.shape[1])[None]
  previous = jnp.pad(segment_ids, ((0, 0), (1, 0)))[:, :-1]
  starts = jnp.where(segment_ids != previous, index, 0)
  return index - jax.lax.cummax(starts, axis=1)


def attention_inputs(
  config: ModelConfig,
  segment_ids: Ids,
  positions: Ids,
  cache: Cache | None = None,
) -> Kinds:
  """Angles and masks of new tokens; with a cache, one that `extend` has marked."""
  length = segment_ids.shape[1]
  seen_ids, offset = segment_ids, 0
  if cache is not None:
    seen_ids, offset = cache.segment_ids, cache.length
    seen_ids = seen_ids[:, : _visible(offset, length, seen_ids.shape[1])]
  index, size = jnp.arange(length) + offset, seen_ids.shape[1]

  def mask(window: int) -> Bool[Array, "B 1 L S"]:
    return _causal_mask(index, segment_ids, seen_ids, window)

  def turned(kind: LayerKind) -> Rotation | None:
    rotary = config.position == "rope"
    return rotation(config, kind, positions, segment_ids) if rotary else None

  kinds, window = config.kinds, config.window(size)
  rotations = [turned(kind) for kind in kinds]
  masks = [mask(kind.window) for kind in kinds] if window is None else [mask(window)]
  first = Inputs(rotations[0], masks[0], segment_ids, window)
  if len(kinds) == 1:
    return Kinds(first)
  return Kinds(
    first,
    jax.tree.map(lambda *each: jnp.stack(each), *rotations),
    jnp.stack(masks) if window is None else None,
  )


def _causal_mask(
  index: Int[Array, " L"],
  segment_ids: Ids,
  seen_ids: Int[Array | np.ndarray, "B S"],
  window: int,
) -> Bool[Array, "B 1 L S"]:
  seen = jnp.arange(seen_ids.shape[1])
  causal = seen[None, None, :] <= index[None, :, None]
  if window:
    causal &= seen[None, None, :] > index[None, :, None] - window
  same = segment_ids[:, :, None] == seen_ids[:, None, :]
  real = seen_ids[:, None, :] != 0
  # A padding query sees itself alone: a row without any key would be all NaN.
  itself = seen[None, None, :] == index[None, :, None]
  return ((causal & same & real) | itself)[:, None]


def extend(cache: Cache, segment_ids: Ids) -> Cache:
  """Marks the slots that L new tokens will take; `length` grows once they have."""
  start = (jnp.zeros((), jnp.int32), cache.length)
  ids = jax.lax.dynamic_update_slice(cache.segment_ids, segment_ids, start)
  return cache._replace(segment_ids=ids)


def _write(
  slots: Slots, key_BLKD: Float[Array, "B L K D"], value_BLKD: Float[Array, "B L K D"]
) -> tuple[
  Float[Array, "B S K D"],
  Float[Array, "B S K D"],
  tuple[Float[Array, "N B K D slots"], Float[Array, "N B K D slots"]],
]:
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


def _visible(length: Length, new: int, slots: int) -> int:
  """How many slots can hold anything after `new` more tokens."""
  return length + new if isinstance(length, int) else slots
