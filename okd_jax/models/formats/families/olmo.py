"""OLMo 2 and 3: LLaMA with its norms on what attention and MLP put out.

2 OLMo 2 Furious, OLMo Team 2024, arXiv 2501.00656: also a norm on the whole of query
and of key. OLMo 3 (2025) has a window in three of four layers, which scale no
frequencies.
"""

from typing import Any

from okd_jax.models.config import LayerKind, ModelConfig
from okd_jax.models.formats.families import rope
from okd_jax.models.formats.families.family import (
  ATTENTION,
  MLP,
  OUTER,
  QK_NORMS,
  Family,
  Fields,
  Key,
  Raw,
  biases,
  keys,
  layer_types,
  sliding,
  window_of,
)
from okd_jax.models.formats.weights import Weight

_WEIGHTS = (
  *OUTER,
  Weight(
    "layers/attention_out_norm/scale", "layers.{}.post_attention_layernorm.weight"
  ),
  Weight("layers/mlp_out_norm/scale", "layers.{}.post_feedforward_layernorm.weight"),
  *ATTENTION,
  *QK_NORMS,
  *MLP,
)
_FIXED = {"norm_place": "on_output", "qk_norm": "projection"}
_KEYS = keys(Key("norm_eps", "rms_norm_eps", 1e-5), without=["head_dim"])
_THETA, _WINDOW = 500000.0, 4096  # of an OLMo 3 that names none


def _olmo2(raw: Raw) -> Fields:
  return rope.read(raw) | biases(raw)


def _olmo2_to_hf(config: ModelConfig) -> dict[str, Any]:
  return rope.write(config) | {"attention_bias": config.qkv_bias}


def _olmo3(raw: Raw) -> Fields:
  found, layers = rope.read(raw, _THETA, rope.FULL), raw["num_hidden_layers"]
  window = raw.get("sliding_window", _WINDOW)
  windowed = sliding(raw, _usual(layers))
  theta = rope.local_theta(raw, found["rope_theta"])
  local = LayerKind(window or 0, rope_theta=theta)
  kinds = tuple(local if each else LayerKind() for each in windowed)
  return found | biases(raw) | {"layer_kinds": kinds}


def _olmo3_to_hf(config: ModelConfig) -> dict[str, Any]:
  return rope.write_local(config, config.rope_theta) | {
    "attention_bias": config.qkv_bias,
    "layer_types": layer_types(config),
    # transformers makes the mask of a window even where no layer has one.
    "sliding_window": window_of(config) or config.max_length,
  }


def _usual(layers: int) -> list[bool]:
  """Which layers have a window where nothing is said."""
  return [(i + 1) % 4 != 0 for i in range(layers)]


def _olmo3_random(fields: Fields) -> Fields:
  layers = fields.get("num_layers", ModelConfig.num_layers)
  theta = fields.get("rope_theta", _THETA)
  local = LayerKind(_WINDOW, rope_theta=theta)
  kinds = tuple(local if each else LayerKind() for each in _usual(layers))
  return {"rope_theta": theta, "layer_kinds": kinds}


OLMO2 = Family(
  architecture="Olmo2ForCausalLM",
  weights=_WEIGHTS,
  keys=_KEYS,
  fixed=_FIXED,
  read=_olmo2,
  write=_olmo2_to_hf,
)
OLMO3 = Family(
  architecture="Olmo3ForCausalLM",
  weights=_WEIGHTS,
  keys=_KEYS,
  fixed=_FIXED,
  read=_olmo3,
  write=_olmo3_to_hf,
  derived=_olmo3_random,
)
