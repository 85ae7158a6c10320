"""Gemma 1 to 3, text alone: norms with scales counted from 1.

Gemma, Gemma Team 2024, arXiv 2403.08295: LLaMA with tokens' vectors multiplied by the
root of their width. Gemma 2 and 3 have norms before and after attention and MLP.
Gemma 2, Gemma Team 2024, arXiv 2408.00118: caps on scores and logits, a window in every
second layer. Gemma 3, 2025, arXiv 2503.19786: instead of caps norms on each head's
query and key, a window and a rotary base of its own in five of six layers.
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
  QK_NORMS,
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
from okd_jax.models.formats.weights import Weight

_NAMES = {
  "attention_norm": "input_layernorm",
  "attention_out_norm": "post_attention_layernorm",
  "mlp_norm": "pre_feedforward_layernorm",
  "mlp_out_norm": "post_feedforward_layernorm",
}
_WEIGHTS = (
  *OUTER,
  *(Weight(f"layers/{a}/scale", f"layers.{{}}.{b}.weight") for a, b in _NAMES.items()),
  *ATTENTION,
  *MLP,
)
_FIXED = {"norm_place": "both", "norm_from_one": True, "activation": "gelu_tanh"}
_KEYS = keys(
  Key("head_dim", "head_dim", 256),
  Key("activation", "hidden_activation", "gelu_pytorch_tanh"),
  Key("tie_embeddings", "tie_word_embeddings", True),
)
# Of models whose config.json says only what differs from these.
_DEFAULTS = {
  "hidden_size": 2304,
  "intermediate_size": 9216,
  "num_hidden_layers": 26,
  "num_attention_heads": 8,
  "num_key_value_heads": 4,
}
_WINDOW, _LOCAL, _GLOBAL = 4096, 1e4, 1e6  # where none are named


def _common(raw: Raw) -> Fields:
  if raw.get("use_bidirectional_attention"):
    raise UserError("use_bidirectional_attention=True is not supported, only False")
  return biases(raw) | {
    "embed_scale": raw["hidden_size"] ** 0.5,
    "attention_scale": raw.get("query_pre_attn_scalar", 256) ** -0.5,
  }


def _common_to_hf(config: ModelConfig) -> dict[str, Any]:
  scale = config.attention_scale or config.head_dim**-0.5
  return whole_heads(config) | {
    "attention_bias": config.qkv_bias,
    "query_pre_attn_scalar": round(scale**-2),
    "attn_logit_softcapping": config.attention_cap or None,
    "final_logit_softcapping": config.logit_cap or None,
    # transformers makes the mask of a window even where no layer has one.
    "sliding_window": window_of(config) or config.max_length,
    "layer_types": layer_types(config),
  }


def _caps(raw: Raw, attention: float, logits: float) -> Fields:
  """The caps, by default these; null is none."""
  return {
    "attention_cap": raw.get("attn_logit_softcapping", attention) or 0.0,
    "logit_cap": raw.get("final_logit_softcapping", logits) or 0.0,
  }


def _gemma2(raw: Raw) -> Fields:
  local = sliding(raw, _usual(raw["num_hidden_layers"], 2))
  window = raw.get("sliding_window", _WINDOW) or 0
  kinds = tuple(LayerKind(window * each) for each in local)
  return rope.read(raw) | _common(raw) | _caps(raw, 50.0, 30.0) | {"layer_kinds": kinds}


def _gemma2_to_hf(config: ModelConfig) -> dict[str, Any]:
  return rope.write(config) | _common_to_hf(config)


def _gemma3(raw: Raw) -> Fields:
  every = raw.get("sliding_window_pattern") or 6
  windowed = sliding(raw, _usual(raw["num_hidden_layers"], every))
  theta = rope.local_theta(raw, raw.get("rope_local_base_freq") or _LOCAL)
  local = LayerKind(raw.get("sliding_window", _WINDOW) or 0, rope_theta=theta)
  kinds = tuple(local if each else LayerKind() for each in windowed)
  found = rope.read(raw, _GLOBAL, rope.FULL) | _common(raw) | _caps(raw, 0.0, 0.0)
  return found | {"layer_kinds": kinds}


def _gemma3_to_hf(config: ModelConfig) -> dict[str, Any]:
  return _common_to_hf(config) | rope.write_local(config, _LOCAL)


def _usual(layers: int, every: int) -> list[bool]:
  """Which layers have a window where nothing is said."""
  return [(i + 1) % every != 0 for i in range(layers)]


def _random(fields: Fields, every: int, local: LayerKind, **more: Any) -> Fields:
  size = fields.get("hidden_size", ModelConfig.hidden_size)
  windowed = _usual(fields.get("num_layers", ModelConfig.num_layers), every)
  kinds = tuple(local if each else LayerKind() for each in windowed)
  return {"embed_scale": size**0.5, "layer_kinds": kinds, **more}


def _gemma2_random(fields: Fields) -> Fields:
  caps = {"attention_cap": 50.0, "logit_cap": 30.0}
  return _random(fields, 2, LayerKind(_WINDOW), **caps)


def _gemma3_random(fields: Fields) -> Fields:
  return _random(fields, 6, LayerKind(512, rope_theta=_LOCAL), rope_theta=_GLOBAL)


def _gemma1(raw: Raw) -> Fields:
  return rope.read(raw) | biases(raw) | {"embed_scale": raw["hidden_size"] ** 0.5}


def _gemma1_to_hf(config: ModelConfig) -> dict[str, Any]:
  own = {"attention_bias": config.qkv_bias, "hidden_act": "gelu_pytorch_tanh"}
  return rope.write(config) | whole_heads(config) | own


GEMMA = Family(
  architecture="GemmaForCausalLM",
  weights=(*OUTER, *NORMS, *ATTENTION, *MLP),
  # Whatever hidden_act says: published ones say 'gelu' and mean this.
  keys=keys(
    Key("head_dim", "head_dim", 256),
    Key("tie_embeddings", "tie_word_embeddings", True),
    without=["activation"],
  ),
  fixed={"norm_from_one": True, "activation": "gelu_tanh"},
  read=_gemma1,
  write=_gemma1_to_hf,
  defaults={"max_position_embeddings": 8192, "num_key_value_heads": 16},
  derived=lambda fields: {
    "embed_scale": fields.get("hidden_size", ModelConfig.hidden_size) ** 0.5
  },
)
GEMMA2 = Family(
  architecture="Gemma2ForCausalLM",
  weights=_WEIGHTS,
  keys=_KEYS,
  fixed=_FIXED,
  read=_gemma2,
  write=_gemma2_to_hf,
  derived=_gemma2_random,
  defaults=_DEFAULTS | {"vocab_size": 256000, "max_position_embeddings": 8192},
)
GEMMA3 = Family(
  architecture="Gemma3ForCausalLM",
  weights=(*_WEIGHTS, *QK_NORMS),
  keys=_KEYS,
  fixed={**_FIXED, "qk_norm": "head"},
  read=_gemma3,
  write=_gemma3_to_hf,
  derived=_gemma3_random,
  defaults=_DEFAULTS | {"vocab_size": 262208, "max_position_embeddings": 131072},
)
