"""Frozen weights in eight bits: rounding, products, gradients, memory."""

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from trial import kept_by_layers

from okd_jax import models
from okd_jax.losses import forward_kl
from okd_jax.models import Decoder, int8
from okd_jax.models.adapters import Lora
from okd_jax.runtime import sharding


def flat(tree):
  return traverse_util.flatten_dict(tree, sep="/")


def test_quantize_by_hand():
  kernel = np.array([[1.27, 0.0, -2.0], [-0.635, 0.0, 4.0]], np.float32)
  q, s = int8.quantize(kernel)
  np.testing.assert_array_equal(q, [[127, 0, -64], [-64, 0, 127]])
  np.testing.assert_allclose(s, [0.01, 1.0, 4 / 127], rtol=1e-6)
  assert q.dtype == np.int8 and s.dtype == np.float32


def test_no_weight_moves_by_more_than_half_a_step():
  kernel = np.random.default_rng(0).standard_normal((3, 50, 7)).astype(np.float32)
  q, s = int8.quantize(kernel)
  assert (np.abs(q * s[:, None] - kernel).max(1) <= s * 0.501).all()
  whole = {"layers": {"mlp": {"up": {"kernel": jnp.asarray(kernel)}}}}
  own = flat(int8.quantized(whole))
  np.testing.assert_array_equal(own["layers/mlp/up/kernel"], q)
  np.testing.assert_allclose(own["layers/mlp/up/kernel_scale"], s, rtol=1e-6)
  back = flat(int8.dequantized(int8.quantized(whole)))
  np.testing.assert_allclose(back["layers/mlp/up/kernel"], q * s[:, None], rtol=1e-6)


def test_the_product_and_its_gradient():
  keys = jax.random.split(jax.random.key(0), 3)
  x, pull = jax.random.normal(keys[0], (2, 5, 6)), jax.random.normal(keys[1], (2, 5, 4))
  q = jax.random.randint(keys[2], (6, 4), -127, 128, jnp.int8)
  s = jnp.array([0.1, 0.01, 1.0, 0.003])

  def plain(x):
    return x @ (q * s[None])

  for function in (lambda f: f(x), lambda f: jax.vjp(f, x)[1](pull)[0]):
    want, got = function(plain), function(lambda x: int8.project(x, q, s))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama_gqa", "gpt2", "qwen3_moe"])
def test_a_model_computes_with_what_it_was_rounded_to(name):
  config, params = families.CONFIGS[name], families.params(families.CONFIGS[name])
  tokens = families.tokens(config, 2, 20)
  run = jax.jit(Decoder(config).apply)
  small = int8.quantized(params)
  kernels = {path: x.dtype for path, x in flat(small).items() if int8.applies(path)}
  assert set(kernels.values()) == {jnp.dtype(jnp.int8)} and len(kernels) >= 6
  got, _ = run({"params": small}, tokens)
  want, _ = run({"params": int8.dequantized(small)}, tokens)
  np.testing.assert_allclose(got, want, atol=2e-4)
  assert jnp.abs(want - run({"params": params}, tokens)[0]).max() > 1e-3


@pytest.mark.parametrize("name", ["phi3", "qwen3_moe"])
def test_a_folder_is_rounded_tensor_by_tensor(name, tmp_path):
  params, config = families.save(name, tmp_path / "model")
  model = models.load(tmp_path / "model", quantize=True, dtype=jnp.bfloat16)
  want = flat(int8.quantized(params))
  for path, leaf in flat(model.params).items():
    if path.endswith("kernel_scale"):
      np.testing.assert_allclose(leaf, want[path], rtol=1e-6)
    elif int8.applies(path):
      assert np.abs(leaf.astype(np.int32) - want[path].astype(np.int32)).max() <= 1
    else:
      assert leaf.dtype == jnp.bfloat16
  assert set(flat(model.params)) == set(want)


def test_modules_on_it_learn_and_no_wide_copy_is_kept():
  config = families.CONFIGS["llama_gqa"]
  decoder, tokens = Decoder(config, Lora(rank=2)), families.tokens(config, 2, 16)
  small = jax.tree.map(jnp.asarray, int8.quantized(families.params(config)))
  adapter = jax.jit(decoder.init)(jax.random.key(0), tokens)["adapter"]
  adapter = jax.tree.map(lambda x: x + 0.1, adapter)

  def loss(adapter, params):
    hidden, _ = decoder.apply({"params": params, "adapter": adapter}, tokens)
    return jnp.square(hidden).mean()

  grads = jax.jit(jax.grad(loss))(adapter, small)
  wide = jax.jit(jax.grad(loss))(adapter, int8.dequantized(small))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), grads, wide)
  assert all(jnp.abs(grad).max() > 0 for grad in jax.tree.leaves(grads))
  kept = kept_by_layers(loss, adapter, small)
  assert kept == kept_by_layers(loss, adapter, int8.dequantized(small))


def test_on_a_mesh():
  config = families.CONFIGS["llama3"]
  small = int8.quantized(families.params(config))
  tokens = families.tokens(config, 4, 16)
  want = jax.jit(Decoder(config).apply)({"params": small}, tokens)[0]
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  with jax.set_mesh(mesh):
    placed = jax.device_put(small, sharding.shardings(small, mesh))
    up = placed["layers"]["mlp"]["up"]
    assert tuple(up["kernel_scale"].sharding.spec) == (None, "tensor")
    rows = jax.device_put(tokens, sharding.batch_sharding(mesh))
    got = jax.jit(Decoder(config).apply)({"params": placed}, rows)[0]
  np.testing.assert_allclose(got, want, atol=1e-4)


def test_a_real_model_hardly_changes(shared):
  """stories260K on text: .0002 nats."""
  folder = shared / "models" / "stories260K"
  model, small = models.load(folder), models.load(folder, quantize=True)
  text = (shared / "data/text/tinyshakespeare.txt").read_text()[:4000]
  ids = model.tokenizer(text, truncation=True, max_length=4 * 128)["input_ids"]
  tokens = jnp.asarray(ids).reshape(4, 128)
  run = jax.jit(model.logits)
  kl = forward_kl(run(model.params, tokens), run(small.params, tokens)).mean()
  assert 1e-5 < kl < 1e-3
