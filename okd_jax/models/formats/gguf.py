"""GGUF files, in: llama.cpp's format, dequantised to plain parameters.

Reads the architectures 'llama' (which Mistral also uses), 'qwen2', 'qwen3' and 'gpt2',
in every quantisation that the `gguf` package can undo.
"""

import dataclasses
import functools
import importlib.util
import re
from pathlib import Path
from typing import Any, NoReturn

import jax.numpy as jnp
import numpy as np
import transformers
from jax.typing import DTypeLike
from jaxtyping import Float

from okd_jax.errors import UserError
from okd_jax.models.bounds import TEXT, Bound, number, problems, whole
from okd_jax.models.config import BOUNDS, ModelConfig, RopeScaling
from okd_jax.models.formats import gguf_header, gguf_tokenizer
from okd_jax.models.formats.assembly import assemble
from okd_jax.models.formats.families import family_of
from okd_jax.models.formats.parts import Bounds, Where, on_default_device
from okd_jax.models.formats.weights import QKV, Params, Weight, linear, norm
from okd_jax.models.rope import rope_frequencies

Value = bool | int | float | str | list[Any] | None  # what a field may hold

_RATIO = number(0.0, 1e9)
_FIELDS = {
  "general.license": Bound(TEXT),
  "general.license.link": Bound(TEXT),
  "general.license.name": Bound(TEXT),
  "split.count": whole(0, 1 << 16),
} | {
  f"tokenizer.ggml.{name}_token_id": BOUNDS["bos_id"]
  for name in ("bos", "eos", "eot", "eom", "padding", "unknown")
}
_OF_ARCH = {  # an architecture's own, one for all layers or one for each
  "attention.head_count": BOUNDS["num_heads"]._replace(least=1),
  "attention.head_count_kv": BOUNDS["num_kv_heads"]._replace(least=1),
  "attention.key_length": BOUNDS["head_dim"],
  "attention.layer_norm_epsilon": BOUNDS["norm_eps"],
  "attention.layer_norm_rms_epsilon": BOUNDS["norm_eps"],
  "attention.value_length": BOUNDS["head_dim"],
  "block_count": BOUNDS["num_layers"]._replace(least=1),
  "context_length": BOUNDS["max_length"],
  "embedding_length": BOUNDS["hidden_size"]._replace(least=1),
  "expert_count": BOUNDS["experts"],
  "feed_forward_length": BOUNDS["mlp_size"],
  "rope.dimension_count": BOUNDS["head_dim"],
  "rope.freq_base": BOUNDS["rope_theta"],
  "rope.scale_linear": _RATIO,
  "rope.scaling.factor": _RATIO,
  "rope.scaling.type": Bound(TEXT),
}
_IGNORED = re.compile(r"rope_freqs\.weight|attn_rot_embd")  # said by the config


_COMMON = (
  Weight("embed/embedding", "token_embd.weight"),
  Weight("head", "output.weight"),
  *norm("norm", "output_norm"),
  *norm("layers/attention_norm", "blk.{}.attn_norm"),
  *norm("layers/mlp_norm", "blk.{}.ffn_norm"),
  *linear("blk.{}.attn_output", "attention/out"),
  *linear("blk.{}.ffn_up", "mlp/up"),
  *linear("blk.{}.ffn_down", "mlp/down"),
)
_LLAMA = (
  *_COMMON,
  *linear("blk.{}.attn_q", "attention/query"),
  *linear("blk.{}.attn_k", "attention/key"),
  *linear("blk.{}.attn_v", "attention/value"),
  *linear("blk.{}.ffn_gate", "mlp/gate"),
)
WEIGHTS = {
  "llama": _LLAMA,
  "qwen2": _LLAMA,
  "qwen3": (
    *_LLAMA,
    Weight("layers/attention/query_norm/scale", "blk.{}.attn_q_norm.weight"),
    Weight("layers/attention/key_norm/scale", "blk.{}.attn_k_norm.weight"),
  ),
  "gpt2": (
    *_COMMON,
    Weight("position_embed/embedding", "position_embd.weight"),
    *linear("blk.{}.attn_qkv", *QKV),
  ),
}


def load(
  path: Path,
  *,
  dtype: DTypeLike = jnp.float32,
  where: Where = on_default_device,
  params: bool = True,
  quantize: bool = False,
  layers: range | None = None,
) -> "tuple[ModelConfig, Params | None, transformers.PreTrainedTokenizerBase | None]":
  """(config, parameters or None, tokenizer or None) of a GGUF file.

  Args:
    path: the file.
    dtype: what the parameters become.
    where: places a parameter, given its path and shape.
    params: False leaves them out.
    quantize, layers: as of `assembly.assemble`.

  Raises:
    UserError: where the `gguf` package is missing, the file is damaged, or it
      holds something that we cannot compute.
  """
  file = _File(path)
  config = file.config()
  build = functools.partial(gguf_tokenizer.build, file.fields, config.max_length)
  tokenizer = build(str(path)) if layers is None else None
  if not params:
    return config, None, tokenizer
  how = {"dtype": dtype, "quantize": quantize, "layers": layers, "where": where}
  tree = assemble(config, file.table, file, **how)
  return config, tree, tokenizer


def licence(path: Path) -> dict[str, str]:
  """The licence that a GGUF file names, {} if it names none.

  Raises:
    UserError: if the file cannot be read.
  """
  fields, _ = _read(path)
  names = {"license": "", "license_name": ".name", "license_link": ".link"}
  found = {k: fields.get(f"general.license{name}") for k, name in names.items()}
  return {key: str(value) for key, value in found.items() if value}


class _File:
  """An open GGUF file: metadata fields, tensor shapes, and tensors on demand."""

  whole = True  # quantised in blocks, which are not those of a part

  def __init__(self, path: Path) -> None:
    self.path, self.name = path, str(path)
    self.fields, self._tensors = _read(path)
    self.arch = self.fields.get("general.architecture")
    if not isinstance(self.arch, str) or self.arch not in WEIGHTS:
      self._refuse(
        f"the architecture {self.arch!r} is not supported, only {', '.join(WEIGHTS)}"
      )
    self._check_fields()
    if self.fields.get("split.count", 1) > 1:
      self._refuse("it is one part of several; join them with llama-gguf-split --merge")
    self.table = WEIGHTS[self.arch]
    self.shapes = {
      name: tuple(int(size) for size in reversed(tensor.shape))
      for name, tensor in self._tensors.items()
      if not _IGNORED.search(name)
    }
    if self.get("block_count") > len(self.shapes):
      self._refuse(f"it has {len(self.shapes)} tensors for so many layers")
    if self._head_is_embedding():
      del self.shapes["output.weight"]

  def _check_fields(self) -> None:
    """Raises a UserError for fields that hold what no model has."""
    wrong = list(problems(self.fields, _FIELDS))
    for name, bound in _OF_ARCH.items():
      value = self.fields.get(full := f"{self.arch}.{name}")
      for one in value if isinstance(value, list) else [value]:
        wrong += problems({full: one}, {full: bound})
    if wrong:
      self._refuse("; ".join(dict.fromkeys(wrong)))

  def config(self) -> ModelConfig:
    """The model's shape; what GGUF leaves unsaid shows in which tensors there are."""
    return _gpt2_config(self) if self.arch == "gpt2" else _llama_config(self)

  def get(self, key: str, *default: Value) -> Value:
    """A field of this architecture, such as 'block_count'."""
    full = f"{self.arch}.{key}"
    if full not in self.fields and not default:
      self._refuse(f"the field {full} is missing")
    value = self.fields.get(full, *default)
    if value is None:
      self._refuse(f"the field {full} is missing")
    if isinstance(value, list):
      if len(set(value)) != 1:
        self._refuse(f"{full} differs from layer to layer, which is not supported")
      value = value[0]
    # Floats are stored as float32: 1e-5 would come out as 9.99999974e-06.
    return float(f"{value:.7g}") if isinstance(value, float) else value

  def read(self, name: str, bounds: Bounds) -> np.ndarray:
    """What of a tensor lies within the bounds, in float32."""
    return self._whole(name)[tuple(slice(*each) for each in bounds)]

  def _whole(self, name: str) -> np.ndarray:
    """A tensor in float32, its rows in the order of the HF layout."""
    tensor = self._raw(name)
    if self.arch == "llama" and (found := re.search(r"\.attn_([qk])\.", name)):
      key = "attention.head_count" + ("_kv" if found[1] == "k" else "")
      heads = self.get(key, self.get("attention.head_count"))
      tensor = _unpermute(tensor, heads)
    return tensor

  def rope_factors(self) -> np.ndarray | None:
    """By what each rotary frequency is divided, if the file says so."""
    name = "rope_freqs.weight"
    return self._raw(name) if name in self._tensors else None

  def _raw(self, name: str) -> np.ndarray:
    import gguf

    tensor = self._tensors[name]
    try:
      return gguf.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError:
      self._refuse(f"{name} is {tensor.tensor_type.name}, which cannot be dequantised")

  def _head_is_embedding(self) -> bool:
    """Some converters store a tied head a second time."""
    head, embedding = (
      self._tensors.get(n) for n in ("output.weight", "token_embd.weight")
    )
    return (
      head is not None
      and embedding is not None
      and head.tensor_type == embedding.tensor_type
      and np.array_equal(head.data, embedding.data)
    )

  def _refuse(self, reason: str) -> NoReturn:
    raise UserError(f"{self.path}: {reason}")


# The second one's values are `gguf.ReaderTensor`, of a package that may be missing.
def _read(path: Path) -> tuple[dict[str, Value], dict[str, Any]]:
  """(fields, tensors) of a file; a UserError if it cannot be read."""
  if importlib.util.find_spec("gguf") is None:
    raise UserError(
      f"{path}: reading GGUF needs the gguf package: pip install okd-jax[gguf]"
    )
  import gguf

  gguf_header.check(path, _block)
  try:
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
  except Exception as error:  # what a damaged file raises depends on where it is
    raise UserError(
      f"{path} is no readable GGUF file (damaged or cut short?): {error}"
    ) from error
  return fields, {tensor.name: tensor for tensor in reader.tensors}


def _block(kind: int) -> tuple[int, int]:
  """(values in a block, its bytes) of a tensor's type; ValueError for none."""
  import gguf

  return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]


def _shared_config(file: _File) -> dict[str, Any]:
  heads = file.get("attention.head_count")
  ids = {
    name: file.fields.get(f"tokenizer.ggml.{name}_token_id")
    for name in ("bos", "eos", "eot", "eom", "padding")
  }
  eos = (ids[name] for name in ("eos", "eot", "eom") if ids[name] is not None)
  if len(file.shapes.get("token_embd.weight", ())) != 2:
    raise UserError(f"{file.path}: the matrix token_embd.weight is missing")
  return {
    "family": file.arch,
    "vocab_size": file.shapes["token_embd.weight"][0],
    "hidden_size": file.get("embedding_length"),
    "num_layers": file.get("block_count"),
    "num_heads": heads,
    "mlp_size": file.get("feed_forward_length"),
    "max_length": file.get("context_length"),
    "tie_embeddings": "output.weight" not in file.shapes,
    "bos_id": ids["bos"],
    "eos_ids": tuple(dict.fromkeys(eos)),
    "pad_id": ids["padding"],
  }


def _gpt2_config(file: _File) -> ModelConfig:
  return ModelConfig(
    **_shared_config(file),
    norm="layernorm",
    norm_eps=file.get("attention.layer_norm_epsilon"),
    position="learned",
    activation="gelu_tanh",
    gated_mlp=False,
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
  )


def _llama_config(file: _File) -> ModelConfig:
  shared = _shared_config(file)
  head_dim = file.get(
    "attention.key_length", shared["hidden_size"] // shared["num_heads"]
  )
  for key, value in (
    ("rope.dimension_count", head_dim),
    ("attention.value_length", head_dim),
    ("expert_count", 0),
  ):
    if file.get(key, value) != value:
      raise UserError(
        f"{file.path}: {file.arch}.{key}={file.get(key)} is not supported, only {value}"
      )
  config = ModelConfig(
    **{**family_of(file.arch).fixed, **shared},
    num_kv_heads=file.get("attention.head_count_kv", shared["num_heads"]),
    head_dim=head_dim,
    norm_eps=file.get("attention.layer_norm_rms_epsilon"),
    rope_theta=file.get("rope.freq_base", 10000.0),
    out_bias="blk.0.attn_output.bias" in file.shapes,
    mlp_bias="blk.0.ffn_up.bias" in file.shapes,
  )
  bias = "blk.0.attn_q.bias" in file.shapes
  scaling = _rope_scaling(file, config)
  return dataclasses.replace(config, rope_scaling=scaling, qkv_bias=bias)


def _rope_scaling(file: _File, config: ModelConfig) -> RopeScaling | None:
  factors = file.rope_factors()
  if factors is not None:
    return _llama3_scaling(file, config, factors)
  factor = file.get("rope.scaling.factor", file.get("rope.scale_linear", 1.0))
  match file.get("rope.scaling.type", "linear"):
    case "none":
      return None
    case "linear":
      return None if factor == 1 else RopeScaling("linear", factor)
    case kind:
      raise UserError(
        f"{file.path}: rope scaling {kind!r} is not supported, only linear"
      )


def _llama3_scaling(
  file: _File, config: ModelConfig, factors: Float[np.ndarray, " half"]
) -> RopeScaling | None:
  """The config's constants back from the factors that GGUF keeps instead.

  Every published LLaMA 3 has the same constants but for the largest factor.
  """
  if factors.shape != (config.rotary_dim // 2,):
    raise UserError(f"{file.path}: rope_freqs.weight has {factors.size} values")
  if np.allclose(factors, 1):
    return None
  scaling = RopeScaling("llama3", float(f"{factors.max():.7g}"))
  scaled = dataclasses.replace(config, rope_scaling=scaling)
  if not np.allclose(
    rope_frequencies(config), rope_frequencies(scaled) * factors, rtol=1e-4
  ):
    raise UserError(f"{file.path}: rope_freqs.weight is not LLaMA 3's; not supported")
  return scaling


def _unpermute(tensor: np.ndarray, heads: int) -> np.ndarray:
  """Undoes llama.cpp's order of query and key rows.

  It interleaves the two halves of each head, since its rotation turns neighbouring
  channels where HF's (and ours) turns channel i against channel i + D/2.
  """
  pairs = tensor.reshape(heads, -1, 2, *tensor.shape[1:])
  return pairs.swapaxes(1, 2).reshape(tensor.shape)
