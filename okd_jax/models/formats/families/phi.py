"""Phi-3, Phi-3.5, Phi-4 and Phi-4-mini.

Phi-3 Technical Report, Abdin et al. 2024, arXiv 2404.14219. Query, key and value are
one tensor, and so are the MLP's gate and its other half; Phi-4-mini turns three
quarters of a head's channels.
"""

from typing import Any

from okd_jax.errors import UserError
from okd_jax.models.config import LayerKind, ModelConfig
from okd_jax.models.formats.families import rope
from okd_jax.models.formats.families.family import (
  NORMS,
  OUTER,
  Family,
  Fields,
  Raw,
  keys,
  whole_heads,
  window_of,
)
from okd_jax.models.formats.weights import QKV, linear

_LENGTH = 4096  # the original one where none is named
_FORMER = ("su", "yarn")  # what longrope was called


def _read(raw: Raw) -> Fields:
  kinds = (LayerKind(raw.get("sliding_window") or 0),) * raw["num_hidden_layers"]
  raw = {"original_max_position_embeddings": _LENGTH, **raw}
  spelled = rope.parameters(raw)
  kind = spelled.get("rope_type") or spelled.get("type")
  if kind in _FORMER:
    spelled |= {"rope_type": "longrope"}
  raw = {**raw, "rope_scaling": None, "rope_parameters": spelled}
  return rope.read(raw, partial=True) | {"layer_kinds": kinds}


def _write(config: ModelConfig) -> dict[str, Any]:
  scaling = config.rope_scaling
  if scaling and scaling.kind != "longrope":
    raise UserError(
      f"the phi3 layout cannot hold this model: its rope scaling is {scaling.kind!r} "
      "where it needs 'longrope' or none"
    )
  original = scaling.original_max_length if scaling else config.max_length
  return (
    rope.write(config)
    | whole_heads(config)
    | {
      "original_max_position_embeddings": original,
      "partial_rotary_factor": config.rotary_share,
      "sliding_window": window_of(config),
    }
  )


PHI3 = Family(
  architecture="Phi3ForCausalLM",
  weights=(
    *OUTER,
    *NORMS,
    *linear("layers.{}.self_attn.qkv_proj", *QKV),
    *linear("layers.{}.self_attn.o_proj", "attention/out"),
    *linear("layers.{}.mlp.gate_up_proj", "mlp/gate", "mlp/up"),
    *linear("layers.{}.mlp.down_proj", "mlp/down"),
  ),
  keys=keys(without=["head_dim"]),
  read=_read,
  write=_write,
  defaults={"max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
)
