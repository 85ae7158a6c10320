"""What the keys of config.json may hold, before any family reads them."""

from collections.abc import Iterator, Mapping
from typing import Any

from okd_jax.models.bounds import (
  LIST,
  NUMBER,
  OBJECT,
  SWITCH,
  TEXT,
  WHOLE,
  Bound,
  number,
  problems,
  whole,
)
from okd_jax.models.config import BOUNDS, MOST_LAYERS, MOST_LENGTH

_LENGTH, _SCALE, _BASE = whole(0, MOST_LENGTH), number(0, 1e9), number(1e-3, 1e15)
_FACTORS = Bound(LIST, 1e-9, 1e9, NUMBER)
# Keys beside those that say a field of `ModelConfig` by themselves.
_KEYS = {
  "_remove_final_layer_norm": Bound(SWITCH),
  "attention_bias": Bound(SWITCH),
  "attn_logit_softcapping": _SCALE,
  "decoder_sparse_step": whole(0, MOST_LAYERS),
  "do_layer_norm_before": Bound(SWITCH),
  "final_logit_softcapping": _SCALE,
  "layer_types": Bound(LIST, 0, MOST_LAYERS, TEXT),
  "max_window_layers": whole(0, 2**31),
  "mlp_only_layers": Bound(LIST, 0, MOST_LAYERS, WHOLE),
  "model_type": Bound(TEXT),
  "n_inner": BOUNDS["mlp_size"],
  "no_rope_layer_interval": whole(1, MOST_LAYERS),
  "no_rope_layers": Bound(LIST, 0, MOST_LAYERS, WHOLE),
  "num_experts": BOUNDS["experts"],
  "num_local_experts": BOUNDS["experts"],
  "original_max_position_embeddings": whole(1, MOST_LENGTH),
  "partial_rotary_factor": number(1e-3, 1.0),
  "query_pre_attn_scalar": number(1e-3, 1e9),
  "rope_local_base_freq": _BASE,
  "rope_parameters": Bound(OBJECT),
  "rope_scaling": Bound(OBJECT),
  "rope_theta": _BASE,
  "sliding_window": _LENGTH,
  "sliding_window_pattern": whole(1, MOST_LAYERS),
  "use_bidirectional_attention": Bound(SWITCH),
  "use_sliding_window": Bound(SWITCH),
}
_ROPE = {
  "attention_factor": number(1e-6, 1e6),
  "beta_fast": number(1e-6, 1e6),
  "beta_slow": number(1e-6, 1e6),
  "factor": number(1e-6, 1e6),
  "high_freq_factor": number(1e-6, 1e6),
  "long_factor": _FACTORS,
  "low_freq_factor": number(1e-6, 1e6),
  "mscale": number(0, 1e6),
  "mscale_all_dim": number(0, 1e6),
  "original_max_position_embeddings": whole(1, MOST_LENGTH),
  "partial_rotary_factor": number(1e-3, 1.0),
  "rope_theta": _BASE,
  "rope_type": Bound(TEXT),
  "short_factor": _FACTORS,
  "truncate": Bound(SWITCH),
  "type": Bound(TEXT),
}


def wrong(raw: Mapping[str, Any], fields: Mapping[str, str]) -> Iterator[str]:
  """A sentence for each key that holds what no model has.

  fields: of `ModelConfig`, by the keys that say them.
  """
  named = {theirs: BOUNDS[ours] for theirs, ours in fields.items()}
  # A size of 0 is refused by `ModelConfig`, in its own words.
  yield from problems(raw, _KEYS | named)
  for key in ("rope_parameters", "rope_scaling"):
    rope = raw.get(key)
    if isinstance(rope, dict):
      inner = {k: v for k, v in rope.items() if isinstance(v, dict)}
      parts = {key: rope} | {f"{key}.{k}": v for k, v in inner.items()}
      for prefix, part in parts.items():
        yield from problems(part, _ROPE, f"{prefix}.")
