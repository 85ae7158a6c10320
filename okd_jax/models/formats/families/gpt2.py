"""GPT-2: Language Models are Unsupervised Multitask Learners, Radford et al. 2019.

Its kernels are `Conv1D`, [in, out] like ours, and query, key and value are one tensor.
"""

from typing import Any

from okd_jax.models.config import ModelConfig
from okd_jax.models.formats.families.family import Family, Fields, Key, Raw
from okd_jax.models.formats.weights import QKV, Weight, linear, norm, require


def _read(raw: Raw) -> Fields:
  return {"mlp_size": raw.get("n_inner") or 4 * raw["n_embd"]}


def _write(config: ModelConfig) -> dict[str, Any]:
  require(config, hidden_size=config.num_heads * config.head_dim)
  return {"n_inner": config.mlp_size}


GPT2 = Family(
  architecture="GPT2LMHeadModel",
  prefix="transformer.",
  layers="h",
  fan_in_fan_out=True,
  ignored=r"\.attn\.(bias|masked_bias)$",  # causal masks that old versions stored
  weights=(
    Weight("embed/embedding", "wte.weight"),
    Weight("position_embed/embedding", "wpe.weight"),
    *linear("h.{}.attn.c_attn", *QKV, transpose=False),
    *linear("h.{}.attn.c_proj", "attention/out", transpose=False),
    *linear("h.{}.mlp.c_fc", "mlp/up", transpose=False),
    *linear("h.{}.mlp.c_proj", "mlp/down", transpose=False),
    *norm("layers/attention_norm", "h.{}.ln_1"),
    *norm("layers/mlp_norm", "h.{}.ln_2"),
    *norm("norm", "ln_f"),
    Weight("head", "lm_head.weight"),
  ),
  keys=(
    Key("vocab_size", "vocab_size"),
    Key("hidden_size", "n_embd"),
    Key("num_layers", "n_layer"),
    Key("num_heads", "n_head"),
    Key("max_length", "n_positions"),
    Key("norm_eps", "layer_norm_epsilon", 1e-5),
    Key("activation", "activation_function", "gelu_new"),
    Key("tie_embeddings", "tie_word_embeddings", True),
    Key("init_std", "initializer_range", 0.02),
  ),
  fixed={
    "norm": "layernorm",
    "position": "learned",
    "activation": "gelu_tanh",
    "gated_mlp": False,
    "qkv_bias": True,
    "out_bias": True,
    "mlp_bias": True,
  },
  read=_read,
  write=_write,
  only={
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
  },
)
