"""Narrower models: the most active heads and channels, and what is left of the rest."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import CONFIGS
from flax import traverse_util

from okd_jax import models
from okd_jax.data.batch import Batch
from okd_jax.errors import UserError
from okd_jax.models import Decoder, ModelConfig
from okd_jax.models.narrow import Kept, choose_kept, narrow_config, narrowed
from okd_jax.runtime.sharding import make_mesh
from okd_jax.teachers import activity

GROUPED = ModelConfig(
  family="qwen3",
  vocab_size=40,
  hidden_size=24,
  num_layers=3,
  num_heads=8,
  num_kv_heads=4,
  head_dim=6,
  mlp_size=20,
  qk_norm="head",
)


def rows(count=2, length=9, real=9):
  ids = np.random.default_rng(0).integers(0, 40, (count, length), dtype=np.int32)
  ones = np.ones((count, length), np.int32)
  ones[:, real:] = 0
  return Batch(tokens=ids, labels=ids, mask=ones > 0, segment_ids=ones)


def hidden(params, config):
  return jax.jit(Decoder(config).apply)({"params": params}, rows().tokens)[0]


def silenced(params, config, kept):
  """The whole model, with zeros for what a narrower one lacks."""
  flat = traverse_util.flatten_dict(params, sep="/")
  heads = np.zeros((config.num_layers, config.num_heads, config.head_dim))
  channels = np.zeros((config.num_layers, config.mlp_size))
  for i in range(config.num_layers):
    heads[i, kept.heads[i]] = channels[i, kept.channels[i]] = 1
  masks = {"attention/out": heads.reshape(config.num_layers, -1), "mlp/down": channels}
  for name, mask in masks.items():
    flat[f"layers/{name}/kernel"] *= jnp.asarray(mask, jnp.float32)[..., None]
  return traverse_util.unflatten_dict(flat, sep="/")


@pytest.mark.parametrize("width", [0.5, pytest.param(0.1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["grouped", "llama_gqa", "gpt2"])
def test_a_narrow_model_is_the_whole_one_with_the_rest_silenced(name, width):
  """The oracle: zeros in the kernels that read heads and channels that are gone."""
  config = CONFIGS.get(name, GROUPED)
  params = models.init(config, jax.random.key(0))
  params = jax.tree.map(
    lambda x: x + 0.1 * jnp.sin(jnp.arange(x.size)).reshape(x.shape), params
  )
  narrow = narrow_config(config, width)
  rng = np.random.default_rng(1)
  sizes = {"out": config.num_heads * config.head_dim, "down": config.mlp_size}
  squares = {k: rng.random((config.num_layers, n)) for k, n in sizes.items()}
  kept = choose_kept(squares, config, narrow)
  small = narrowed(params, config, kept)
  shapes = models.parameter_shapes(narrow)
  found = traverse_util.flatten_dict(small, sep="/")
  assert {k: v.shape for k, v in found.items()} == {
    k: v.shape for k, v in shapes.items()
  }
  want = hidden(silenced(params, config, kept), config)
  np.testing.assert_allclose(hidden(small, narrow), want, rtol=2e-4, atol=2e-5)


def test_a_norm_of_the_whole_projection_loses_the_same_channels():
  config = CONFIGS["olmo2"]
  params = jax.tree.map(np.asarray, models.init(config, jax.random.key(0)))
  attention = params["layers"]["attention"]
  for name in ("query", "key"):
    attention[f"{name}_norm"]["scale"] = attention[name]["kernel"][:, 0]
  heads = {"num_heads": config.num_heads // 2, "num_kv_heads": config.num_kv_heads // 2}
  narrow = dataclasses.replace(config, **heads)
  squares = {"out": np.ones((config.num_layers, config.num_heads * config.head_dim))}
  squares["down"] = np.ones((config.num_layers, config.mlp_size))
  small = narrowed(params, config, choose_kept(squares, config, narrow))
  attention = small["layers"]["attention"]
  for name in ("query", "key"):
    scale, kernel = attention[f"{name}_norm"]["scale"], attention[name]["kernel"]
    np.testing.assert_array_equal(scale, kernel[:, 0])
    assert scale.shape[1] < params["layers"]["attention"][name]["kernel"].shape[2]


def test_the_most_active_stay():
  """By hand: two groups of two heads of two channels, four MLP channels."""
  config = ModelConfig(
    hidden_size=8, num_heads=4, num_kv_heads=2, head_dim=2, mlp_size=4
  )
  squares = {
    "out": np.array([[1, 1, 0, 0, 2, 0, 0, 1], [3, 0, 0, 0, 0, 0, 1, 1]], np.float64),
    "down": np.array([[1, 4, 4, 2], [0, 0, 0, 0]], np.float64),
  }
  kept = choose_kept(squares, config, narrow_config(config, 0.5))
  assert kept.kv_heads.tolist() == [[1], [0]]
  assert kept.heads.tolist() == [[2, 3], [0, 1]]
  assert kept.channels.tolist() == [[1, 2], [0, 1]]
  one = ModelConfig(hidden_size=8, num_heads=4, num_kv_heads=1, head_dim=2, mlp_size=4)
  kept = choose_kept(squares, one, narrow_config(one, 0.5))
  assert kept.kv_heads.tolist() == [[0], [0]] and kept.heads.tolist() == [
    [0, 2],
    [0, 3],
  ]
  with pytest.raises(UserError, match="overflow"):
    choose_kept(squares | {"down": squares["down"] * np.nan}, config, config)


def test_the_nearest_number_of_heads_that_a_family_can_say():
  """GPT-2's heads are as wide as their number leaves them; LLaMA's divide its width."""
  llama = models.preset(
    "llama", vocab_size=40, hidden_size=64, num_layers=1, num_heads=8, num_kv_heads=8
  )
  found = {w: narrow_config(llama, w).num_heads for w in (1, 0.9, 0.75, 0.6, 0.5, 0.1)}
  assert found == {1: 8, 0.9: 8, 0.75: 8, 0.6: 4, 0.5: 4, 0.1: 1}
  gpt2 = CONFIGS["gpt2"]
  narrow = narrow_config(gpt2, 0.5)
  assert narrow.num_heads == gpt2.num_heads and narrow.mlp_size == gpt2.mlp_size // 2
  with pytest.raises(UserError, match="are experts, whose channels cannot be chosen"):
    narrow_config(CONFIGS["qwen3_moe"], 0.5)


def test_activities_are_of_the_real_tokens():
  """Padding counts nothing, and batches add up to one of all rows."""
  params = models.init(GROUPED, jax.random.key(0))
  mesh = make_mesh()
  measure = lambda *batches: activity.mean_squares(  # noqa: E731
    Decoder(GROUPED), params, batches, mesh
  )
  whole = measure(rows(8, 6, 6))
  padded = rows(8, 9, 6)
  cut = rows(8, 6, 6)
  padded.tokens[:, :6] = cut.tokens
  again = measure(padded)
  for name in ("out", "down"):
    np.testing.assert_allclose(again[name], whole[name], rtol=1e-5)
    assert whole[name].shape[0] == GROUPED.num_layers and (whole[name] > 0).all()
  twice = measure(cut, cut)
  np.testing.assert_allclose(twice["down"], whole["down"], rtol=1e-6)


def test_kept_is_read_as_it_was_written(tmp_path):
  kept = Kept(np.array([[0, 2]]), np.array([[0, 1]]), np.array([[1, 2, 3]]))
  path = tmp_path / "width.json"
  assert activity.read(path) is None
  activity.write(path, kept)
  for one, other in zip(activity.read(path), kept, strict=True):
    np.testing.assert_array_equal(one, other)
  path.write_text('{"heads": 1}')
  with pytest.raises(UserError, match=r"width.json is damaged .* another workdir"):
    activity.read(path)
