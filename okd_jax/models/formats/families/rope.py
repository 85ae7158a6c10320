"""Rotary positions in config.json, both ways."""

import math
from typing import Any

from okd_jax.errors import UserError
from okd_jax.models.config import ModelConfig, RopeScaling
from okd_jax.models.formats.families.family import Fields, Raw

FULL, LOCAL = "full_attention", "sliding_attention"  # layers, as they are called there
# Fields of `RopeScaling` that only some kinds have, and what they are called there.
_NAMES = {
  "linear": {},
  "dynamic": {},
  "llama3": {
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
  },
  "yarn": {
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "truncate": "truncate",
    "attention_factor": "attention_factor",
  },
  "longrope": {
    "short_factors": "short_factor",
    "long_factors": "long_factor",
    "attention_factor": "attention_factor",
  },
}
_BOUNDED = ("llama3", "yarn", "longrope")  # these know an original length
_ORIGINAL = "original_max_position_embeddings"


def parameters(raw: Raw, layers: str = "") -> dict[str, Any]:
  """The rotary parameters, wherever a version of transformers has put them.

  layers: 'full_attention' or 'sliding_attention', where these have their own.
  """
  # In this order: what a config of old sets, transformers puts first.
  rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
  nested = any(isinstance(value, dict) for value in rope.values())
  rope = dict((rope.get(layers) or {}) if nested else rope)
  if rope.get("rope_theta") is None:
    rope["rope_theta"] = raw.get("rope_theta")
  return rope


def read(
  raw: Raw, theta: float = 10000.0, layers: str = "", partial: bool = False
) -> Fields:
  """The fields of base and scaling, and 'rotary_share' where it may be `partial`.

  theta: the base of a configuration that names none.
  """
  rope = parameters(raw, layers)
  found = {
    "rope_theta": rope["rope_theta"] or theta,
    "rope_scaling": scaling(rope, raw),
  }
  share = rope.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 1.0
  if partial:
    return found | {"rotary_share": share}
  if share != 1:
    raise UserError(f"partial_rotary_factor={share} is not supported, only 1")
  return found


def scaling(rope: dict[str, Any], raw: Raw) -> RopeScaling | None:
  """What the rotary parameters of a configuration say beside the base."""
  kind = rope.get("rope_type") or rope.get("type")
  if kind is None or kind == "default":
    return None
  if kind not in _NAMES:
    raise UserError(
      f"rope scaling {kind!r} is not supported, only default, {', '.join(_NAMES)}"
    )
  fields = {
    ours: _listed(rope[theirs])
    for ours, theirs in _NAMES[kind].items()
    if rope.get(theirs) is not None
  }
  longest = raw.get("max_position_embeddings", 2048)
  original = raw.get(_ORIGINAL) or rope.get(_ORIGINAL) or longest
  factor = rope.get("factor") or (longest / original if kind in _BOUNDED else None)
  if factor is None:
    raise KeyError("factor")
  fields["factor"] = factor
  if kind in _BOUNDED:
    fields["original_max_length"] = original
  fields.setdefault("attention_factor", _attention_factor(kind, rope, fields))
  return RopeScaling(kind, **fields)


def _attention_factor(kind: str, rope: dict[str, Any], fields: Fields) -> float:
  """Of cosine and sine, as the papers of YaRN and LongRoPE have it."""
  factor = fields["factor"]
  if factor <= 1:
    return 1.0

  def grown(scale: float) -> float:
    return 0.1 * scale * math.log(factor) + 1.0

  match kind:
    case "longrope":
      return math.sqrt(1 + math.log(factor) / math.log(fields["original_max_length"]))
    case "yarn":
      scale, all_scale = rope.get("mscale"), rope.get("mscale_all_dim")
      return grown(scale) / grown(all_scale) if scale and all_scale else grown(1.0)
  return 1.0


def write(config: ModelConfig) -> dict[str, Any]:
  """Both spellings: transformers 5 writes rope_parameters, older tools read these."""
  rope = spelled(config.rope_scaling)
  whole = {**rope, "rope_theta": config.rope_theta}
  if config.rotary_share != 1:
    whole["partial_rotary_factor"] = config.rotary_share
  return {
    "rope_parameters": whole,
    "rope_theta": config.rope_theta,
    "rope_scaling": whole if config.rope_scaling else None,
  }


def local_theta(raw: Raw, usual: float) -> float:
  """The base of layers with a window, where these have one of their own.

  A scaling that is not said layer by layer is for those without a window.
  """
  own = (raw.get("rope_parameters") or {}).get(LOCAL) or {}
  if scaling(own, raw):
    raise UserError("rope scaling in layers with a window is not supported")
  return own.get("rope_theta") or usual


def write_local(config: ModelConfig, usual: float) -> dict[str, Any]:
  """`write` for layers with a window and without, each with its parameters."""
  windowed = (kind for kind in config.kinds if kind.window)
  bases = (kind.rope_theta or config.rope_theta for kind in windowed)
  local = {"rope_type": "default", "rope_theta": next(bases, usual)}
  whole = write(config)["rope_parameters"]
  return {"rope_parameters": {FULL: whole, LOCAL: local}}


def spelled(scaling: RopeScaling | None) -> dict[str, Any]:
  """A scaling in transformers' words, without the base."""
  if scaling is None:
    return {"rope_type": "default"}
  names = {"factor": "factor"} | _NAMES[scaling.kind]
  if scaling.kind in _BOUNDED:
    names["original_max_length"] = _ORIGINAL
  fields = {theirs: _plain(getattr(scaling, ours)) for ours, theirs in names.items()}
  return {"rope_type": scaling.kind, **fields}


def _listed(value: Any) -> Any:
  return tuple(value) if isinstance(value, list) else value


def _plain(value: Any) -> Any:
  return list(value) if isinstance(value, tuple) else value
