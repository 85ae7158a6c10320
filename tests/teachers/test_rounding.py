"""The price of int8, measured layer by layer and told at the start of a run."""

import dataclasses

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from okd_jax import models
from okd_jax.config import read
from okd_jax.config.players import RandomModel
from okd_jax.data import Example
from okd_jax.losses import forward_kl
from okd_jax.models import Decoder
from okd_jax.run.job import check
from okd_jax.runtime import sharding
from okd_jax.teachers import load
from okd_jax.teachers.rounding import rounding_kl


@pytest.fixture
def settings():
  config = read.read(["--config=debug"])
  config.data.max_length = 24
  config.eval.batch_size = 2
  config.teacher.dtype = "int8"
  return check(config).settings


def examples(config):
  rng = np.random.default_rng(0)
  rows = [rng.integers(0, config.vocab_size, n, dtype=np.int32) for n in (25, 14, 9)]
  return [Example(row, 3, (), str(i)) for i, row in enumerate(rows)]


def directly(config, whole, rounded, rows):
  total = count = 0
  for row in rows:
    logits = [
      models.Model(config, p).logits(p, row.tokens[None, :-1])[0, 2:]
      for p in (whole, rounded)
    ]
    kl = forward_kl(*logits)
    total, count = total + float(kl.sum()), count + kl.size
  return total / count


@pytest.mark.parametrize(
  "name",
  [
    "gemma3",
    pytest.param("opt_350m", marks=pytest.mark.slow),
    pytest.param("phi3_long", marks=pytest.mark.slow),
  ],
)
def test_layer_by_layer_is_the_whole_model(settings, tmp_path, name):
  whole, config = families.save(name, tmp_path / "model")
  teacher = dataclasses.replace(
    settings.teacher, path=str(tmp_path / "model"), model=RandomModel()
  )
  settings = dataclasses.replace(settings, teacher=teacher)
  mesh = sharding.make_mesh(data=1, fsdp=2, tensor=4)
  with jax.set_mesh(mesh):
    [rounded] = load.load_teachers(settings, {"teacher": config}, mesh).values()
    got = rounding_kl(
      settings, "teacher", Decoder(config), rounded, examples(config), mesh
    )
  rounded = jax.tree.map(jnp.asarray, jax.device_get(rounded))
  want = directly(config, whole, rounded, examples(config))
  assert got == pytest.approx(want, rel=2e-2) and got > 1e-6


def test_only_the_layers_asked_for_are_read(tmp_path):
  whole, config = families.save("qwen3_moe", tmp_path / "model")
  outer = models.load(tmp_path / "model", layers=range(0)).params
  assert set(outer) == {"embed", "norm", "head"}
  one = models.load(tmp_path / "model", layers=range(1, 2)).params
  assert set(one) == {"layers"}
  jax.tree.map(
    lambda x, y: np.testing.assert_array_equal(x, y[1:2]),
    one["layers"],
    whole["layers"],
  )
