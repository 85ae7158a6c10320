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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from jaxtyping import Array, Float

from okd_jax.errors import UserError
from okd_jax.models.adapters import Adapter, Prefix, Prompt, prompt_vectors
from okd_jax.models.adapters.base import Tree
from okd_jax.models.config import ModelConfig
from okd_jax.models.rope import rope_frequencies

_log = logging.getLogger(__name__)

_TENSOR = "prompt_embeddings"


def prefix_to_peft(tree: Tree, adapter: Prefix, model_config: ModelConfig) -> tuple:
  """A prefix in PEFT's terms; see `peft` for what comes back."""
  table = _prefix_to_table(tree["layers"]["attention"], adapter, model_config)
  own = {
    "peft_type": "PREFIX_TUNING",
    "num_attention_heads": model_config.num_kv_heads,
    "prefix_projection": False,
  }
  width = model_config.num_kv_heads * model_config.head_dim
  return _written(table, own, width, adapter, model_config)


def prompt_to_peft(tree: Tree, adapter: Prompt, model_config: ModelConfig) -> tuple:
  """A prompt in PEFT's terms, without its MLP; see `peft` for what comes back."""
  own = {
    "peft_type": "P_TUNING",
    "num_attention_heads": model_config.num_heads,
    "encoder_num_layers": 2,
    "encoder_reparameterization_type": "MLP",
    "encoder_dropout": 0.0,
  }
  table, width = prompt_vectors(tree["prompt"]), model_config.hidden_size
  return _written(table, own, width, adapter, model_config)


def read_prefix(
  raw: dict,
  file: safetensors.safe_open,
  ours: Prefix | None,
  model_config: ModelConfig,
  path: Path,
) -> tuple[Tree, Prefix]:
  """(collection `adapter`, what it is) of what `prefix_to_peft` or another wrote.

  Args:
    raw: PEFT's config.
    file: the open tensors.
    ours: what they are, where the folder is ours; None where it is another's.
    model_config: the teacher's.
    path: the file's name.

  Raises:
    UserError: the tensor does not fit the model, or is another's that we would take
      for something else.
  """
  table = _table(file, path)
  adapter = ours or Prefix(length=len(table))
  _check_stranger(ours, adapter, raw, model_config, path)
  c, total = model_config, model_config.num_layers
  layers = total - adapter.trunk_layers(total)
  _check_shape(table, adapter.length, layers * 2 * c.num_kv_heads * c.head_dim, path)
  pair = _table_to_prefix(table, adapter, model_config)
  return {"layers": {"attention": pair}}, adapter


def read_prompt(
  raw: dict,
  file: safetensors.safe_open,
  ours: Prompt | None,
  model_config: ModelConfig,
  path: Path,
) -> tuple[Tree, Prompt]:
  """As `read_prefix`, of a prompt; the collection holds its `vectors` alone."""
  table = _table(file, path)
  adapter = ours or Prompt(length=len(table))
  _check_stranger(ours, adapter, raw, model_config, path)
  _check_shape(table, adapter.length, model_config.hidden_size, path)
  return {"prompt": {"vectors": table}}, adapter


def _differs(adapter: Adapter, model_config: ModelConfig) -> str:
  """Why PEFT would compute something else; empty if it computes the same."""
  if model_config.position != "rope":
    return "it shifts the positions of the text by adapter.length"
  if model_config.layer_kinds:
    return "its virtual tokens fall out of windows, and layers turn keys by their kind"
  if adapter.trunk_layers(model_config.num_layers):
    return "it has prefixes in all layers or none"
  return ""


def _written(
  table: Float[Array | np.ndarray, "m W"],
  own: dict[str, Any],
  width: int,
  adapter: Prefix | Prompt,
  model_config: ModelConfig,
) -> tuple[dict[str, np.ndarray], dict[str, Any], str]:
  """(tensors, PEFT's config, why it differs), with what both kinds have in common."""
  if reason := _differs(adapter, model_config):
    _log.warning(
      "the %s is exported for okd_jax alone: PEFT would give other logits, since %s",
      adapter.kind,
      reason,
    )
  total = model_config.num_layers
  raw = own | {
    "task_type": "CAUSAL_LM",
    "inference_mode": True,
    "num_virtual_tokens": adapter.length,
    "num_transformer_submodules": 1,
    "num_layers": total - adapter.trunk_layers(total),
    "token_dim": width,
    "encoder_hidden_size": width,
  }
  return {_TENSOR: np.ascontiguousarray(table, np.float32)}, raw, reason


def _table(file: safetensors.safe_open, path: Path) -> Float[np.ndarray, "m W"]:
  """The only tensor of a file."""
  names = list(file.keys())
  if names != [_TENSOR]:
    raise UserError(f"{path} holds {', '.join(names)}, not {_TENSOR} alone")
  if len(shape := file.get_slice(_TENSOR).get_shape()) != 2:
    raise UserError(f"{path}: {_TENSOR} is {list(shape)}, no matrix")
  return file.get_tensor(_TENSOR).astype(np.float32)


def _check_stranger(
  ours: Adapter | None,
  adapter: Adapter,
  raw: dict,
  model_config: ModelConfig,
  path: Path,
) -> None:
  """Raises a UserError where another's module means something else to us."""
  if ours is None and (reason := _differs(adapter, model_config)):
    raise UserError(
      f"{path} does not fit the model: PEFT's {raw['peft_type']} is not supported "
      f"here: {reason}"
    )


def _check_shape(table: np.ndarray, length: int, width: int, path: Path) -> None:
  if table.shape != (length, width):
    raise UserError(
      f"{path} does not fit the model: {_TENSOR} is {list(table.shape)}, the model "
      f"needs {[length, width]}"
    )


def _prefix_to_table(
  pair: Mapping[str, Any], adapter: Prefix, model_config: ModelConfig
) -> Float[np.ndarray, "m W"]:
  key_NMKD, value_NMKD = (np.asarray(pair[f"prefix_{n}"]) for n in ("key", "value"))
  if not _differs(adapter, model_config):
    key_NMKD = _turn(key_NMKD, adapter.length, model_config)
  table_N2MKD = np.stack([key_NMKD, value_NMKD], axis=1)
  return table_N2MKD.transpose(2, 0, 1, 3, 4).reshape(adapter.length, -1)


def _table_to_prefix(
  table: Float[np.ndarray, "m W"], adapter: Prefix, model_config: ModelConfig
) -> dict[str, Float[np.ndarray, "N m K D"]]:
  heads = (model_config.num_kv_heads, model_config.head_dim)
  table_MN2KD = table.reshape(adapter.length, -1, 2, *heads)
  key_NMKD, value_NMKD = table_MN2KD.transpose(2, 1, 0, 3, 4)
  if not _differs(adapter, model_config):
    key_NMKD = _turn(key_NMKD, -adapter.length, model_config)
  return {"prefix_key": key_NMKD, "prefix_value": value_NMKD}


def _turn(
  x_NMKD: Float[np.ndarray, "N m K D"], positions: int, model_config: ModelConfig
) -> Float[np.ndarray, "N m K D"]:
  """`attention.rotate` by the same number of positions everywhere, in float64."""
  angles = positions * np.asarray(rope_frequencies(model_config), np.float64)
  x, rest = np.split(x_NMKD.astype(np.float64), [2 * angles.size], axis=-1)
  first, second = np.split(x, 2, axis=-1)
  cos, sin = np.cos(angles), np.sin(angles)
  turned = (first * cos - second * sin, second * cos + first * sin, rest)
  return np.concatenate(turned, axis=-1).astype(np.float32)
