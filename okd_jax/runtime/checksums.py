"""Checksums of arrays where they lie: on the devices, whatever the mesh.

The sum of an array is taken over all its elements, of each a mixture of its bits and
its place. It is the same however the array is laid out and on however many processes,
so it can be written with one mesh and compared on another; the array is read once and
never moves. One element that differs always changes the sum, several but for one case
in 2^64.
"""

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree, UInt32

_WIDTHS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def begun(tree: PyTree) -> dict[str, Any]:
  """The sums of a tree's arrays by their paths, not waited for; `told` makes text.

  All processes call it alike. The arrays may be given away afterwards.
  """
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path): _begun(leaf) for path, leaf in leaves}


def told(sums: dict[str, Any]) -> dict[str, str]:
  """The sums as text, with types and shapes; waits for the devices."""
  found = {path: (kind, np.asarray(total)) for path, (kind, total) in sums.items()}
  return {
    path: f"{kind} {''.join(f'{part:08x}' for part in total.tolist())}"
    for path, (kind, total) in found.items()
  }


def of(tree: PyTree) -> dict[str, str]:
  """The sums of a tree's arrays by their paths, as text."""
  return told(begun(tree))


def of_bytes(content: bytes) -> str:
  """The digest of bytes: SHA-256, in hexadecimal."""
  return hashlib.sha256(content).hexdigest()


def of_file(path: Path) -> str:
  """The digest of a file's bytes."""
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _begun(leaf: Any) -> tuple[str, Any]:
  if not isinstance(leaf, jax.Array):
    leaf = np.asarray(leaf)
  elif jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    leaf = jax.random.key_data(leaf)
  kind = f"{leaf.dtype}{list(leaf.shape)}"
  if isinstance(leaf, np.ndarray):
    return kind, _summed(None)(_on_device(leaf))
  where = leaf.sharding
  # Every process must see the whole sum.
  whole = (
    NamedSharding(where.mesh, PartitionSpec())
    if isinstance(where, NamedSharding)
    else None
  )
  return kind, _summed(whole)(leaf)


def _on_device(host: np.ndarray) -> Array:
  """Its bits; JAX would halve those of types twice as wide as its own."""
  if host.dtype.itemsize == 8:
    flat = np.ascontiguousarray(host).reshape(-1).view(np.uint32)
    host = flat.reshape(*host.shape, 2)
  return jnp.asarray(host)


@functools.cache
def _summed(whole: NamedSharding | None) -> Callable[[Array], Array]:
  return jax.jit(_sum, out_shardings=whole)


def _sum(array: Array) -> UInt32[Array, "2"]:
  """Two sums modulo 2^32. Integers: no order of adding changes them."""
  if array.dtype == jnp.bool_:
    array = array.astype(jnp.uint8)
  width = array.dtype.itemsize
  # Twice as wide ones become pairs, in a last axis of their own.
  kind = _WIDTHS.get(width, jnp.uint32)
  bits = lax.bitcast_convert_type(array, kind).astype(jnp.uint32)
  place, stride = jnp.zeros(bits.shape, jnp.uint32), 1
  for axis in reversed(range(bits.ndim)):
    # Not by a flat view: that would move a sharded array.
    steps = lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    place += steps * np.uint32(stride % 2**32)
    stride *= bits.shape[axis]
  mixed = _mixed(bits + place * np.uint32(0x9E3779B9))
  # An odd factor is undone by no other: a changed element changes both sums.
  parts = mixed, mixed * (2 * place + np.uint32(1))
  return jnp.stack([jnp.sum(part, dtype=jnp.uint32) for part in parts])


def _mixed(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
  """A permutation of 32-bit numbers: MurmurHash3's last step (Appleby 2011)."""
  x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
  return x ^ (x >> 16)
