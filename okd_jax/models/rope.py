"""Rotary positions: frequencies, angles, and the turning of heads.

RoFormer, Su et al. 2021, arXiv 2104.09864; the stretches are those of `RopeScaling`.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from okd_jax.models.config import LayerKind, ModelConfig, RopeScaling

Ids = Int[Array | np.ndarray, "B L"]


class Rotation(NamedTuple):
  """Cosine and sine of each token's angles, one for each pair of turned channels."""

  cos: Float[Array, "B L half"]
  sin: Float[Array, "B L half"]


def rope_frequencies(
  config: ModelConfig, kind: LayerKind | None = None
) -> Float[Array, " half"]:
  """Angular frequency of each pair of head channels, in radians per position.

  kind: of the layers that are meant; None: `LayerKind()`.

  Of longrope they are those of texts up to `original_max_length`.
  """
  kind = kind or LayerKind()
  frequencies = _plain(config, kind)
  scaling = _scaling(config, kind)
  return _scaled(frequencies, scaling, config) if scaling else frequencies


def rotation(
  config: ModelConfig, kind: LayerKind, positions: Ids, segment_ids: Ids
) -> Rotation:
  """Of tokens at these positions, in layers of this kind."""
  if not kind.rotary:
    still = jnp.zeros((*positions.shape, config.rotary_dim // 2), jnp.float32)
    return Rotation(still + 1, still)
  frequencies, scaling = (
    rope_frequencies(config, kind)[None, None],
    _scaling(config, kind),
  )
  if scaling and scaling.by_pair:
    stretched = _plain(config, kind) / np.array(scaling.long_factors, np.float32)
    beyond = _lengths(positions, segment_ids) > scaling.original_max_length
    frequencies = jnp.where(beyond[..., None], stretched, frequencies)
  angles = positions[..., None].astype(jnp.float32) * frequencies
  factor = scaling.attention_factor if scaling else 1.0
  return Rotation(jnp.cos(angles) * factor, jnp.sin(angles) * factor)


def rotate(
  x_BLHD: Float[Array, "B L H D"], rotation: Rotation
) -> Float[Array, "B L H D"]:
  """Turns channel i against channel i + R/2 by the position's angle (HF layout).

  R is the number of channels that the angles are for; the others stay as they are.
  """
  cos, sin = (part[:, :, None] for part in rotation)
  x, rest = jnp.split(x_BLHD, [2 * cos.shape[-1]], axis=-1)
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  turned = (first * cos - second * sin, second * cos + first * sin)
  return jnp.concatenate([*(t.astype(rest.dtype) for t in turned), rest], axis=-1)


def _scaling(config: ModelConfig, kind: LayerKind) -> RopeScaling | None:
  return None if kind.rope_theta else config.rope_scaling


def _plain(config: ModelConfig, kind: LayerKind) -> Float[Array, " half"]:
  half = config.rotary_dim // 2
  exponents = jnp.arange(half, dtype=jnp.float32) / half
  return 1.0 / (kind.rope_theta or config.rope_theta) ** exponents


def _scaled(
  frequencies: Float[Array, " half"], scaling: RopeScaling, config: ModelConfig
) -> Float[Array, " half"]:
  divided = frequencies / scaling.factor
  match scaling.kind:
    case "linear":
      return divided
    case "llama3":
      turns = scaling.original_max_length * frequencies / (2 * jnp.pi)
      low, high = scaling.low_freq_factor, scaling.high_freq_factor
      keep = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
      return keep * frequencies + (1 - keep) * divided
    case "yarn":
      keep = _yarn_share(scaling, config)
      return keep * frequencies + (1 - keep) * divided
    case "longrope":
      return frequencies / np.array(scaling.short_factors, np.float32)
    case _:  # dynamic: no row is as long as that
      return frequencies


def _yarn_share(scaling: RopeScaling, config: ModelConfig) -> Float[Array, " half"]:
  """How much of each frequency stays: 1 of many turns, 0 of few (YaRN, Section 3.2)."""
  size, length = config.rotary_dim, scaling.original_max_length

  def channel(turns: float) -> float:
    """The (real) index of the pair that turns so often within the length."""
    ratio = math.log(length / (turns * 2 * math.pi)) / math.log(config.rope_theta)
    return size * ratio / 2

  low, high = channel(scaling.beta_fast), channel(scaling.beta_slow)
  if scaling.truncate:
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, size - 1)
  high += 0.001 * (low == high)
  index = jnp.arange(size // 2, dtype=jnp.float32)
  return 1 - jnp.clip((index - low) / (high - low), 0.0, 1.0)


def _lengths(positions: Ids, segment_ids: Ids) -> Int[Array, "B L"]:
  """How many tokens the text of each token has, as far as it is here."""
  size = positions.shape[1]
  following = jnp.pad(segment_ids, ((0, 0), (0, 1)), constant_values=-1)[:, 1:]
  index = jnp.where(segment_ids != following, jnp.arange(size)[None], size - 1)
  ends = jax.lax.cummin(index, axis=1, reverse=True)
  return jnp.take_along_axis(jnp.asarray(positions), ends, axis=1) + 1
