"""The mesh and the rules that place parameters on it."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from okd_jax.errors import UserError
from okd_jax.models import ModelConfig, parameter_shapes
from okd_jax.runtime import sharding


def test_mesh_takes_what_is_left():
  assert dict(sharding.make_mesh(-1, 2, 2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
  assert dict(sharding.make_mesh(1, -1, 1).shape)["fsdp"] == 8


@pytest.mark.parametrize("sizes", [(3, 1, 1), (16, 1, 1), (-1, -1, 1), (0, 1, 1)])
def test_mesh_that_does_not_fit(sizes):
  with pytest.raises(UserError, match="mesh.data="):
    sharding.make_mesh(*sizes)


def test_every_matrix_is_split_both_ways():
  mesh = sharding.make_mesh(1, 4, 2)
  shapes = parameter_shapes(ModelConfig(tie_embeddings=False))
  for path, leaf in shapes.items():
    spec = sharding.spec(path, leaf.shape, mesh)
    named = set(jax.tree.leaves(tuple(spec)))
    if path.endswith(("kernel", "embedding", "head")):
      assert named == {"fsdp", "tensor"}, path
    else:
      assert not named, path


def test_optimiser_moments_follow_their_parameters():
  mesh = sharding.make_mesh(1, 8, 1)
  leaf = jax.ShapeDtypeStruct((2, 16, 4), np.float32)
  tree = {"opt_state": [{"mu": {"layers": {"query": {"kernel": leaf}}}}]}
  [found] = jax.tree.leaves(sharding.shardings(tree, mesh))
  assert found.spec == P(None, "fsdp", "tensor")


def test_an_axis_that_does_not_divide_is_left_whole():
  mesh = sharding.make_mesh(1, 4, 2)
  assert sharding.spec("query/kernel", (2, 6, 8), mesh) == P(None, None, "tensor")


@pytest.mark.parametrize(
  "size, rule",
  [
    ((32, 12), P(("tensor", "fsdp"), None)),
    ((30, 12), P("tensor", "fsdp")),
    ((31, 12), P(None, "fsdp")),
    ((31, 6), P(None, None)),
  ],
)
def test_a_vocabulary_is_split_by_rows_where_they_come_out_even(size, rule):
  mesh = sharding.make_mesh(1, 4, 2)
  assert sharding.spec("head", size, mesh) == rule
  whole = P("tensor" if size[0] % 2 == 0 else None, None)
  assert sharding.spec("head", size, mesh, whole=True) == whole


def test_online_modules_are_split_too():
  mesh = sharding.make_mesh(1, 8, 1)
  path = "adapter/layers/attention/query"
  assert sharding.spec(f"{path}/down", (2, 16, 4), mesh) == P(None, "fsdp", None)
  assert sharding.spec(f"{path}/up", (2, 4, 16), mesh) == P(None, None, "fsdp")


@pytest.mark.parametrize("size, parts", [(8, 3), (12, 2), (8, 0)])
def test_batch_that_does_not_spread(size, parts):
  with pytest.raises(UserError, match="train.batch_size="):
    sharding.check_batch(size, parts, sharding.make_mesh(8, 1, 1))


SIZES = [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4), (1, 1, 8)]


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_a_batch_is_put_together_from_each_process_rows(sizes, processes, monkeypatch):
  """Guards a tensor axis across processes: these have the same rows.

  Each process is played in turn; what its devices hold is what the rows of the whole
  batch have there.
  """
  mesh, whole = sharding.make_mesh(*sizes), np.arange(16 * 3).reshape(16, 3)
  where = sharding.batch_sharding(mesh)
  everywhere = where.devices_indices_map(whole.shape)
  mine, held, seen = set(), {}, set()
  monkeypatch.setattr(
    type(where),
    "addressable_devices_indices_map",
    lambda self, shape: {
      d: i for d, i in self.devices_indices_map(shape).items() if d in mine
    },
  )

  def make(shape, where, part):
    assert shape == whole.shape
    held.update({device: part(everywhere[device]) for device in mine})
    return jax.numpy.zeros(())

  monkeypatch.setattr(jax, "make_array_from_callback", make)
  for own in np.split(np.array(jax.devices()), processes):
    mine = set(own.tolist())
    rows = sharding.own_rows(16, mesh)
    sharding.put_batch(whole[rows], mesh)
    seen |= set(rows.tolist())
    assert len(rows) < 16 or processes == 1 or sizes[0] * sizes[1] < processes
  assert seen == set(range(16)) and len(held) == 8
  for device, values in held.items():
    np.testing.assert_array_equal(values, whole[everywhere[device]])


def test_rows_that_do_not_spread_evenly():
  with pytest.raises(ValueError, match="12 rows cannot be divided among 8 devices"):
    sharding.own_rows(12, sharding.make_mesh(8, 1, 1))


def test_frozen_trees_may_lie_whole():
  mesh, shape = sharding.make_mesh(1, 4, 2), (3, 8, 16)
  path = "layers/mlp/up/kernel"
  assert sharding.spec(path, shape, mesh) == P(None, "fsdp", "tensor")
  whole = sharding.place(mesh, path, shape, whole=True)
  assert whole.spec == P(None, None, "tensor")
  assert sharding.described(mesh) == "mesh fsdp=4 x tensor=2"
  assert sharding.described(sharding.make_mesh(8, 1, 1)) == "mesh data=8"
