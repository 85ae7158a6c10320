"""Prefixes and prompts as PEFT's `prompt_embeddings`, both ways.

PEFT knows PREFIX_TUNING, a row [N 2 K D] of keys and values a virtual token, and
P_TUNING, a row [D] of input vectors. A prompt's MLP only helps training and is left
out, as in the paper: what comes back is a collection of its `vectors` alone, which
the decoder takes too.

PEFT lets real tokens start at position m, not 0. With rotary positions only distances
count: a prompt's are the same, and a prefix's keys, which PEFT too takes as they are,
are turned by m positions on the way out and back on the way in (float64, so to within
a float32's last bit). With learned positions PEFT's tokens would get other vectors
than ours, and a prefix of some layers only has no place in its format. Such modules
are written in the same layout, but as they are, for our eyes only; the file's header
says so, and so does a warning.
"""

import logging

import numpy as np

from okd_jax.errors import UserError
from okd_jax.models.adapters import AdapterConfig, prompt_vectors
from okd_jax.models.attention import rope_frequencies
from okd_jax.models.config import ModelConfig

_log = logging.getLogger(__name__)

TENSOR = "prompt_embeddings"
# Prompt tuning differs from P-tuning in training alone.
_KINDS = {"PREFIX_TUNING": "prefix", "P_TUNING": "prompt", "PROMPT_TUNING": "prompt"}


def is_prompt_learning(raw: dict) -> bool:
  """Whether a PEFT config is of this file's kinds."""
  return raw.get("peft_type") in _KINDS


def why_not_exact(config: AdapterConfig, model_config: ModelConfig) -> str:
  """Why PEFT would compute something else; empty if it computes the same."""
  if model_config.position != "rope":
    return "it shifts the learned positions of the text by adapter.length"
  if config.num_layers(model_config.num_layers) < model_config.num_layers:
    return "it has prefixes in all layers or none"
  return ""


def to_peft(
  adapter, config: AdapterConfig, model_config: ModelConfig
) -> tuple[dict[str, np.ndarray], dict]:
  """(tensors, PEFT's config without the base model's name) of a prefix or prompt."""
  if reason := why_not_exact(config, model_config):
    _log.warning(
      "the %s is exported for okd_jax alone: PEFT would give other logits, since %s",
      config.kind,
      reason,
    )
  raw = {
    "peft_type": "PREFIX_TUNING" if config.kind == "prefix" else "P_TUNING",
    "task_type": "CAUSAL_LM",
    "inference_mode": True,
    "num_virtual_tokens": config.length,
    "num_transformer_submodules": 1,
    "num_layers": config.num_layers(model_config.num_layers),
  }
  if config.kind == "prefix":
    width = model_config.num_kv_heads * model_config.head_dim
    raw |= {
      "num_attention_heads": model_config.num_kv_heads,
      "prefix_projection": False,
    }
    table = _prefix_to_table(adapter["layers"]["attention"], config, model_config)
  else:
    width = model_config.hidden_size
    raw |= {"num_attention_heads": model_config.num_heads, "encoder_num_layers": 2}
    raw |= {"encoder_reparameterization_type": "MLP", "encoder_dropout": 0.0}
    table = prompt_vectors(adapter["prompt"])
  raw |= {"token_dim": width, "encoder_hidden_size": width}
  return {TENSOR: np.ascontiguousarray(table, np.float32)}, raw


def from_peft(
  raw: dict,
  table: np.ndarray,
  config: AdapterConfig | None,
  model_config: ModelConfig,
) -> tuple[dict, AdapterConfig]:
  """(collection `adapter`, its config) of what `to_peft` or another wrote.

  config: ours, where the folder is; None where it is another's.

  Raises:
    UserError: the tensor does not fit the model, or is another's that we would take
      for something else.
  """
  if config is None:
    config = AdapterConfig(kind=_KINDS[raw["peft_type"]], length=len(table))
    if reason := why_not_exact(config, model_config):
      raise UserError(f"PEFT's {raw['peft_type']} is not supported here: {reason}")
  c, layers = model_config, config.num_layers(model_config.num_layers)
  prefix = config.kind == "prefix"
  width = layers * 2 * c.num_kv_heads * c.head_dim if prefix else c.hidden_size
  if table.shape != (config.length, width):
    raise UserError(
      f"{TENSOR} is {list(table.shape)}, the model needs {[config.length, width]}"
    )
  if prefix:
    pair = _table_to_prefix(table, config, model_config)
    return {"layers": {"attention": pair}}, config
  return {"prompt": {"vectors": table}}, config


def _prefix_to_table(pair, config, model_config) -> np.ndarray:
  key_NMKD, value_NMKD = (np.asarray(pair[f"prefix_{n}"]) for n in ("key", "value"))
  if not why_not_exact(config, model_config):
    key_NMKD = _turn(key_NMKD, config.length, model_config)
  table_N2MKD = np.stack([key_NMKD, value_NMKD], axis=1)
  return table_N2MKD.transpose(2, 0, 1, 3, 4).reshape(config.length, -1)


def _table_to_prefix(table, config, model_config) -> dict[str, np.ndarray]:
  heads = (model_config.num_kv_heads, model_config.head_dim)
  table_MN2KD = table.reshape(config.length, -1, 2, *heads)
  key_NMKD, value_NMKD = table_MN2KD.transpose(2, 1, 0, 3, 4)
  if not why_not_exact(config, model_config):
    key_NMKD = _turn(key_NMKD, -config.length, model_config)
  return {"prefix_key": key_NMKD, "prefix_value": value_NMKD}


def _turn(x_NMKD, positions: int, model_config) -> np.ndarray:
  """`attention.rotate` by the same number of positions everywhere, in float64."""
  angles = positions * np.asarray(rope_frequencies(model_config), np.float64)
  first, second = np.split(x_NMKD.astype(np.float64), 2, axis=-1)
  cos, sin = np.cos(angles), np.sin(angles)
  turned = (first * cos - second * sin, second * cos + first * sin)
  return np.concatenate(turned, axis=-1).astype(np.float32)
