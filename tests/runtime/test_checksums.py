"""Sums of arrays: every bit counts, its place counts, the mesh does not."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from okd_jax.runtime import checksums, sharding


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "bool", "uint32"])
def test_every_bit_counts(kind):
  """One array an element wrong, or one bit, at the front, inside and at the end."""
  raw = np.random.default_rng(0).integers(0, 2, (2, 3, 4)).astype(np.int8)
  whole = raw.astype(kind if kind != "bfloat16" else ml_dtypes.bfloat16)
  sound = checksums.of({"a": jnp.asarray(whole)})
  assert list(sound) == ["['a']"] and sound["['a']"].startswith(f"{kind}[2, 3, 4] ")
  bits = 1 if kind == "bool" else 8 * whole.dtype.itemsize
  for place in (0, 13, 23):
    for bit in range(bits):
      wrong = bytearray(whole.tobytes())
      wrong[place * whole.dtype.itemsize + bit // 8] ^= 1 << bit % 8
      other = np.frombuffer(bytes(wrong), whole.dtype).reshape(whole.shape)
      assert checksums.of({"a": jnp.asarray(other)}) != sound


def test_places_count():
  a = jnp.arange(6.0).reshape(2, 3)
  swapped = a.at[0, 1].set(a[1, 2]).at[1, 2].set(a[0, 1])
  assert len({str(checksums.of(x)) for x in (a, swapped, a.reshape(3, 2))}) == 3
  assert checksums.of({"x": a}) != checksums.of({"y": a})


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (2, 2, 2)])
def test_a_mesh_does_not_count(sizes):
  mesh = sharding.make_mesh(*sizes)
  array = np.random.default_rng(1).normal(size=(16, 8)).astype(np.float32)
  for spec in (PartitionSpec(), PartitionSpec(("data", "fsdp"), "tensor")):
    spread = jax.device_put(array, NamedSharding(mesh, spec))
    assert checksums.of(spread) == checksums.of(jnp.asarray(array))


def test_keys_scalars_and_arrays_of_the_host():
  found = [
    checksums.of({"key": jax.random.key(seed), "n": jnp.int32(seed), "h": host})
    for seed, host in [(0, np.arange(3)), (1, np.arange(3)), (1, np.arange(4))]
  ]
  assert found[0]["['key']"] != found[1]["['key']"]
  assert found[0]["['n']"] != found[1]["['n']"]
  assert found[0]["['h']"] == found[1]["['h']"] != found[2]["['h']"]


@pytest.mark.parametrize("kind", ["float32", "int8", "bool", "int32"])
def test_it_does_not_count_whether_an_array_is_on_a_device(kind):
  host = np.arange(6).reshape(2, 3).astype(kind)
  assert checksums.of(host) == checksums.of(jnp.asarray(host))
  wide = np.arange(6.0).reshape(2, 3)
  assert checksums.of(wide)[""].startswith("float64[2, 3] ")
  assert checksums.of(wide) != checksums.of(np.nextafter(wide, 9))
