"""Arrays part by part: each device's share is made alone, or fetched from the devices.

No process ever has a sharded array whole in its memory, and to place one takes no word
between the processes.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jaxtyping import Shaped

Bounds = tuple[tuple[int, int], ...]  # of each axis from where to where

# ('layers/mlp/up/kernel', its shape) -> where it lies
Where = Callable[[str, tuple[int, ...]], Sharding]


def on_default_device(path: str, shape: tuple[int, ...]) -> Sharding:
  """Whole, where JAX puts what nobody has placed."""
  del path, shape
  device = jax.config.jax_default_device or jax.local_devices()[0]
  return jax.sharding.SingleDeviceSharding(device)


def own_parts(
  shape: tuple[int, ...], where: Sharding
) -> dict[Bounds, list[jax.Device]]:
  """Of the array the parts that lie on this process's devices, and on which."""
  found: dict[Bounds, list[jax.Device]] = {}
  for device, index in where.addressable_devices_indices_map(shape).items():
    bounds = tuple(
      part.indices(size)[:2] for part, size in zip(index, shape, strict=True)
    )
    found.setdefault(bounds, []).append(device)
  return found


def sizes(bounds: Bounds) -> tuple[int, ...]:
  """The shape of a part.

  >>> sizes(((2, 5), (0, 1)))
  (3, 1)
  """
  return tuple(stop - start for start, stop in bounds)


def place(
  shape: tuple[int, ...],
  where: Sharding,
  make: Callable[[Bounds], Shaped[np.ndarray, "..."]],
) -> jax.Array:
  """The global array of which `make` gives a part, one after the other."""
  arrays = []
  for bounds, devices in own_parts(shape, where).items():
    part = make(bounds)
    arrays += [jax.device_put(part, device, may_alias=False) for device in devices]
  return jax.make_array_from_single_device_arrays(shape, where, arrays)


def fetch(
  array: Shaped[jax.Array | np.ndarray, "..."], index: Sequence[int] = ()
) -> Shaped[np.ndarray, "..."]:
  """One entry of the first axes, in host memory; of an array that is spread over
  processes all of them call it, and each gets it."""
  if isinstance(array, np.ndarray):
    return array[tuple(index)]
  where = None
  if not array.is_fully_addressable:
    where = NamedSharding(array.sharding.mesh, PartitionSpec())
  return np.asarray(_entry(where)(array, *map(np.int32, index)))


@functools.cache
def _entry(where: NamedSharding | None) -> Callable[..., jax.Array]:
  return jax.jit(lambda array, *index: array[index], out_shardings=where)
