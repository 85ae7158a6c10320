"""GPT-2: its Hugging Face configuration and weight table.

Language Models are Unsupervised Multitask Learners, Radford et al. 2019. Its
kernels are `Conv1D`, [in, out] like ours, and query, key and value are one tensor.
"""

from collections.abc import Mapping
from typing import Any

from okd_jax.errors import UserError
from okd_jax.models.config import ModelConfig
from okd_jax.models.formats import activations
from okd_jax.models.formats.weights import Weight, require

ARCHITECTURES = {"gpt2": "GPT2LMHeadModel"}
PREFIX = "transformer."  # absent in checkpoints of the headless base model
LAYERS = "h"  # the list of layers, as PEFT names it
FAN_IN_FAN_OUT = True  # Conv1D keeps [in, out]; PEFT asks
IGNORED = r"\.attn\.(bias|masked_bias)$"  # causal masks that old versions stored

PROJECTIONS = {
  "attention/query": ("attn.c_attn", 0, 3),
  "attention/key": ("attn.c_attn", 1, 3),
  "attention/value": ("attn.c_attn", 2, 3),
  "attention/out": ("attn.c_proj", 0, 1),
  "mlp/up": ("mlp.c_fc", 0, 1),
  "mlp/down": ("mlp.c_proj", 0, 1),
}
WEIGHTS = (
  Weight("embed/embedding", "wte.weight"),
  Weight("position_embed/embedding", "wpe.weight"),
  *(
    Weight(f"layers/{path}/{ours}", f"h.{{}}.{name}.{theirs}", False, part, parts)
    for path, (name, part, parts) in PROJECTIONS.items()
    for ours, theirs in (("kernel", "weight"), ("bias", "bias"))
  ),
  *(
    Weight(f"{path}/{ours}", f"{name}.{theirs}")
    for path, name in (
      ("layers/attention_norm", "h.{}.ln_1"),
      ("layers/mlp_norm", "h.{}.ln_2"),
      ("norm", "ln_f"),
    )
    for ours, theirs in (("scale", "weight"), ("bias", "bias"))
  ),
  Weight("head", "lm_head.weight"),
)

# Options that change the computation, with the only value that we compute.
_FIXED = {
  "scale_attn_weights": True,
  "scale_attn_by_inverse_layer_idx": False,
  "add_cross_attention": False,
}


def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
  """What config.json says, as a ModelConfig; token ids are left to `hf`."""
  for name, value in _FIXED.items():
    if raw.get(name, value) != value:
      raise UserError(f"{name}={raw[name]} is not supported, only {value}")
  return ModelConfig(
    family="gpt2",
    vocab_size=raw["vocab_size"],
    hidden_size=raw["n_embd"],
    num_layers=raw["n_layer"],
    num_heads=raw["n_head"],
    mlp_size=raw.get("n_inner") or 4 * raw["n_embd"],
    max_length=raw["n_positions"],
    norm="layernorm",
    norm_eps=raw.get("layer_norm_epsilon", 1e-5),
    position="learned",
    activation=activations.from_hf(raw.get("activation_function", "gelu_new")),
    gated_mlp=False,
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    tie_embeddings=raw.get("tie_word_embeddings", True),
    init_std=raw.get("initializer_range", 0.02),
  )


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
  """The way back; a UserError where GPT-2's layout cannot say it."""
  require(
    config,
    norm="layernorm",
    position="learned",
    gated_mlp=False,
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    num_kv_heads=config.num_heads,
    hidden_size=config.num_heads * config.head_dim,
  )
  return {
    **_FIXED,
    "vocab_size": config.vocab_size,
    "n_embd": config.hidden_size,
    "n_layer": config.num_layers,
    "n_head": config.num_heads,
    "n_inner": config.mlp_size,
    "n_positions": config.max_length,
    "layer_norm_epsilon": config.norm_eps,
    "activation_function": activations.to_hf(config.activation),
    "tie_word_embeddings": config.tie_embeddings,
    "initializer_range": config.init_std,
  }
