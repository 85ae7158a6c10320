"""OLMo 2 and 3: LLaMA with its norms on what attention and MLP put out.

2 OLMo 2 Furious, OLMo Team 2024, arXiv 2501.00656: also a norm on the whole of query
and of key. OLMo 3 (2025) has a window in three of four layers, which scale no
frequencies.
"""

from typing import Any

from okd_jax.errors import UserError
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
  keys,
  layer_types,
  sliding,
  window_of,
)
from okd_jax.models.formats.weights import Weight, require

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
_FULL, _SLIDING = "full_attention", "sliding_attention"


def _biases(raw: Raw) -> Fields:
  bias = raw.get("attention_bias", False)
  return {"qkv_bias": bias, "out_bias": bias}


def _olmo2(raw: Raw) -> Fields:
  return rope.read(raw) | _biases(raw)


def _olmo2_to_hf(config: ModelConfig) -> dict[str, Any]:
  require(config, out_bias=config.qkv_bias)
  return rope.write(config) | {"attention_bias": config.qkv_bias}


def _olmo3(raw: Raw) -> Fields:
  found, layers = rope.read(raw, _THETA, _FULL), raw["num_hidden_layers"]
  window = raw.get("sliding_window", _WINDOW)
  windowed = sliding(raw, _usual(layers))
  # A scaling that is not said layer by layer is for those without a window.
  own = (raw.get("rope_parameters") or {}).get(_SLIDING) or {}
  if rope.scaling(own, raw):
    raise UserError("rope scaling in layers with a window is not supported")
  theta = own.get("rope_theta") or found["rope_theta"]
  local = LayerKind(window or 0, rope_theta=theta)
  kinds = tuple(local if each else LayerKind() for each in windowed)
  return found | _biases(raw) | {"layer_kinds": kinds}


def _olmo3_to_hf(config: ModelConfig) -> dict[str, Any]:
  bases = {kind.rope_theta or config.rope_theta for kind in config.kinds if kind.window}
  full = {kind.rope_theta for kind in config.kinds if not kind.window}
  if len(bases) > 1 or full - {0.0} or not all(kind.rotary for kind in config.kinds):
    raise UserError(
      "the olmo3 layout cannot hold this model: its layers turn keys in more ways than "
      "one with a window and one without"
    )
  local = {"rope_type": "default", "rope_theta": max(bases, default=config.rope_theta)}
  whole = rope.write(config)["rope_parameters"]
  return {
    "rope_parameters": {_FULL: whole, _SLIDING: local},
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
  own=(*rope.OWN, "qkv_bias", "out_bias"),
)
OLMO3 = Family(
  architecture="Olmo3ForCausalLM",
  weights=_WEIGHTS,
  keys=_KEYS,
  fixed=_FIXED,
  read=_olmo3,
  write=_olmo3_to_hf,
  own=(*rope.OWN, "qkv_bias", "out_bias", "layer_kinds"),
  derived=_olmo3_random,
)
