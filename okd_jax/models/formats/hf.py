"""Hugging Face folders, both ways: config.json, safetensors, tokenizer.

Of the weights each process reads what its devices need, a parameter's part at a time,
and writes one tensor after the other, so that nobody ever holds more than a share.
Nothing is executed from a folder: no pickle, no remote code.
"""

import collections
import dataclasses
import importlib.util
import itertools
import logging
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import transformers
from jax.typing import DTypeLike
from safetensors.numpy import save_file

from okd_jax.errors import UserError
from okd_jax.models.bounds import shown, whole
from okd_jax.models.config import MOST_IDS, ModelConfig
from okd_jax.models.formats.assembly import assemble, disassemble, stored_shapes
from okd_jax.models.formats.card import Card, model_card
from okd_jax.models.formats.families import FAMILIES, Family, family_of
from okd_jax.models.formats.parts import Where, on_default_device
from okd_jax.models.formats.tensors import HEAD, Tensors, weight_files
from okd_jax.models.formats.weights import Params, Weight
from okd_jax.runtime.files import read_json, replacing, write_json
from okd_jax.runtime.workdir import writes

MAX_SHARD_BYTES = 5 * 10**9
_ID = whole(-1, MOST_IDS)

_TEMPLATE = "okd_jax_template"  # a key of config.json that others leave alone
_SENTENCEPIECE = "tokenizer.model"
_TOKENIZER_FILES = ("tokenizer.json", _SENTENCEPIECE, "vocab.json", "spiece.model")
_LOADING_NOTES = ("is_local", "local_files_only", "name_or_path")
_WHOLE = "the model that this is a part of"  # a key that no config.json has
_log = logging.getLogger(__name__)

# Models whose text part sees earlier tokens alone, as those of a family here do.
_WHOLES = ("gemma3", "mistral3", "llava", "llava_next", "smolvlm", "idefics3")
# What a model's folder may hold for us to replace it; anything else is the user's.
_OURS = re.compile(
  r"(config|generation_config|special_tokens_map|added_tokens|normalizer)\.json"
  r"|(tokenizer|vocab|merges|chat_template|spiece|sentencepiece).*|README\.md"
  r"|model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
)


def load(
  folder: Path,
  *,
  dtype: DTypeLike = jnp.float32,
  where: Where = on_default_device,
  params: bool = True,
  quantize: bool = False,
  layers: range | None = None,
) -> "tuple[ModelConfig, Params | None, transformers.PreTrainedTokenizerBase | None]":
  """(config, parameters, tokenizer) of an HF folder.

  Parameters are None if `params` is False, the tokenizer if the folder has none.
  `quantize` and `layers` are those of `assembly.assemble`.
  """
  raw = _raw_config(folder)
  config = _config(folder, raw)
  tokenizer = load_tokenizer(folder) if layers is None else None
  config = dataclasses.replace(config, **_token_ids(folder, raw, tokenizer))
  if not params:
    return config, None, tokenizer
  family = family_of(config.family)
  tensors, table = Tensors(folder, family, part=_WHOLE in raw), _table(family)
  if config.tie_embeddings and not layers:
    [embedding] = (row.name for row in table if row.path == "embed/embedding")
    _tie(folder, tensors, embedding)
  tree = assemble(
    config,
    table,
    tensors,
    dtype=dtype,
    where=where,
    quantize=quantize,
    layers=layers,
  )
  return config, tree, tokenizer


def is_part(folder: Path) -> bool:
  """Whether the folder's model is one of those of which the text part alone is read."""
  return _WHOLE in _raw_config(folder)


def is_model(folder: Path) -> bool:
  """Whether the folder's config.json is a model's, and not a run's or none."""
  path = folder / "config.json"
  return path.exists() and "model_type" in read_json(path)


def _raw_config(folder: Path) -> dict[str, Any]:
  """What config.json says of the text model; a UserError if it is none of ours."""
  path = folder / "config.json"
  raw = read_json(path)
  name, text = str(raw.get("model_type")), raw.get("text_config")
  if name in _WHOLES and isinstance(text, dict):
    if str(text.get("model_type")) in FAMILIES:
      _log.info("%s: reads the text model of a %s alone", folder, name)
      return {**raw, **text, _WHOLE: name}
  if name not in FAMILIES:
    raise UserError(
      f"{path}: model_type {raw.get('model_type')!r} is not supported, only "
      f"{', '.join(FAMILIES)}"
    )
  return raw


def _config(folder: Path, raw: Mapping[str, Any]) -> ModelConfig:
  """The model's shape, without its token ids."""
  path = folder / "config.json"
  if raw.get("quantization_config") is not None:
    raise UserError(f"{path}: quantised weights are not supported; use the full ones")
  try:
    return FAMILIES[raw["model_type"]].config_from_hf(raw)
  except KeyError as error:
    raise UserError(f"{path}: the key {error} is missing") from None
  except UserError as error:
    raise UserError(f"{path}: {error}") from None
  except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
    raise UserError(f"{path}: a value is of the wrong type: {error}") from error


def template(folder: Path) -> str:
  """The data.template that `save` noted in a folder, '' where there is none."""
  path = folder / "config.json"
  value = read_json(path).get(_TEMPLATE, "") if path.exists() else ""
  return value if isinstance(value, str) else ""


def load_tokenizer(folder: Path) -> "transformers.PreTrainedTokenizerBase | None":
  """The folder's tokenizer, or None if it has none; none of its code is run."""
  there = [name for name in _TOKENIZER_FILES if (folder / name).exists()]
  if not there:
    return None
  if there == [_SENTENCEPIECE] and importlib.util.find_spec("sentencepiece") is None:
    raise UserError(
      f"{folder}: to read {_SENTENCEPIECE} without a tokenizer.json the sentencepiece "
      "package is needed: pip install okd-jax[sentencepiece]"
    )
  try:
    tokenizer = transformers.AutoTokenizer.from_pretrained(
      folder, local_files_only=True, trust_remote_code=False
    )
    tokenizer("a")  # some of what is wrong shows only now
    return tokenizer
  except Exception as error:  # tokenizers raises bare Exception for a bad file
    raise UserError(f"{folder}: the tokenizer cannot be read: {error}") from error


def save(
  folder: str | os.PathLike,
  params: Params,
  config: ModelConfig,
  tokenizer: "transformers.PreTrainedTokenizerBase | None" = None,
  *,
  dtype: DTypeLike = jnp.float32,
  card: Card | None = None,
  template: str = "",
  max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
  """Writes a folder that `AutoModelForCausalLM` and `load` both open.

  It appears whole or not at all, the same bytes for the same arguments. Of a run every
  process calls it.

  Args:
    dtype: of the stored weights: float32, bfloat16 or float16.
    card: what README.md says; template: data.template, noted in config.json.
    max_shard_bytes: weights beyond it go to several files and an index.
  Raises:
    UserError: for a model that its family cannot say, or a folder with other files.

  >>> import tempfile
  >>> from okd_jax.models import init
  >>> config = ModelConfig(vocab_size=8, hidden_size=4, num_layers=1, num_heads=2)
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   save(f"{folder}/model", init(config, jax.random.key(0)), config)
  ...   print([path.name for path in files(Path(folder, "model"))])
  ['config.json', 'model.safetensors']
  """
  raw = hf_config(config, dtype) | ({_TEMPLATE: template} if template else {})
  tensors = disassemble(config, _table_of(config), params, dtype=dtype)
  if not writes():
    return collections.deque(tensors, 0).clear()  # takes part in fetching them
  readme = _readme(config, params, card or Card())
  with replacing(folder, _OURS) as partial:
    _write_configs(partial, config, raw, tokenizer)
    _write_weights(partial, tensors, _shards(config, dtype, max_shard_bytes))
    (partial / "README.md").write_text(readme, "utf-8")


def hf_config(config: ModelConfig, dtype: DTypeLike = jnp.float32) -> dict[str, Any]:
  """The contents of config.json; a UserError where the family cannot say it."""
  family = family_of(config.family)
  name = np.dtype(dtype).name
  return {
    **family.config_to_hf(config),
    **_ids_to_hf(config),
    "architectures": [family.architecture],
    "model_type": config.family,
    "dtype": name,
    "torch_dtype": name,  # what transformers before 5 calls it
  }


def _table_of(config: ModelConfig) -> list[Weight]:
  return _table(family_of(config.family))


def _table(family: Family) -> list[Weight]:
  own = family.prefix
  return [
    row if row.path == "head" else dataclasses.replace(row, name=own + row.name)
    for row in family.weights
  ]


def _tie(folder: Path, tensors: Tensors, embedding: str) -> None:
  """Leaves one of the two, which a folder may hold alone or both."""
  if HEAD not in tensors.shapes:
    return
  if embedding not in tensors.shapes:
    tensors.rename(HEAD, embedding)
    return
  if not tensors.equal(HEAD, embedding):
    raise UserError(
      f"{folder}: config.json ties the embeddings, but {HEAD} differs from "
      f"{embedding}; set tie_word_embeddings to false if the head is a separate one"
    )
  tensors.drop(HEAD)


def files(folder: Path) -> list[Path]:
  """Configuration and weights of an HF folder, in a fixed order."""
  return [folder / "config.json", *weight_files(folder)]


def _token_ids(
  folder: Path,
  raw: Mapping[str, Any],
  tokenizer: "transformers.PreTrainedTokenizerBase | None",
) -> dict[str, Any]:
  """bos, eos and pad ids; the generation config comes first, as in `generate`.

  What neither says the tokenizer knows.
  """
  path = folder / "generation_config.json"
  sources = {path: read_json(path) if path.exists() else {}}
  sources[folder / "config.json"] = raw
  found = {
    name: [i for p, source in sources.items() for i in _ids(p, source, f"{name}_id")]
    for name in ("bos_token", "eos_token", "pad_token")
  }
  ids = {
    "bos_id": next(iter(found["bos_token"]), None),
    "eos_ids": tuple(dict.fromkeys(found["eos_token"])),
    "pad_id": next(iter(found["pad_token"]), None),
  }
  if tokenizer is None:
    return ids
  eos = tokenizer.eos_token_id
  fallback = {
    "bos_id": tokenizer.bos_token_id,
    "eos_ids": () if eos is None else (eos,),
    "pad_id": tokenizer.pad_token_id,
  }
  return {k: fallback[k] if v in (None, ()) else v for k, v in ids.items()}


def _ids(path: Path, source: Mapping[str, Any], key: str) -> list[int]:
  """The ids under a key, one or a list; some write -1 for none."""
  value = source.get(key)
  ids = value if isinstance(value, list) else [] if value is None else [value]
  if not all(map(_ID.fits, ids)):
    raise UserError(f"{path}: {key}={shown(value)} must be {_ID}, or a list of these")
  return [i for i in ids if i >= 0]


def _ids_to_hf(config: ModelConfig) -> dict[str, Any]:
  eos = list(config.eos_ids)
  return {
    "bos_token_id": config.bos_id,
    "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
    "pad_token_id": config.pad_id,
  }


def _write_configs(
  folder: Path,
  config: ModelConfig,
  raw: dict[str, Any],
  tokenizer: "transformers.PreTrainedTokenizerBase | None",
) -> None:
  write_json(folder / "config.json", raw, sort_keys=True)
  write_json(folder / "generation_config.json", _ids_to_hf(config), sort_keys=True)
  if tokenizer is not None:
    _write_tokenizer(folder, tokenizer)


def _readme(config: ModelConfig, params: Params, card: Card) -> str:
  count = sum(np.size(leaf) for leaf in jax.tree.leaves(params))
  return model_card(config, count, card)


def _write_tokenizer(
  folder: Path, tokenizer: "transformers.PreTrainedTokenizerBase"
) -> None:
  tokenizer.save_pretrained(folder)
  path = folder / "tokenizer_config.json"
  # transformers 5 also notes how it was loaded, and its own class for any tokenizer
  # that earlier versions know by the other name.
  raw = {k: v for k, v in read_json(path).items() if k not in _LOADING_NOTES}
  if raw.get("tokenizer_class") == "TokenizersBackend":
    raw["tokenizer_class"] = "PreTrainedTokenizerFast"
  write_json(path, raw, sort_keys=True)


def _write_weights(
  folder: Path,
  tensors: Iterator[tuple[str, np.ndarray]],
  shards: Sequence[Sequence[str]],
) -> None:
  """Writes each file as soon as its tensors are there, and the index."""
  weight_map, total = {}, 0
  for number, names in enumerate(shards, 1):
    shard = dict(itertools.islice(tensors, len(names)))
    total += sum(tensor.nbytes for tensor in shard.values())
    name = "model.safetensors"
    if len(shards) > 1:
      name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
    save_file(shard, folder / name, {"format": "pt"})
    weight_map |= dict.fromkeys(shard, name)
  if len(shards) > 1:
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index, sort_keys=True)


def _shards(config: ModelConfig, dtype: DTypeLike, limit: int) -> list[list[str]]:
  """Fills one file after the other; a tensor beyond the limit gets its own."""
  shards, size = [[]], 0
  shapes = stored_shapes(config, _table_of(config))
  for name, shape in shapes.items():
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    if shards[-1] and size + nbytes > limit:
      shards.append([])
      size = 0
    shards[-1].append(name)
    size += nbytes
  return shards
