"""Narrower models: the heads and MLP channels of a model that are most active.

Each layer keeps its own. How active a channel is, is what it brings to the projection
after it: the mean square of its activations over some text (after Minitron,
Muralidharan et al. 2024, arXiv 2407.14679, section 2.2, which takes means of norms). A
head is as active as its channels together. The residual stream keeps its width.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Float, Int

from okd_jax.errors import UserError
from okd_jax.models.config import ModelConfig
from okd_jax.models.formats import hf

Squares = Mapping[str, Float[np.ndarray, "N F"]]


class Kept(NamedTuple):
  """Numbers of what stays in each layer, ascending.

  Query heads are those of a model whose heads are numbered through all groups.
  """

  heads: Int[np.ndarray, "N H"]
  kv_heads: Int[np.ndarray, "N K"]
  channels: Int[np.ndarray, "N F"]


def narrow_config(config: ModelConfig, width: float) -> ModelConfig:
  """The shape with this share of the heads and MLP channels, rounded, at least one.

  Heads go by groups that share keys and values, or, where there is one group, within
  it; so many as come nearest of the numbers that the family's layout can say, and that
  may be all of them.

  Raises:
    UserError: for a mixture of experts.
  """
  if config.experts:
    raise UserError(
      f"student.width={width}: the MLPs of {config.family} are experts, whose channels "
      "cannot be chosen; leave it at 1"
    )
  mlp_size = _share(config.mlp_size, width)
  config = dataclasses.replace(config, mlp_size=mlp_size)
  groups, group = config.num_kv_heads, config.num_heads // config.num_kv_heads
  total = groups if groups > 1 else group
  for count in sorted(range(total, 0, -1), key=lambda n: abs(n - total * width)):
    kept = (count, count * group) if groups > 1 else (1, count)
    heads = dict(zip(("num_kv_heads", "num_heads"), kept, strict=True))
    fewer = dataclasses.replace(config, **heads)
    try:
      hf.hf_config(fewer)
    except UserError:
      continue
    return fewer
  return config


def choose_kept(squares: Squares, config: ModelConfig, narrow: ModelConfig) -> Kept:
  """The most active of each layer's heads and channels; ties: the lowest.

  Args:
    squares: mean squares [N, F] of what enters the projections 'out' and 'down'.
    config: of the model that they were measured in.
    narrow: its `narrow_config`.

  Raises:
    UserError: if one is not finite.
  """
  if not all(np.isfinite(x).all() for x in squares.values()):
    raise UserError("the teacher's activations overflow, so none of them can be chosen")
  layers, groups = len(squares["out"]), config.num_kv_heads
  heads = squares["out"].reshape(layers, groups, -1, config.head_dim).sum(-1)
  kv_heads = _largest(heads.sum(-1), narrow.num_kv_heads)
  size = narrow.num_heads // narrow.num_kv_heads
  within = np.take_along_axis(heads, kv_heads[..., None], 1)  # [N, K, heads a group]
  chosen = _largest(within, size) + kv_heads[..., None] * heads.shape[-1]
  channels = _largest(squares["down"], narrow.mlp_size)
  return Kept(chosen.reshape(layers, -1), kv_heads, channels)


def narrowed(params: dict[str, Any], config: ModelConfig, kept: Kept) -> dict[str, Any]:
  """Copies of the parameters without what does not stay.

  Args:
    config: of the model that they are of.
  """
  axes = {  # of a layer's weights, by projection: of the kernel, what stays
    "query": (-1, _channels(kept.heads, config)),
    "key": (-1, _channels(kept.kv_heads, config)),
    "value": (-1, _channels(kept.kv_heads, config)),
    "out": (-2, _channels(kept.heads, config)),
    "gate": (-1, kept.channels),
    "up": (-1, kept.channels),
    "down": (-2, kept.channels),
  }
  norms = {"query_norm": axes["query"], "key_norm": axes["key"]}
  axes |= norms if config.qk_norm == "projection" else {}
  flat = traverse_util.flatten_dict(params, sep="/")
  for path, leaf in flat.items():
    *_, module, name = ["", *path.split("/")]
    axis, where = axes.get(module, (-1, None))
    # A bias after the sum over what is cut stays; any other has the kernel's outputs.
    if where is not None and not (name == "bias" and axis == -2):
      flat[path] = _taken(leaf, where, axis if name == "kernel" else -1)
  return traverse_util.unflatten_dict(flat, sep="/")


def _share(count: int, width: float) -> int:
  return max(1, int(count * width + 0.5))


def _largest(x: Float[np.ndarray, "*B N"], count: int) -> Int[np.ndarray, "*B M"]:
  """Where the largest values are, ascending."""
  order = np.argsort(-x, axis=-1, kind="stable")[..., :count]
  return np.sort(order, axis=-1)


def _channels(
  heads: Int[np.ndarray, "N H"], config: ModelConfig
) -> Int[np.ndarray, "N F"]:
  """Those of the heads, of a projection."""
  within = np.arange(config.head_dim)
  return (heads[..., None] * config.head_dim + within).reshape(len(heads), -1)


def _taken(
  leaf: Float[Array | np.ndarray, "N ..."], where: Int[np.ndarray, "N M"], axis: int
) -> Float[Array, "N ..."]:
  """The rows or columns `where`, layer by layer."""
  index = where[:, :, None] if axis == -2 else where
  if leaf.ndim == 3 and axis == -1:
    index = where[:, None]
  return jnp.take_along_axis(leaf, jnp.asarray(index), axis)
