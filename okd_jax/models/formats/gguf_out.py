"""GGUF files, out: what llama.cpp runs, in half precision or in eight bits.

A file is named after how its matrices are kept: NAME.gguf or NAME.f16.gguf,
NAME.q8_0.gguf, NAME.f32.gguf. Vectors are float32; rows that blocks of 32 do not fit
stay float16.
"""

import dataclasses
import importlib.util
import os
from pathlib import Path
from typing import Any

import numpy as np
import transformers

from okd_jax.errors import UserError
from okd_jax.models.config import ModelConfig, RopeScaling
from okd_jax.models.formats import gguf_tokenizer
from okd_jax.models.formats.assembly import disassemble
from okd_jax.models.formats.gguf import WEIGHTS
from okd_jax.models.formats.weights import Params
from okd_jax.models.rope import rope_frequencies
from okd_jax.runtime.workdir import writes

KINDS = {"f32": "F32", "f16": "F16", "q8_0": "Q8_0"}
# Families whose network llama.cpp has under these names.
ARCHITECTURES = {
  "gpt2": "gpt2",
  "llama": "llama",
  "mistral": "llama",
  "qwen2": "qwen2",
  "qwen3": "qwen3",
}
_BLOCK = 32  # values that share a scale in Q8_0


def save(
  path: Path,
  params: Params,
  config: ModelConfig,
  tokenizer: "transformers.PreTrainedTokenizerBase | None",
) -> None:
  """Writes the file, whole or not at all; every process calls it, process 0 writes.

  Raises:
    UserError: where the `gguf` package is missing, or llama.cpp has no such network or
      no such tokenizer.
  """
  if importlib.util.find_spec("gguf") is None:
    raise UserError(
      f"{path}: writing GGUF needs the gguf package: pip install okd-jax[gguf]"
    )
  _check(path, config)
  kind, fields, tensors = _kind(path), _fields(config), _tensors(config, params)
  if not writes():
    return
  if tokenizer is not None:
    fields |= gguf_tokenizer.describe(tokenizer, config.vocab_size, str(path))
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(f".{path.name}.partial")
  _write(partial, ARCHITECTURES[config.family], fields, tensors, kind)
  os.replace(partial, path)


def _kind(path: Path) -> str:
  named = path.with_suffix("").suffix.removeprefix(".").lower()
  return KINDS.get(named, "F16")


def _check(path: Path, config: ModelConfig) -> None:
  """Raises a UserError for a network that llama.cpp does not have."""
  if config.family not in ARCHITECTURES:
    raise UserError(
      f"{path}: a {config.family} cannot be written as GGUF, only "
      f"{', '.join(ARCHITECTURES)}; export a folder and use llama.cpp's converter"
    )
  usual = "gelu_tanh" if config.family == "gpt2" else "silu"
  if config.layer_kinds or config.activation != usual:
    raise UserError(
      f"{path}: llama.cpp's {config.family} has {usual} and neither windows nor layers "
      "without positions; this model cannot be written as GGUF"
    )
  scaling = config.rope_scaling
  if scaling and scaling.kind not in ("linear", "llama3"):
    raise UserError(
      f"{path}: rope scaling {scaling.kind!r} cannot be written as GGUF, only linear "
      "and llama3"
    )


def _fields(config: ModelConfig) -> dict[str, Any]:
  """The file's metadata, but for the tokenizer's."""
  arch, scaling = ARCHITECTURES[config.family], config.rope_scaling
  own: dict[str, Any] = {
    "block_count": config.num_layers,
    "context_length": config.max_length,
    "embedding_length": config.hidden_size,
    "feed_forward_length": config.mlp_size,
    "attention.head_count": config.num_heads,
  }
  if config.position == "learned":
    own["attention.layer_norm_epsilon"] = float(config.norm_eps)
  else:
    own |= {
      "attention.head_count_kv": config.num_kv_heads,
      "attention.key_length": config.head_dim,
      "attention.value_length": config.head_dim,
      "attention.layer_norm_rms_epsilon": float(config.norm_eps),
      "rope.dimension_count": config.head_dim,
      "rope.freq_base": float(config.rope_theta),
      "vocab_size": config.vocab_size,
    }
  match scaling:
    case RopeScaling(kind="linear", factor=factor):
      own |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(factor)}
  return {f"{arch}.{key}": value for key, value in own.items()}


def _tensors(config: ModelConfig, params: Params) -> dict[str, np.ndarray]:
  arch = ARCHITECTURES[config.family]
  tensors = dict(disassemble(config, WEIGHTS[arch], params, dtype=np.float32))
  if arch == "llama":
    heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}
    tensors = {
      name: _permuted(tensor, heads.get(name.split(".")[-2], 0))
      for name, tensor in tensors.items()
    }
  match config.rope_scaling:
    case RopeScaling(kind="llama3"):
      plain = rope_frequencies(dataclasses.replace(config, rope_scaling=None))
      factors = np.asarray(plain / rope_frequencies(config), np.float32)
      tensors["rope_freqs.weight"] = factors
  return tensors


def _permuted(tensor: np.ndarray, heads: int) -> np.ndarray:
  """`gguf._unpermute`'s way back: a head's halves interleaved; heads 0: as it is."""
  if not heads:
    return tensor
  halves = tensor.reshape(heads, 2, -1, *tensor.shape[1:])
  return halves.swapaxes(1, 2).reshape(tensor.shape)


def _write(
  path: Path,
  arch: str,
  fields: dict[str, Any],
  tensors: dict[str, np.ndarray],
  kind: str,
) -> None:
  import gguf

  writer = gguf.GGUFWriter(path, arch)
  add = {
    bool: writer.add_bool,
    int: writer.add_uint32,
    float: writer.add_float32,
    str: writer.add_string,
    list: writer.add_array,
  }
  types = gguf.GGMLQuantizationType
  writer.add_file_type(
    gguf.LlamaFileType[f"MOSTLY_{kind}" if kind != "F32" else "ALL_F32"]
  )
  if kind == "Q8_0":
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
  for key, value in fields.items():
    add[type(value)](key, value)
  for name, tensor in tensors.items():
    own = types[kind] if tensor.ndim > 1 else types.F32
    if own == types.Q8_0 and tensor.shape[-1] % _BLOCK:
      own = types.F16
    data = gguf.quants.quantize(np.ascontiguousarray(tensor), own)
    writer.add_tensor(name, data, raw_dtype=own)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
