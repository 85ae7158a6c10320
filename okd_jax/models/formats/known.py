"""Shapes of well-known models, for whoever plans with them and has none at hand.

From each model's config.json on the hub, as published; what only texts depend on, such
as token ids and rotary bases, is left at its family's default.
"""

from okd_jax.models.config import ModelConfig
from okd_jax.models.formats.families import preset

_Dims = tuple[int, int, int, int, int, int]  # layers, width, heads, key heads, mlp, ids


def known(name: str) -> ModelConfig | None:
  """The shape of the model that the hub calls so, None of one that is not listed.

  >>> known("gpt2-xl").num_layers, known("somebody/model")
  (48, None)
  """
  return _SHAPES.get(name.removeprefix("openai-community/"))


def _gpt2(layers: int, width: int, heads: int) -> ModelConfig:
  sizes = dict(hidden_size=width, num_layers=layers, num_heads=heads)
  return preset("gpt2", vocab_size=50257, max_length=1024, **sizes)


def _llama(family: str, dims: _Dims, length: int, tied: bool) -> ModelConfig:
  layers, width, heads, key_heads, mlp, ids = dims
  return preset(
    family,
    vocab_size=ids,
    hidden_size=width,
    num_layers=layers,
    num_heads=heads,
    num_kv_heads=key_heads,
    head_dim=128 if family == "qwen3" else 0,
    mlp_size=mlp,
    max_length=length,
    tie_embeddings=tied,
  )


def _qwen3(layers: int, width: int, heads: int, mlp: int, tied: bool) -> ModelConfig:
  return _llama("qwen3", (layers, width, heads, 8, mlp, 151936), 40960, tied)


_TINY = _llama("llama", (22, 2048, 32, 4, 5632, 32000), 2048, False)
_SHAPES = {
  "gpt2": _gpt2(12, 768, 12),
  "gpt2-medium": _gpt2(24, 1024, 16),
  "gpt2-large": _gpt2(36, 1280, 20),
  "gpt2-xl": _gpt2(48, 1600, 25),
  "meta-llama/Llama-2-7b-hf": _llama(
    "llama", (32, 4096, 32, 32, 11008, 32000), 4096, False
  ),
  "meta-llama/Llama-2-13b-hf": _llama(
    "llama", (40, 5120, 40, 40, 13824, 32000), 4096, False
  ),
  "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T": _TINY,
  "TinyLlama/TinyLlama-1.1B-Chat-v1.0": _TINY,
  "Qwen/Qwen3-0.6B": _qwen3(28, 1024, 16, 3072, True),
  "Qwen/Qwen3-1.7B": _qwen3(28, 2048, 16, 6144, True),
  "Qwen/Qwen3-4B": _qwen3(36, 2560, 32, 9728, True),
  "Qwen/Qwen3-8B": _qwen3(36, 4096, 32, 12288, False),
  "Qwen/Qwen3-14B": _qwen3(40, 5120, 40, 17408, False),
  "Qwen/Qwen3-32B": _qwen3(64, 5120, 64, 25600, False),
}
