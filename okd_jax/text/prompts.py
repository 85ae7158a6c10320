"""Prompts on their way to a device: in batches of like length, padded on the left."""

from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jaxtyping import Array, Int, UInt32

from okd_jax.runtime.sharding import spread

_SMALLEST_BUCKET = 32
Tokens = Int[np.ndarray, " _"]
# One number a row, traced or in host memory.
_Lengths = Int[Array | np.ndarray, " B"]


def in_batches(
  prompts: Sequence[Tokens], batch_size: int, sharding: jax.sharding.Sharding | None
) -> Iterator[tuple[list[int], int]]:
  """(indices of a batch's prompts, its rows) for each batch, the longest first.

  If memory is short, it then shows at once. No batch is larger than needed; a sharded
  one is a multiple of its shards.
  """
  if not prompts:
    return
  size = min(batch_size, _power_of_two(len(prompts)))
  if sharding is not None:
    devices = sharding.num_devices
    shards = devices // sharding.shard_shape((devices,))[0]
    size = -(-size // shards) * shards
  order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
  for first in range(0, len(order), size):
    yield order[first : first + size], size


def left_padded(
  prompts: Sequence[Tokens],
  rows: Int[np.ndarray, " _"],
  size: int,
  room: int,
  sharding: jax.sharding.Sharding | None,
) -> tuple[Int[Array | np.ndarray, "B L"], _Lengths, UInt32[Array | np.ndarray, " B"]]:
  """(tokens, lengths, rows) of one batch, with empty rows where prompts are too few.

  Prompts are padded on the left to a power of two, so that there is at most one
  program a bucket.
  """
  lengths = np.array([len(p) for p in prompts] + [0] * (size - len(prompts)), np.int32)
  width = min(bucket(lengths.max()), room)
  tokens = np.zeros((size, width), np.int32)
  for i, prompt in enumerate(prompts):
    tokens[i, width - len(prompt) :] = prompt
  batch = (tokens, lengths, np.resize(rows, size).astype(np.uint32))
  return batch if sharding is None else spread(batch, sharding)


def bucket(length: int | np.integer) -> int:
  """How wide prompts of up to so many tokens are: few widths, so few programs."""
  return max(_SMALLEST_BUCKET, _power_of_two(length))


def _power_of_two(n: int | np.integer) -> int:
  return 1 << (int(n) - 1).bit_length()
