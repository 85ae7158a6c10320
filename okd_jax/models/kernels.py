"""Which program computes attention: XLA's own, cuDNN's, or splash attention on TPU.

Notable features:
  neither kernel holds the scores [B, H, L, S]: their memory grows with the length, not
    with its square (cuDNN's alone reads the mask, one for all heads, as a bias);
  whatever a kernel cannot compute falls to XLA call by call: a cache, a learned prefix,
    the short rows that parameters are drawn with;
  under a mesh each device runs the kernel on its own rows and heads.

The automatic choice goes by the machine's devices. `jax.lax.platform_dependent` would
leave it to the compiler, but the gradient of a choice keeps what every alternative
would keep, XLA's scores among it, and cuDNN's cannot be traced where there is no cuDNN.
So who compiles ahead of time, for devices that are not here, names the kernel.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from okd_jax.losses import soft_cap
from okd_jax.models.config import ModelConfig

KERNELS = ("xla", "cudnn", "splash")
_LANES = 128  # of a TPU's vectors: a block of splash attention is some of them
_BLOCKS = (512, 256, _LANES)  # queries or keys of a block, the best first
_ROWS, _HEADS = ("data", "fsdp"), ("tensor",)  # axes of the mesh that divide them


class Scores(NamedTuple):
  """What is done to scores before the softmax.

  scale: they are multiplied by it; None: 1 / sqrt(head_dim).
  cap: c tanh(x / c) takes their place; 0: it does not.
  """

  scale: float | None = None
  cap: float = 0.0


PLAIN = Scores()


class Form(NamedTuple):
  """What a kernel would compute.

  queries, keys: tokens of a row; there are more keys where there is a learned prefix.
  cap: of the scores, 0 for none.
  window: tokens that a query sees, 0 for all; None: it differs from layer to layer.
  """

  dtype: DTypeLike
  head_dim: int
  queries: int
  keys: int
  cap: float = 0.0
  window: int | None = 0


def form(config: ModelConfig, dtype: DTypeLike, length: int, prefix: int = 0) -> Form:
  """What attention of a model computes in rows of `length` tokens after a prefix."""
  keys = length + prefix
  sizes = (config.head_dim, length, keys)
  return Form(dtype, *sizes, config.attention_cap, config.window(keys))


def choose(kernel: str, form: Form, cached: bool = False) -> str:
  """`kernel`, the platform's if that is '', or 'xla' where this cannot compute it."""
  kernel = kernel or of_platform()
  return "xla" if cached or problem(kernel, form) else kernel


def of_platform() -> str:
  """The kernel of this machine's devices."""
  if jax.local_devices()[0].platform == "tpu":
    return "splash"
  return "cudnn" if _capability() >= 8 else "xla"


def _capability() -> float:
  """Of this machine's CUDA devices, 8 since Ampere, 9 since Hopper; 0 of any other."""
  device = jax.local_devices()[0]
  cuda = device.platform == "gpu" and "cuda" in device.client.platform_version
  return float(device.compute_capability) if cuda else 0.0


def problem(kernel: str, form: Form) -> str:
  """What keeps a kernel from computing this, whatever the platform; '' nothing."""
  dtype, head_dim = jnp.dtype(form.dtype).name, form.head_dim
  queries, keys = form.queries, form.keys
  if kernel == "cudnn":
    if form.cap:
      return "does not cap scores"
    largest = 256 if _capability() >= 9 else 128
    if dtype not in ("bfloat16", "float16"):
      return f"takes bfloat16 or float16, not {dtype}"
    if head_dim % 8 or head_dim > largest:
      return f"takes heads of up to {largest} channels, a multiple of 8, not {head_dim}"
    if queries % 2 or keys % 2:
      return f"takes rows of an even number of tokens, not {queries} (keys: {keys})"
  if kernel == "splash":
    if dtype not in ("bfloat16", "float32"):
      return f"takes bfloat16 or float32, not {dtype}"
    if queries != keys:
      return "takes no learned prefix"
    if queries % _LANES:
      return f"takes rows of a multiple of {_LANES} tokens, not {queries}"
    if form.window is None:
      return "takes one window for all layers"
  return ""


def xla(
  query_BLHD: Float[Array, "B L H D"],
  key_BSKD: Float[Array, "B S K D"],
  value_BSKD: Float[Array, "B S K D"],
  mask: Bool[Array, "B 1 L S"],
  scores: Scores = PLAIN,
) -> Float[Array, "B L H D"]:
  """Grouped-query attention in plain XLA."""
  if scores.cap:
    return _capped(query_BLHD, key_BSKD, value_BSKD, mask, scores)
  return jax.nn.dot_product_attention(
    query_BLHD, key_BSKD, value_BSKD, mask=mask, scale=scores.scale
  )


def _capped(
  query_BLHD: Float[Array, "B L H D"],
  key_BSKD: Float[Array, "B S K D"],
  value_BSKD: Float[Array, "B S K D"],
  mask: Bool[Array, "B 1 L S"],
  scores: Scores,
) -> Float[Array, "B L H D"]:
  """`jax.nn.dot_product_attention`, which has no cap, with one."""
  batch, length, heads, size = query_BLHD.shape
  groups = (batch, length, key_BSKD.shape[2], -1, size)
  query_BLKGD = query_BLHD.reshape(groups)
  found = jnp.einsum(
    "blkgd,bskd->bkgls", query_BLKGD, key_BSKD, preferred_element_type=jnp.float32
  )
  found *= size**-0.5 if scores.scale is None else scores.scale
  found = jnp.where(mask[:, :, None], soft_cap(found, scores.cap), -jnp.inf)
  shares = jax.nn.softmax(found, axis=-1).astype(value_BSKD.dtype)
  out = jnp.einsum("bkgls,bskd->blkgd", shares, value_BSKD)
  return out.reshape(query_BLHD.shape)


def cudnn(
  query_BLHD: Float[Array, "B L H D"],
  key_BSKD: Float[Array, "B S K D"],
  value_BSKD: Float[Array, "B S K D"],
  mask: Bool[Array, "B 1 L S"],
  scores: Scores = PLAIN,
) -> Float[Array, "B L H D"]:
  """The same by cuDNN's flash attention, without a cap.

  The mask costs it an array [B, 1, L, L] in the dtype of the heads, and the backward
  pass its gradient, which nobody reads. cuDNN's packed layout would need neither, but
  is for Hopper and later, wants the offsets of at most so many segments, and has no
  public interface.
  """

  def attend(
    query: Float[Array, "B L H D"],
    key: Float[Array, "B S K D"],
    value: Float[Array, "B S K D"],
    mask: Bool[Array, "B 1 L S"],
  ) -> Float[Array, "B L H D"]:
    return jax.nn.dot_product_attention(
      query,
      key,
      value,
      mask=mask,
      scale=scores.scale,
      # Says nothing that the mask does not, but lets it skip what comes later.
      is_causal=mask.shape[2] == mask.shape[3],
      implementation="cudnn",
    )

  return _per_device(attend, key_BSKD)(query_BLHD, key_BSKD, value_BSKD, mask)


def splash(
  query_BLHD: Float[Array, "B L H D"],
  key_BLKD: Float[Array, "B L K D"],
  value_BLKD: Float[Array, "B L K D"],
  segment_ids: Int[Array, "B L"],
  scores: Scores = PLAIN,
  window: int = 0,
  interpret: bool = False,
) -> Float[Array, "B L H D"]:
  """The same by splash attention; L is a multiple of 128.

  Padding sees the padding before it, where XLA's sees itself alone: finite either way,
  and seen by no token.
  """
  attend = functools.partial(_splash, scores=scores, window=window, interpret=interpret)
  return _per_device(attend, key_BLKD)(query_BLHD, key_BLKD, value_BLKD, segment_ids)


def _splash(
  query_BLHD: Float[Array, "B L H D"],
  key_BLKD: Float[Array, "B L K D"],
  value_BLKD: Float[Array, "B L K D"],
  segment_ids: Int[Array, "B L"],
  scores: Scores,
  window: int,
  interpret: bool,
) -> Float[Array, "B L H D"]:
  _, length, heads, head_dim = query_BLHD.shape
  block = next(size for size in _BLOCKS if length % size == 0)
  names = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq")
  sizes = splash_attention.BlockSizes(**dict.fromkeys((*names, "block_kv_dq"), block))
  mask = splash_attention.CausalMask((length, length))
  if window:
    mask = splash_attention.LocalMask((length, length), (window - 1, 0), 0)
  kernel = splash_attention.make_splash_mha_single_device(
    splash_attention.MultiHeadMask([mask] * heads),
    block_sizes=sizes,
    attn_logits_soft_cap=scores.cap or None,
    interpret=interpret,
  )
  scale = head_dim**-0.5 if scores.scale is None else scores.scale
  query, key, value = (
    x.swapaxes(1, 2) for x in (query_BLHD * scale, key_BLKD, value_BLKD)
  )
  segments = splash_attention.SegmentIds(segment_ids, segment_ids)
  return jax.vmap(kernel)(query, key, value, segments).swapaxes(1, 2)


def _per_device(
  attend: Callable[..., Float[Array, "B L H D"]], key_BSKD: Float[Array, "B S K D"]
) -> Callable[..., Float[Array, "B L H D"]]:
  """`attend` of four arrays, on each device for its rows and heads.

  XLA cannot divide a kernel by itself. Rows or heads that do not come out even are
  computed by every device that would share them.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return attend
  rows, heads = (
    axes if size % math.prod(mesh.shape[axis] for axis in axes) == 0 else None
    for axes, size in ((_ROWS, key_BSKD.shape[0]), (_HEADS, key_BSKD.shape[2]))
  )
  spec = PartitionSpec(rows, None, heads, None)
  # A Pallas call does not say over which axes its results vary.
  return jax.shard_map(
    attend,
    in_specs=(spec, spec, spec, PartitionSpec(rows)),
    out_specs=spec,
    check_vma=False,
  )
