"""Attention's kernels: the same numbers as XLA's, and which of them is taken when."""

import functools
import re
from types import SimpleNamespace

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from okd_jax.errors import UserError
from okd_jax.models import Decoder, ModelConfig, init_cache, kernels
from okd_jax.models.adapters import Prefix, Prompt
from okd_jax.models.attention import attention_inputs
from okd_jax.run import checks
from okd_jax.runtime import sharding

# Two tokens' heads to one of the keys'; the smallest rows that splash attention takes.
CONFIG = ModelConfig(
  vocab_size=40, hidden_size=24, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16
)
LENGTH = 128
slow = pytest.mark.slow


def segments(rows: int, length: int = LENGTH) -> np.ndarray:
  """Packed rows, padded on the right, on the left, on both sides and not at all."""
  ids = np.ones((rows, length), np.int32)
  ids[:, length // 3 :] = 2
  ids[:, length - length // 4 :] = 5
  ids[0, -7:] = 0
  ids[1, :9] = 0
  ids[2, :3], ids[2, -11:] = 0, 0
  return ids


def heads(config: ModelConfig, rows: int, length: int, dtype=jnp.float32):
  """(queries, keys, values), and what their output is multiplied with for a loss."""
  keys = jax.random.split(jax.random.key(0), 4)
  counts = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
  qkv = tuple(
    jax.random.normal(key, (rows, length, count, config.head_dim)).astype(dtype)
    for key, count in zip(keys, counts, strict=False)
  )
  return qkv, jax.random.normal(keys[3], qkv[0].shape)


def outcome(attend, qkv, pull, segment_ids):
  """(output at the real tokens, gradients) of the loss that sees these tokens alone."""
  real = (segment_ids != 0)[..., None, None]

  def loss(*qkv):
    out = attend(*qkv).astype(jnp.float32) * real
    return jnp.sum(out * pull), out

  grads, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*qkv)
  return out, *grads


def assert_splash_is_xla(config, rows, length, dtype=jnp.float32, atol=2e-5):
  qkv, pull = heads(config, rows, length, dtype)
  segment_ids = jnp.asarray(segments(rows, length))
  mask = attention_inputs(config, segment_ids, segment_ids).inputs.mask
  want = outcome(functools.partial(kernels.xla, mask=mask), qkv, pull, segment_ids)
  splash = functools.partial(kernels.splash, segment_ids=segment_ids, interpret=True)
  got = outcome(splash, qkv, pull, segment_ids)
  for ours, theirs in zip(got, want, strict=True):
    ours, theirs = (np.asarray(x, np.float32) for x in (ours, theirs))
    assert np.isfinite(ours).all()
    np.testing.assert_allclose(ours, theirs, atol=atol)
  # What padding itself gets is finite, too: no NaN may wait there.
  assert jnp.isfinite(splash(*qkv)).all()


@pytest.mark.parametrize(
  "num_heads, num_kv_heads, head_dim, length",
  [
    pytest.param(2, 2, 64, 128, marks=slow),
    (4, 2, 64, 384),
    pytest.param(2, 1, 128, 256, marks=slow),
    (2, 2, 80, 128),
  ],
)
def test_splash_attention_is_xlas(num_heads, num_kv_heads, head_dim, length):
  shape = dict(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim)
  assert_splash_is_xla(ModelConfig(**shape), 3, length)


def test_splash_attention_takes_bfloat16():
  config = ModelConfig(num_heads=4, num_kv_heads=2, head_dim=64)
  assert_splash_is_xla(config, 3, LENGTH, jnp.bfloat16, atol=0.05)


@pytest.mark.parametrize(
  "rows, num_heads, num_kv_heads",
  [(4, 4, 2), pytest.param(3, 4, 2, marks=slow), pytest.param(4, 3, 1, marks=slow)],
  ids=["even", "odd_rows", "odd_heads"],
)
def test_splash_attention_runs_on_every_device_of_a_mesh(rows, num_heads, num_kv_heads):
  config = ModelConfig(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=16)
  with jax.set_mesh(sharding.make_mesh(data=2, fsdp=2, tensor=2)):
    assert_splash_is_xla(config, rows, LENGTH)


@pytest.fixture
def interpreted(monkeypatch):
  """Lets splash attention run on a CPU; returns how often it was traced."""
  calls = []

  def splash(*args):
    calls.append(args)
    return original(*args, interpret=True)

  original = kernels.splash
  monkeypatch.setattr(kernels, "splash", splash)
  return calls


@pytest.mark.parametrize("remat", [pytest.param(False, marks=slow), True])
def test_a_decoder_computes_the_same_with_splash_attention(interpreted, remat):
  params, segment_ids = families.params(CONFIG), jnp.asarray(segments(3))
  tokens = families.tokens(CONFIG, 3, LENGTH)
  real = (segment_ids != 0)[..., None]

  @functools.partial(jax.jit, static_argnums=0)
  def run(kernel, params):
    def loss(params):
      decoder = Decoder(CONFIG, remat=remat, attention=kernel)
      hidden, _ = decoder.apply({"params": params}, tokens, segment_ids)
      return jnp.square(hidden * real).mean() * 100, hidden * real

    return jax.grad(loss, has_aux=True)(params)

  want = run("xla", params)
  assert not interpreted
  got = run("splash", params)
  assert interpreted
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), got, want)


def test_a_named_kernel_leaves_caches_and_prefixes_to_xla():
  """On this machine splash attention would not even compile."""
  variables = {"params": families.params(CONFIG)}
  tokens = families.tokens(CONFIG, 2, LENGTH)
  adapter = Prefix(length=3)
  shapes = jax.eval_shape(Decoder(CONFIG, adapter).init, jax.random.key(0), tokens)
  module = jax.tree.map(lambda s: jnp.full(s.shape, 0.1), shapes["adapter"])
  for options in ({"cache": init_cache(CONFIG, 2, LENGTH)}, {"adapter": adapter}):
    outputs = [
      jax.jit(Decoder(CONFIG, options.get("adapter"), attention=kernel).apply)(
        variables | {"adapter": module}, tokens, cache=options.get("cache")
      )[0]
      for kernel in ("xla", "splash")
    ]
    np.testing.assert_array_equal(*outputs)


def test_the_choice_on_a_cpu_is_xlas_very_program():
  tokens = families.tokens(CONFIG, 2, LENGTH)
  variables = {"params": families.params(CONFIG)}
  programs = [
    str(jax.make_jaxpr(Decoder(CONFIG, **options).apply)(variables, tokens))
    for options in ({}, {"attention": "xla"})
  ]
  assert programs[0] == programs[1]


def device(platform, version="", capability="0.0"):
  client = SimpleNamespace(platform_version=version)
  return SimpleNamespace(
    platform=platform, client=client, compute_capability=capability
  )


DEVICES = {
  "cpu": device("cpu"),
  "tpu": device("tpu"),
  "turing": device("gpu", "PJRT C API\ncuda 12090", "7.5"),
  "ampere": device("gpu", "PJRT C API\ncuda 12090", "8.6"),
  "hopper": device("gpu", "PJRT C API\ncuda 12090", "9.0"),
  "rocm": device("gpu", "PJRT C API\nrocm 60300", "gfx942"),
}


@pytest.fixture
def machine(monkeypatch):
  """Sets the kind of device that this machine seems to have."""

  def seem(kind: str):
    monkeypatch.setattr(jax, "local_devices", lambda: [DEVICES[kind]])

  return seem


@pytest.mark.parametrize(
  "kind, kernel",
  [
    ("cpu", "xla"),
    ("tpu", "splash"),
    ("turing", "xla"),
    ("ampere", "cudnn"),
    ("hopper", "cudnn"),
    ("rocm", "xla"),
  ],
)
def test_the_kernel_is_the_platforms(machine, kind, kernel):
  machine(kind)
  form = kernels.Form(jnp.bfloat16, 64, LENGTH, LENGTH)
  assert kernels.choose("", form) == kernel
  assert kernels.choose("xla", form) == "xla"


@pytest.mark.parametrize(
  "kind, dtype, head_dim, queries, keys, cached, kernel",
  [
    ("tpu", "float32", 80, 256, 256, False, "splash"),
    ("tpu", "float16", 64, 256, 256, False, "xla"),
    ("tpu", "float32", 64, 200, 200, False, "xla"),
    ("tpu", "float32", 64, 1, 1, False, "xla"),
    ("tpu", "float32", 64, 256, 384, False, "xla"),
    ("tpu", "float32", 64, 256, 256, True, "xla"),
    ("ampere", "float16", 128, 200, 216, False, "cudnn"),
    ("ampere", "float32", 64, 256, 256, False, "xla"),
    ("ampere", "bfloat16", 256, 256, 256, False, "xla"),
    ("hopper", "bfloat16", 256, 256, 256, False, "cudnn"),
    ("hopper", "bfloat16", 264, 256, 256, False, "xla"),
    ("hopper", "bfloat16", 60, 256, 256, False, "xla"),
    ("hopper", "bfloat16", 64, 255, 255, False, "xla"),
    ("hopper", "bfloat16", 64, 256, 259, False, "xla"),
    ("hopper", "bfloat16", 64, 256, 256, True, "xla"),
  ],
)
def test_the_choice_falls_back_to_xla(
  machine, kind, dtype, head_dim, queries, keys, cached, kernel
):
  machine(kind)
  assert (
    kernels.choose("", kernels.Form(dtype, head_dim, queries, keys), cached) == kernel
  )


@pytest.mark.parametrize(
  "kind, kernel, length, options, words",
  [
    ("cpu", "splash", 128, {}, "splash does not run on this machine"),
    ("tpu", "cudnn", 128, {}, "cudnn does not run on this machine, .* be splash"),
    ("tpu", "splash", 200, {}, "multiple of 128 tokens, not 200 .the student"),
    ("tpu", "splash", 128, {"dtype": jnp.float16}, "bfloat16 or float32, not float16"),
    (
      "tpu",
      "splash",
      128,
      {"adapter": Prompt(length=4)},
      "no learned prefix",
    ),
    ("hopper", "cudnn", 128, {}, "bfloat16 or float16, not float32"),
    (
      "hopper",
      "cudnn",
      128,
      {"dtype": jnp.bfloat16, "adapter": Prefix(length=3)},
      "even number of tokens, not 128 .keys: 131",
    ),
  ],
)
def test_a_named_kernel_that_cannot_run_is_an_error(
  machine, kind, kernel, length, options, words
):
  machine(kind)
  decoders = {"student": Decoder(CONFIG, **options)}
  with pytest.raises(UserError, match=words):
    checks.check_attention(kernel, length, decoders)


def test_a_named_kernel_that_can_run_is_no_error(machine):
  decoders = {"student": Decoder(CONFIG, dtype=jnp.bfloat16)}
  for kind, kernel in (("tpu", "splash"), ("hopper", "cudnn"), ("cpu", "xla")):
    machine(kind)
    checks.check_attention(kernel, 256, decoders)


@pytest.mark.parametrize("meshed", [False, True])
def test_cudnn_is_called_forward_and_backward(monkeypatch, meshed):
  """As far as a machine without a GPU can tell: by the program it would be given."""
  version = "jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version"
  monkeypatch.setattr(version, lambda: 91000)
  qkv, pull = heads(ModelConfig(num_heads=4, num_kv_heads=2, head_dim=64), 4, 130)
  qkv = tuple(x.astype(jnp.bfloat16) for x in qkv)
  segment_ids = jnp.asarray(segments(4, 130))
  mask = attention_inputs(CONFIG, segment_ids, segment_ids).inputs.mask

  def loss(*qkv):
    return jnp.sum(kernels.cudnn(*qkv, mask).astype(jnp.float32) * pull)

  gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  with jax.set_mesh(mesh if meshed else sharding.make_mesh()):
    text = gradient.trace(*qkv).lower(lowering_platforms=("cuda",)).as_text()
  calls = re.findall(r"@(__cudnn\$\w+)\(", text)
  assert sorted(calls) == [
    "__cudnn$fmhaScaleBiasSoftmax",
    "__cudnn$fmhaScaleBiasSoftmaxBackward",
  ]
  # By heads of squares: those of the mask, which is one for all.
  assert set(re.findall(r"x(\d+)x130x130x", text)) == {"1"}
