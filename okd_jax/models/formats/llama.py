"""LLaMA and Mistral: their Hugging Face configuration and weight table.

LLaMA, Touvron et al. 2023, arXiv 2302.13971; also LLaMA 2 and 3, TinyLlama, SmolLM2
and whatever else says model_type 'llama'. Mistral 7B, Jiang et al. 2023, arXiv
2310.06825, is the same network with a sliding window.
"""

import logging
from collections.abc import Mapping
from typing import Any

from okd_jax.errors import UserError
from okd_jax.models.config import ModelConfig, RopeScaling
from okd_jax.models.formats import activations
from okd_jax.models.formats.weights import Weight, require

ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}
PREFIX = "model."  # absent in checkpoints of the headless base model
LAYERS = "layers"  # the list of layers, as PEFT names it
FAN_IN_FAN_OUT = False  # Linear keeps [out, in]; PEFT asks
IGNORED = r"rotary_emb\.inv_freq$"  # derived; old versions stored it

PROJECTIONS = {
  "attention/query": ("self_attn.q_proj", 0, 1),
  "attention/key": ("self_attn.k_proj", 0, 1),
  "attention/value": ("self_attn.v_proj", 0, 1),
  "attention/out": ("self_attn.o_proj", 0, 1),
  "mlp/gate": ("mlp.gate_proj", 0, 1),
  "mlp/up": ("mlp.up_proj", 0, 1),
  "mlp/down": ("mlp.down_proj", 0, 1),
}
WEIGHTS = (
  Weight("embed/embedding", "embed_tokens.weight"),
  *(
    Weight(f"layers/{path}/{ours}", f"layers.{{}}.{name}.{theirs}", transpose)
    for path, (name, _, _) in PROJECTIONS.items()
    for ours, theirs, transpose in (("kernel", "weight", True), ("bias", "bias", False))
  ),
  Weight("layers/attention_norm/scale", "layers.{}.input_layernorm.weight"),
  Weight("layers/mlp_norm/scale", "layers.{}.post_attention_layernorm.weight"),
  Weight("norm/scale", "norm.weight"),
  Weight("head", "lm_head.weight"),
)

# Fields of `RopeScaling`, by its kind, and what they are called there.
_LINEAR = {"factor": "factor"}
_SCALINGS = {
  "linear": _LINEAR,
  "llama3": _LINEAR
  | {
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_length": "original_max_position_embeddings",
  },
}

_log = logging.getLogger(__name__)


def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
  """What config.json says, as a ModelConfig; token ids are left to `hf`.

  Raises:
    UserError: for rotary embeddings or an activation that we do not compute.
  """
  theta, scaling = _rope_from_hf(raw)
  return ModelConfig(
    family=raw["model_type"],
    vocab_size=raw["vocab_size"],
    hidden_size=raw["hidden_size"],
    num_layers=raw["num_hidden_layers"],
    num_heads=raw["num_attention_heads"],
    num_kv_heads=raw.get("num_key_value_heads") or raw["num_attention_heads"],
    head_dim=raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"],
    mlp_size=raw["intermediate_size"],
    max_length=_max_length(raw),
    norm_eps=raw.get("rms_norm_eps", 1e-6),
    rope_theta=theta,
    rope_scaling=scaling,
    activation=activations.from_hf(raw.get("hidden_act", "silu")),
    qkv_bias=raw.get("attention_bias", False),
    out_bias=raw.get("attention_bias", False),
    mlp_bias=raw.get("mlp_bias", False),
    tie_embeddings=raw.get("tie_word_embeddings", False),
    init_std=raw.get("initializer_range", 0.02),
  )


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
  """The way back; a UserError where the family's layout cannot say it."""
  require(
    config, norm="rmsnorm", position="rope", gated_mlp=True, out_bias=config.qkv_bias
  )
  if config.family == "mistral":
    require(config, qkv_bias=False, mlp_bias=False)
    own = {"sliding_window": None}
  else:
    # transformers refuses a LLaMA for which this does not hold, even with a head_dim.
    heads = config.num_heads
    require(config, hidden_size=config.hidden_size // heads * heads)
    own = {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}
  return {
    **own,
    **_rope_to_hf(config),
    "vocab_size": config.vocab_size,
    "hidden_size": config.hidden_size,
    "num_hidden_layers": config.num_layers,
    "num_attention_heads": config.num_heads,
    "num_key_value_heads": config.num_kv_heads,
    "head_dim": config.head_dim,
    "intermediate_size": config.mlp_size,
    "max_position_embeddings": config.max_length,
    "rms_norm_eps": config.norm_eps,
    "hidden_act": activations.to_hf(config.activation),
    "tie_word_embeddings": config.tie_embeddings,
    "initializer_range": config.init_std,
  }


def _max_length(raw: Mapping[str, Any]) -> int:
  length = raw.get("max_position_embeddings", 2048)
  # MistralConfig's default is 4096; LLaMA knows no window.
  window = raw.get("sliding_window", 4096) if raw["model_type"] == "mistral" else None
  if window is None or window >= length:
    return length
  # Up to the window's length every token sees all earlier ones, so full attention
  # is exact there; beyond it, it would be another model.
  _log.info("the model's sliding window limits max_length to %d", window)
  return window


def _rope_from_hf(raw: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
  """(theta, scaling) from transformers 5's rope_parameters or the older two keys."""
  rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
  theta = rope.get("rope_theta") or raw.get("rope_theta") or 10000.0
  kind = rope.get("rope_type") or rope.get("type") or "default"
  factor = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor")) or 1
  if factor != 1:
    raise UserError(f"partial_rotary_factor={factor} is not supported, only 1")
  if kind in _SCALINGS:
    fields = {ours: rope[theirs] for ours, theirs in _SCALINGS[kind].items()}
    return theta, RopeScaling(kind, **fields)
  if kind != "default":
    raise UserError(
      f"rope scaling {kind!r} is not supported, only default, linear and llama3"
    )
  return theta, None


def _rope_to_hf(config: ModelConfig) -> dict[str, Any]:
  """Both spellings: transformers 5 writes rope_parameters, older tools read these."""
  scaling = config.rope_scaling
  rope = {"rope_type": scaling.kind if scaling else "default"}
  if scaling:
    fields = _SCALINGS[scaling.kind]
    rope |= {theirs: getattr(scaling, ours) for ours, theirs in fields.items()}
  return {
    "rope_parameters": {**rope, "rope_theta": config.rope_theta},
    "rope_theta": config.rope_theta,
    "rope_scaling": rope if scaling else None,
  }
