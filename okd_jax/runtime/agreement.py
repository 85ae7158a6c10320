"""What the processes of a run find out together; all of them call these functions."""

import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from okd_jax.errors import UserError


def largest(own: int) -> Int[Array, ""]:
  """The largest number that a process says; on its way, as every result of JAX."""
  mesh = Mesh(np.array(jax.devices()), "all")
  where = NamedSharding(mesh, PartitionSpec("all"))
  said = jax.make_array_from_callback(
    (mesh.size,),
    where,
    lambda index: np.full(len(range(mesh.size)[index[0]]), own, np.int32),
  )
  return _max(mesh)(said)


@functools.cache
def _max(mesh: Mesh) -> Callable[[Array], Array]:
  return jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))


def any_of(own: bool) -> bool:
  """Whether any process says so; waits for all of them."""
  return own if jax.process_count() == 1 else bool(largest(int(own)))


def of_first(number: int) -> int:
  """What process 0 says, below 2^31."""
  if jax.process_count() == 1:
    return number
  return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def check_same(facts: Mapping[str, Any]) -> None:
  """Refuses processes that would do different things.

  facts: JSON by what it is called; the names are the same in all processes.

  Raises:
    UserError: in every process, naming what differs from process 0's and where.
  """
  if jax.process_count() == 1:
    return
  own = np.array([_number(value) for value in facts.values()], np.uint32)
  found = multihost_utils.process_allgather(own)
  for process, row in enumerate(found):
    if wrong := [n for n, same in zip(facts, row == found[0], strict=True) if not same]:
      raise UserError(
        f"process {process} has another {', '.join(wrong)} than process 0; start all "
        "processes with the same command, on the same files"
      )


def _number(value: Any) -> int:
  text = json.dumps(value, sort_keys=True, default=str)
  return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")
