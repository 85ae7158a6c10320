"""Qwen 2, 2.5 and 3, and Qwen 3's mixtures of experts.

Qwen2, Yang et al. 2024, arXiv 2407.10671: LLaMA with biases on query, key and value.
Qwen3, Yang et al. 2025, arXiv 2505.09388: without them, and with a norm on each head's
query and key.
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
  window_of,
)
from okd_jax.models.formats.weights import Weight

_EXPERTS = (
  Weight("layers/mlp/router/kernel", "layers.{}.mlp.gate.weight", True),
  *(
    Weight(
      f"layers/mlp/experts_{name}/kernel",
      f"layers.{{}}.mlp.experts.{{}}.{name}_proj.weight",
      True,
    )
    for name in ("gate", "up", "down")
  ),
)


def _windowed(raw: Raw) -> Fields:
  """Windows in the layers from max_window_layers on, where they are used at all."""
  layers, first = raw["num_hidden_layers"], raw.get("max_window_layers", 28)
  window = raw.get("sliding_window", 4096) if raw.get("use_sliding_window") else None
  local = sliding(raw, [i >= first for i in range(layers)])
  kinds = tuple(LayerKind((window or 0) * each) for each in local)
  return rope.read(raw) | {"layer_kinds": kinds}


def _to_hf(config: ModelConfig) -> dict[str, Any]:
  types, window = layer_types(config), window_of(config)
  return rope.write(config) | {
    "layer_types": types,
    "use_sliding_window": window is not None,
    "sliding_window": window,
    # What older versions read instead.
    "max_window_layers": types.index("sliding_attention") if window else len(types),
  }


def _qwen3(raw: Raw) -> Fields:
  return _windowed(raw) | biases(raw)


def _qwen3_to_hf(config: ModelConfig) -> dict[str, Any]:
  return _to_hf(config) | {"attention_bias": config.qkv_bias}


def _moe(raw: Raw) -> Fields:
  if raw.get("mlp_only_layers") or raw.get("decoder_sparse_step", 1) != 1:
    raise UserError(
      "layers without experts (mlp_only_layers, decoder_sparse_step) are not supported"
    )
  window = raw.get("sliding_window") if raw.get("use_sliding_window") else None
  kinds = (LayerKind(window or 0),) * raw["num_hidden_layers"]
  experts = raw.get("num_local_experts") or raw.get("num_experts") or 128
  return rope.read(raw) | biases(raw) | {"layer_kinds": kinds, "experts": experts}


def _moe_to_hf(config: ModelConfig) -> dict[str, Any]:
  window = window_of(config)
  return rope.write(config) | {
    "attention_bias": config.qkv_bias,
    "num_experts": config.experts,
    "use_sliding_window": window is not None,
    "sliding_window": window,
    "intermediate_size": config.mlp_size,  # of layers without experts: there are none
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
  }


_DEFAULTS = {"max_position_embeddings": 32768, "num_key_value_heads": 32}
QWEN2 = Family(
  architecture="Qwen2ForCausalLM",
  weights=(*OUTER, *NORMS, *ATTENTION, *MLP),
  keys=keys(),
  fixed={"qkv_bias": True},
  read=_windowed,
  write=_to_hf,
  defaults=_DEFAULTS,
)
_HEAD_DIM = Key("head_dim", "head_dim", 128)
QWEN3 = Family(
  architecture="Qwen3ForCausalLM",
  weights=(*OUTER, *NORMS, *ATTENTION, *QK_NORMS, *MLP),
  keys=keys(_HEAD_DIM),
  fixed={"qk_norm": "head"},
  read=_qwen3,
  write=_qwen3_to_hf,
  defaults=_DEFAULTS,
)
QWEN3_MOE = Family(
  architecture="Qwen3MoeForCausalLM",
  weights=(*OUTER, *NORMS, *ATTENTION, *QK_NORMS, *_EXPERTS),
  keys=keys(
    Key("mlp_size", "moe_intermediate_size", 768),
    Key("experts_per_token", "num_experts_per_tok", 8),
    Key("normalize_experts", "norm_topk_prob", False),
  ),
  fixed={"qk_norm": "head"},
  read=_moe,
  write=_moe_to_hf,
  derived=lambda fields: {"experts": 8, "experts_per_token": 2},
  defaults=_DEFAULTS | {"num_key_value_heads": 4},
)
