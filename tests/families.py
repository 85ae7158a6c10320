"""Tiny random models of every family, for the tests of `okd_jax.models`.

Shapes are odd on purpose: head counts that are no power of two, heads narrower or
wider than hidden_size / num_heads, biases, untied heads, every kind of rope scaling.
Weights come from numpy, so that they are the same on every platform.

    python tests/families.py    writes tests/golden/logits.npz anew, with torch
"""

import tempfile
import zlib
from pathlib import Path

import numpy as np
from flax import traverse_util

from okd_jax import models
from okd_jax.models import LayerKind, ModelConfig, RopeScaling, preset

GOLDEN = Path(__file__).parent / "golden" / "logits.npz"
_GPT2 = {
  "family": "gpt2",
  "norm": "layernorm",
  "position": "learned",
  "gated_mlp": False,
  "qkv_bias": True,
  "out_bias": True,
  "mlp_bias": True,
}
_ODD = {  # dimensions of most families below
  "vocab_size": 67,
  "hidden_size": 36,
  "num_layers": 3,
  "num_heads": 6,
  "num_kv_heads": 2,
  "head_dim": 10,
  "mlp_size": 52,
  "max_length": 256,
  "norm_eps": 1e-6,
  "bos_id": 1,
  "eos_ids": (2,),
  "pad_id": 0,
}
_YARN = RopeScaling(
  "yarn", 4.0, original_max_length=64, beta_fast=8.0, attention_factor=1.1
)
CONFIGS = {
  "gpt2": ModelConfig(
    **_GPT2,
    vocab_size=61,
    hidden_size=30,
    num_layers=3,
    num_heads=3,
    mlp_size=44,
    max_length=96,
    activation="gelu_tanh",
    eos_ids=(60,),
  ),
  "gpt2_untied": ModelConfig(
    **_GPT2,
    vocab_size=53,
    hidden_size=24,
    num_layers=2,
    num_heads=4,
    max_length=80,
    activation="gelu",
    tie_embeddings=False,
    norm_eps=1e-3,
    bos_id=1,
    eos_ids=(2, 7),
    pad_id=0,
  ),
  "llama_gqa": ModelConfig(
    vocab_size=67,
    hidden_size=30,
    num_layers=3,
    num_heads=3,
    num_kv_heads=1,
    head_dim=8,
    mlp_size=52,
    max_length=128,
    tie_embeddings=False,
    bos_id=1,
    eos_ids=(2,),
  ),
  "llama3": ModelConfig(
    vocab_size=59,
    hidden_size=40,
    num_layers=2,
    num_heads=5,
    mlp_size=36,
    max_length=256,
    rope_theta=1000.0,
    rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 64),
    eos_ids=(3, 4),
  ),
  "llama_biases": ModelConfig(
    vocab_size=64,
    hidden_size=32,
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
    mlp_size=40,
    max_length=128,
    rope_scaling=RopeScaling("linear", 2.5),
    activation="gelu_tanh",
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
  ),
  "mistral": ModelConfig(
    family="mistral",
    vocab_size=71,
    hidden_size=44,
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_dim=10,
    mlp_size=64,
    max_length=128,
    tie_embeddings=False,
    norm_eps=1e-6,
  ),
  "mistral_window": preset(
    "mistral", **_ODD, layer_kinds=(LayerKind(13),) * 3, tie_embeddings=False
  ),
  "ministral": preset(
    "ministral", **_ODD, layer_kinds=(LayerKind(9), LayerKind(), LayerKind(9))
  ),
  "qwen2": preset("qwen2", **_ODD, rope_theta=1e6),
  "qwen2_window": preset(
    "qwen2",
    **_ODD,
    rope_scaling=_YARN,
    layer_kinds=(LayerKind(), LayerKind(), LayerKind(21)),
    tie_embeddings=False,
  ),
  "qwen3": preset("qwen3", **_ODD, rope_theta=1e6),
  "qwen3_biases": preset(
    "qwen3",
    **_ODD,
    qkv_bias=True,
    out_bias=True,
    tie_embeddings=False,
    rope_scaling=RopeScaling("dynamic", 4.0),
  ),
  "qwen3_moe": preset(
    "qwen3_moe", **_ODD, experts=5, experts_per_token=2, tie_embeddings=False
  ),
  "qwen3_moe_raw": preset(
    "qwen3_moe",
    **_ODD,
    experts=4,
    experts_per_token=3,
    normalize_experts=False,
    layer_kinds=(LayerKind(17),) * 3,
  ),
  "gemma": preset("gemma", **_ODD),
  "gemma2": preset(
    "gemma2",
    **_ODD,
    attention_cap=5.0,
    logit_cap=3.0,
    attention_scale=7**-0.5,
    layer_kinds=(LayerKind(11), LayerKind(), LayerKind(11)),
  ),
  "gemma3": preset(
    "gemma3_text",
    **_ODD,
    attention_scale=12**-0.5,
    rope_theta=1e5,
    rope_scaling=RopeScaling("linear", 8.0),
    layer_kinds=(LayerKind(11, rope_theta=1e3), LayerKind(), LayerKind(11, True, 1e3)),
  ),
  "olmo2": preset(
    "olmo2", **_ODD | {"head_dim": 6}, qkv_bias=True, out_bias=True, rope_theta=5e5
  ),
  "olmo3": preset(
    "olmo3",
    **_ODD | {"head_dim": 6, "num_layers": 4},
    rope_theta=5e4,
    rope_scaling=_YARN,
    layer_kinds=(LayerKind(19, rope_theta=5e4),) * 3 + (LayerKind(),),
    tie_embeddings=False,
  ),
  "smollm3": preset("smollm3", **_ODD | {"num_layers": 4}),
  "smollm3_window": preset(
    "smollm3",
    **_ODD,
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    layer_kinds=(LayerKind(), LayerKind(23, rotary=False), LayerKind()),
  ),
  "granite": preset(
    "granite",
    **_ODD,
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    embed_scale=3.0,
    residual_scale=0.4,
    attention_scale=0.2,
    logit_divisor=1.7,
  ),
  "phi3": preset(
    "phi3",
    **_ODD | {"head_dim": 0},
    rotary_share=0.7,
    layer_kinds=(LayerKind(31),) * 3,
    tie_embeddings=False,
  ),
  "phi3_long": preset(
    "phi3",
    **_ODD | {"head_dim": 0, "hidden_size": 48},
    rotary_share=0.75,
    rope_scaling=RopeScaling(
      "longrope",
      4.0,
      original_max_length=64,
      attention_factor=1.15,
      short_factors=(1.0, 1.1, 1.3),
      long_factors=(2.0, 2.5, 4.0),
    ),
  ),
  "opt": preset(
    "opt",
    **_ODD | {"num_kv_heads": 0, "head_dim": 0, "norm_eps": 1e-5},
  ),
  "opt_350m": preset(
    "opt",
    **_ODD | {"num_kv_heads": 0, "head_dim": 0, "norm_eps": 1e-5},
    embed_size=22,
    norm_place="on_sum",
    final_norm=False,
    activation="gelu",
  ),
}


def params(config: ModelConfig, seed: int = 0) -> dict:
  """Random parameters with every bias and norm away from where it starts."""
  tree = {}
  for path, spec in models.parameter_shapes(config).items():
    # A generator a parameter: values do not depend on the order of the others.
    rng = np.random.default_rng([seed, zlib.crc32(path.encode())])
    values = rng.standard_normal(spec.shape, np.float32)
    middle = 0 if config.norm_from_one else 1
    tree[path] = middle + 0.2 * values if path.endswith("scale") else 0.25 * values
  return traverse_util.unflatten_dict(tree, sep="/")


def tokens(
  config: ModelConfig, batch: int = 2, length: int | None = None, seed: int = 0
):
  """Random int32 tokens; by default 200, or as many as the model takes."""
  length = length or min(200, config.max_length)
  rng = np.random.default_rng(seed)
  return rng.integers(0, config.vocab_size, (batch, length), dtype=np.int32)


def save(name: str, folder: Path, **kwargs):
  """Writes a tiny model's HF folder and returns its (parameters, config)."""
  config = CONFIGS[name]
  tree = params(config)
  models.save(folder, tree, config, **kwargs)
  return tree, config


def torch_model(folder: Path):
  """transformers' model of a folder, in evaluation mode and float32."""
  import torch
  import transformers

  torch.set_num_threads(1)  # they are tiny: more threads only wait for each other
  model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
  return model.eval()


def torch_logits(model, tokens, segment_ids=None) -> np.ndarray:
  """Its logits; padding as in `Decoder`, positions from the first real token on."""
  import torch

  kwargs = {}
  if segment_ids is not None:
    mask = torch.tensor(np.asarray(segment_ids, np.int64))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    kwargs = {"attention_mask": mask, "position_ids": positions}
  with torch.no_grad():
    out = model(torch.tensor(np.asarray(tokens, np.int64)), **kwargs)
  return out.logits.float().numpy()


def _write_golden():
  golden = {}
  for name, config in CONFIGS.items():
    with tempfile.TemporaryDirectory() as folder:
      save(name, Path(folder) / "model")
      logits = torch_logits(torch_model(Path(folder) / "model"), tokens(config, 1))
    golden[name] = logits[0, 7::16]
  GOLDEN.parent.mkdir(exist_ok=True)
  np.savez_compressed(GOLDEN, **golden)


if __name__ == "__main__":
  _write_golden()
