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
from okd_jax.models import ModelConfig, RopeScaling

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
}


def params(config: ModelConfig, seed: int = 0) -> dict:
  """Random parameters with every bias and norm away from where it starts."""
  tree = {}
  for path, spec in models.parameter_shapes(config).items():
    # A generator a parameter: values do not depend on the order of the others.
    rng = np.random.default_rng([seed, zlib.crc32(path.encode())])
    values = rng.standard_normal(spec.shape, np.float32)
    tree[path] = 1 + 0.2 * values if path.endswith("scale") else 0.25 * values
  return traverse_util.unflatten_dict(tree, sep="/")


def tokens(config: ModelConfig, batch: int = 2, length: int = 72, seed: int = 0):
  """Random int32 tokens."""
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
    golden[name] = logits[0, ::6]
  GOLDEN.parent.mkdir(exist_ok=True)
  np.savez_compressed(GOLDEN, **golden)


if __name__ == "__main__":
  _write_golden()
