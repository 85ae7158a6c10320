"""OPT: its norms, its projections and its table of positions.

Open Pre-trained Transformer Language Models, Zhang et al. 2022, arXiv 2205.01068. Two
rows of the table of positions come before that of the first token. The model of 350M
parameters has its norms on the sums, none at the end, and vectors of tokens narrower
than its layers.
"""

from typing import Any

from okd_jax.models.config import ModelConfig
from okd_jax.models.formats.families.family import Family, Fields, Key, Raw
from okd_jax.models.formats.weights import QKV, Weight, linear, norm, require


def _read(raw: Raw) -> Fields:
  before = raw.get("do_layer_norm_before", True)
  return {
    "norm_place": "before" if before else "on_sum",
    "final_norm": before and not raw.get("_remove_final_layer_norm", False),
  }


def _write(config: ModelConfig) -> dict[str, Any]:
  require(config, hidden_size=config.num_heads * config.head_dim)
  before = config.norm_place == "before"
  return {
    "do_layer_norm_before": before,
    "_remove_final_layer_norm": before and not config.final_norm,
  }


OPT = Family(
  architecture="OPTForCausalLM",
  prefix="model.decoder.",
  weights=(
    Weight("embed/embedding", "embed_tokens.weight"),
    Weight("position_embed/embedding", "embed_positions.weight", skip=2),
    Weight("widen/kernel", "project_in.weight", True),
    Weight("narrow/kernel", "project_out.weight", True),
    *(
      row
      for path, name in zip(QKV, ("q_proj", "k_proj", "v_proj"), strict=True)
      for row in linear(f"layers.{{}}.self_attn.{name}", path)
    ),
    *linear("layers.{}.self_attn.out_proj", "attention/out"),
    *linear("layers.{}.fc1", "mlp/up"),
    *linear("layers.{}.fc2", "mlp/down"),
    *norm("layers/attention_norm", "layers.{}.self_attn_layer_norm"),
    *norm("layers/mlp_norm", "layers.{}.final_layer_norm"),
    *norm("norm", "final_layer_norm"),
    Weight("head", "lm_head.weight"),
  ),
  keys=(
    Key("vocab_size", "vocab_size"),
    Key("hidden_size", "hidden_size"),
    Key("num_layers", "num_hidden_layers"),
    Key("num_heads", "num_attention_heads"),
    Key("mlp_size", "ffn_dim"),
    Key("embed_size", "word_embed_proj_dim", 0),
    Key("max_length", "max_position_embeddings", 2048),
    Key("activation", "activation_function", "relu"),
    Key("tie_embeddings", "tie_word_embeddings", True),
    Key("init_std", "init_std", 0.02),
  ),
  fixed={
    "norm": "layernorm",
    "norm_eps": 1e-5,
    "position": "learned",
    "activation": "relu",
    "gated_mlp": False,
    "qkv_bias": True,
    "out_bias": True,
    "mlp_bias": True,
  },
  read=_read,
  write=_write,
  only={"enable_bias": True, "layer_norm_elementwise_affine": True},
)
