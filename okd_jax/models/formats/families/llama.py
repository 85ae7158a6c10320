"""LLaMA and those that are the same network but for windows, positions or factors.

LLaMA, Touvron et al. 2023, arXiv 2302.13971, and LLaMA 2 and 3, TinyLlama, SmolLM2 and
whatever else says model_type 'llama'. Mistral 7B, Jiang et al. 2023, arXiv 2310.06825;
Ministral has windows in some layers. SmolLM3 (Hugging Face 2025) leaves positions out
of every fourth layer. Granite 3 (IBM 2024) multiplies by four factors.
"""

from typing import Any

from okd_jax.errors import UserError
from okd_jax.models.config import LayerKind, ModelConfig
from okd_jax.models.formats.families import rope
from okd_jax.models.formats.families.family import (
  ATTENTION,
  MLP,
  NORMS,
  OUTER,
  Family,
  Fields,
  Key,
  Raw,
  biases,
  keys,
  layer_types,
  sliding,
  whole_heads,
  window_of,
)

WEIGHTS = (*OUTER, *NORMS, *ATTENTION, *MLP)
_WINDOW = 4096  # of a Mistral that names none
_SMOLLM3_THETA = 2e6


def _biases(raw: Raw) -> Fields:
  return rope.read(raw) | biases(raw)


def _biases_to_hf(config: ModelConfig) -> dict[str, Any]:
  return rope.write(config) | {"attention_bias": config.qkv_bias}


def _llama_to_hf(config: ModelConfig) -> dict[str, Any]:
  return _biases_to_hf(config) | whole_heads(config)


def _windowed(raw: Raw) -> Fields:
  """Mistral: one window in all layers or none; Ministral says for each."""
  layers, window = raw["num_hidden_layers"], raw.get("sliding_window", _WINDOW)
  local = sliding(raw, [True] * layers)
  kinds = tuple(LayerKind((window or 0) * each) for each in local)
  return rope.read(raw) | {"layer_kinds": kinds}


def _mistral_to_hf(config: ModelConfig) -> dict[str, Any]:
  return rope.write(config) | {"sliding_window": window_of(config)}


def _ministral_to_hf(config: ModelConfig) -> dict[str, Any]:
  return rope.write(config) | {
    # transformers makes the mask of a window even where no layer has one.
    "sliding_window": window_of(config) or config.max_length,
    "layer_types": layer_types(config),
  }


def _smollm3(raw: Raw) -> Fields:
  layers, interval = raw["num_hidden_layers"], raw.get("no_rope_layer_interval", 4)
  rotary = raw.get("no_rope_layers")  # 1 where a layer has positions, all the same
  if rotary is None:
    rotary = [(i + 1) % interval != 0 for i in range(layers)]
  window = raw.get("sliding_window") if raw.get("use_sliding_window") else None
  local = sliding(raw, [not turned for turned in rotary])
  if len(rotary) != layers:
    raise UserError(f"no_rope_layers has {len(rotary)} of them for {layers} layers")
  kinds = tuple(
    LayerKind((window or 0) * each, bool(turned))
    for each, turned in zip(local, rotary, strict=True)
  )
  return rope.read(raw, _SMOLLM3_THETA) | biases(raw) | {"layer_kinds": kinds}


def _smollm3_to_hf(config: ModelConfig) -> dict[str, Any]:
  kinds = config.layer_kinds or (LayerKind(),) * config.num_layers
  window = window_of(config)
  return _biases_to_hf(config) | {
    "no_rope_layers": [int(kind.rotary) for kind in kinds],
    "sliding_window": window,
    "use_sliding_window": window is not None,
    "layer_types": layer_types(config),
  }


def _smollm3_random(fields: Fields) -> Fields:
  layers = range(fields.get("num_layers", ModelConfig.num_layers))
  return {"layer_kinds": tuple(LayerKind(rotary=(i + 1) % 4 != 0) for i in layers)}


_MISTRAL = {"max_position_embeddings": 131072, "num_key_value_heads": 8}
_MLP_BIAS = Key("mlp_bias", "mlp_bias", False)
LLAMA = Family(
  architecture="LlamaForCausalLM",
  weights=WEIGHTS,
  keys=keys(_MLP_BIAS),
  read=_biases,
  write=_llama_to_hf,
)
MISTRAL = Family(
  architecture="MistralForCausalLM",
  weights=WEIGHTS,
  keys=keys(),
  read=_windowed,
  write=_mistral_to_hf,
  defaults=_MISTRAL,
)
MINISTRAL = Family(
  architecture="MinistralForCausalLM",
  weights=WEIGHTS,
  keys=keys(),
  read=_windowed,
  write=_ministral_to_hf,
  defaults=_MISTRAL,
)
SMOLLM3 = Family(
  architecture="SmolLM3ForCausalLM",
  weights=WEIGHTS,
  keys=keys(_MLP_BIAS, Key("tie_embeddings", "tie_word_embeddings", True)),
  read=_smollm3,
  write=_smollm3_to_hf,
  derived=_smollm3_random,
  defaults={"max_position_embeddings": 32768, "num_key_value_heads": 4},
)
GRANITE = Family(
  architecture="GraniteForCausalLM",
  weights=WEIGHTS,
  keys=keys(
    _MLP_BIAS,
    Key("embed_scale", "embedding_multiplier", 1.0),
    Key("residual_scale", "residual_multiplier", 1.0),
    Key("attention_scale", "attention_multiplier", 1.0),
    Key("logit_divisor", "logits_scaling", 1.0),
  ),
  read=_biases,
  write=_biases_to_hf,
  derived=lambda fields: {"attention_scale": 1.0},
)
