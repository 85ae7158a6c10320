"""Weights part by part: each device's own bytes are read, and nobody else's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from okd_jax import models
from okd_jax.errors import UserError
from okd_jax.models import int8
from okd_jax.models.formats import parts, tensors
from okd_jax.runtime import sharding

SHAPE = dict(vocab_size=96, hidden_size=32, num_layers=3, num_heads=4, max_length=64)
SIZES = [(1, 8, 1), (2, 2, 2), (1, 1, 4), (8, 1, 1)]


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def folder(request, tmp_path_factory):
  """GPT-2 has fused and Conv1D tensors, LLaMA transposed ones."""
  place = tmp_path_factory.mktemp("parts") / request.param
  extra = {} if request.param == "gpt2" else {"num_kv_heads": 2, "mlp_size": 48}
  config = models.preset(request.param, **SHAPE, **extra)
  models.save(place, models.init(config, jax.random.key(0)), config)
  return place


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_a_model_in_parts_is_the_whole_model(folder, sizes, quantize):
  size = int(np.prod(sizes))
  mesh = jax.make_mesh(
    sizes,
    sharding.AXES,
    devices=jax.devices()[:size],
    axis_types=(jax.sharding.AxisType.Auto,) * 3,
  )
  whole = models.load(folder).params
  whole = int8.quantized(jax.device_get(whole)) if quantize else whole
  where = functools.partial(sharding.place, mesh)
  found = models.load(folder, where=where, quantize=quantize).params
  assert jax.tree.map(lambda x: x.sharding, found) == sharding.shardings(whole, mesh)
  jax.tree.map(np.testing.assert_array_equal, found, whole)


@pytest.mark.parametrize("sizes", SIZES[:2], ids=str)
def test_export_is_the_same_from_any_mesh(folder, sizes, tmp_path):
  model = models.load(folder)
  mesh = sharding.make_mesh(*sizes)
  spread = jax.device_put(model.params, sharding.shardings(model.params, mesh))
  models.save(tmp_path / "s", spread, model.config, max_shard_bytes=20_000)
  models.save(tmp_path / "w", model.params, model.config, max_shard_bytes=20_000)
  files = sorted(path.name for path in (tmp_path / "w").iterdir())
  assert sum(name.endswith(".safetensors") for name in files) > 2
  for name in files:
    assert (tmp_path / "s" / name).read_bytes() == (tmp_path / "w" / name).read_bytes()
  again = models.load(tmp_path / "s").params
  jax.tree.map(np.testing.assert_array_equal, again, model.params)


def test_a_part_reads_its_own_bytes_alone(folder, monkeypatch):
  """Guards a pod of which every process fetches the whole model."""
  counted, fill = [], tensors._fill
  monkeypatch.setattr(tensors, "_SMALL", 2)
  monkeypatch.setattr(
    tensors, "_fill", lambda file, at, x: counted.append(x.nbytes) or fill(file, at, x)
  )
  mesh = sharding.make_mesh(fsdp=8)
  where = functools.partial(sharding.place, mesh)
  params = models.load(folder, where=where).params
  split = [x for x in jax.tree.leaves(params) if not x.is_fully_replicated]
  whole = [x for x in jax.tree.leaves(params) if x.is_fully_replicated]
  assert sum(x.nbytes for x in whole) < 0.1 * sum(x.nbytes for x in split)
  # Eight devices, one process: of what is split each byte once, of the rest once, too.
  assert sum(counted) == sum(x.nbytes for x in [*split, *whole])

  counted.clear()
  own = parts.own_parts
  monkeypatch.setattr(
    parts, "own_parts", lambda *a: dict(list(own(*a).items())[:1]), raising=True
  )
  monkeypatch.setattr(jax, "make_array_from_single_device_arrays", lambda *a: a[2][0])
  models.load(folder, where=where)
  assert sum(counted) == sum(x.nbytes // 8 for x in split) + sum(
    x.nbytes for x in whole
  )


DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}


@given(data=st.data())
def test_any_part_of_any_tensor(data, tmp_path_factory):
  shape = data.draw(st.lists(st.integers(1, 7), min_size=0, max_size=3))
  name = data.draw(st.sampled_from(sorted(DTYPES)))
  array = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(DTYPES[name])
  path = tmp_path_factory.mktemp("t") / "x.safetensors"
  save_file({"other": np.ones(3, np.float32), "x": array, "z": array}, path)
  bounds = tuple(
    data.draw(
      st.tuples(st.integers(0, n - 1), st.integers(1, n)).filter(lambda b: b[0] < b[1])
    )
    for n in shape
  )
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(tensors, "_SMALL", data.draw(st.sampled_from([1, 8, 4096])))
    patch.setattr(tensors, "_BLOCK", data.draw(st.sampled_from([1, 16, 1 << 20])))
    found = tensors._File(path).read("x", bounds)
  np.testing.assert_array_equal(found, array[tuple(slice(*b) for b in bounds)])
  assert found.dtype == array.dtype


def test_a_file_that_is_cut_while_it_is_read(tmp_path):
  path = tmp_path / "x.safetensors"
  save_file({"x": np.ones((64, 64), np.float32)}, path)
  file = tensors._File(path)
  path.write_bytes(path.read_bytes()[:1000])
  with pytest.raises(UserError, match="shorter while it was read"):
    file.read("x", ((0, 64), (0, 64)))
