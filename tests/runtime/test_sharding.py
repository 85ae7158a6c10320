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
    named = {axis for axis in spec if axis}
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


def test_online_modules_are_split_too():
  mesh = sharding.make_mesh(1, 8, 1)
  path = "adapter/layers/attention/query"
  assert sharding.spec(f"{path}/down", (2, 16, 4), mesh) == P(None, "fsdp", None)
  assert sharding.spec(f"{path}/up", (2, 4, 16), mesh) == P(None, None, "fsdp")


@pytest.mark.parametrize("size, parts", [(8, 3), (12, 2), (8, 0)])
def test_batch_that_does_not_spread(size, parts):
  with pytest.raises(UserError, match="train.batch_size="):
    sharding.check_batch(size, parts, sharding.make_mesh(8, 1, 1))
