"""Online modules as PEFT adapter folders, both ways.

A folder is PEFT's config and one safetensors file, whose header says what module we put
there. How a kind of module looks in them is told by the modules beside this one, of
which there is a table.
"""

import dataclasses
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from flax import traverse_util
from safetensors.numpy import save_file

from okd_jax.data.values import loads
from okd_jax.errors import UserError
from okd_jax.models import adapters
from okd_jax.models.adapters import Adapter, Lora, Prefix, Prompt
from okd_jax.models.adapters.base import Tree
from okd_jax.models.bounds import OBJECT, SWITCH, TEXT, Bound, number, problems
from okd_jax.models.config import ModelConfig
from okd_jax.models.formats import lora_peft, prompt_peft
from okd_jax.models.formats.tensors import FLOATS, open_safetensors
from okd_jax.models.transformer import Decoder
from okd_jax.runtime.files import read_json, replacing, write_json

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_OURS = re.compile(r"adapter_config\.json|adapter_model\.safetensors|README\.md")
_NOTE = "okd_jax"  # the header's only key: two would be written in random order
_DIFFERS = "peft_differs_because"
_KEYS = {  # of PEFT's configuration, those that are read
  "alpha_pattern": Bound(OBJECT),
  "lora_alpha": number(-1e6, 1e6),
  "peft_type": Bound(TEXT),
  "use_rslora": Bound(SWITCH),
}


class _Format(NamedTuple):
  """How PEFT keeps a kind of module.

  to_peft(tree, adapter, model_config) -> (tensors, config, why): the config without the
    base model's name; why PEFT would compute something else, '' if it would not.
  read(config, file, ours, model_config, path) -> (tree, adapter): `ours` is what the
    header says, None where it is another's.
  """

  to_peft: Callable[..., tuple[dict, dict, str]]
  read: Callable[..., tuple[Tree, Adapter]]


_FORMATS = {
  Lora: _Format(lora_peft.to_peft, lora_peft.read),
  Prefix: _Format(prompt_peft.prefix_to_peft, prompt_peft.read_prefix),
  Prompt: _Format(prompt_peft.prompt_to_peft, prompt_peft.read_prompt),
}
# Prompt tuning differs from P-tuning in training alone. Anything else is tried as LoRA.
_TYPES = {"PREFIX_TUNING": Prefix, "P_TUNING": Prompt, "PROMPT_TUNING": Prompt}


def save_adapter(
  folder: str | os.PathLike,
  tree: Tree,
  adapter: Adapter,
  model_config: ModelConfig,
  base_model: str,
) -> None:
  """Writes the collection `adapter` as a folder for `PeftModel.from_pretrained`.

  The folder appears whole or not at all, with the same bytes each time.

  Args:
    folder: where to.
    tree: the collection.
    adapter: what it is.
    model_config: the teacher's.
    base_model: the hub id or folder of the model that the module belongs to.

  Raises:
    UserError: where PEFT has no such module, the tree does not fit the model, or the
      folder holds something else.
  """
  if type(adapter) not in _FORMATS:
    raise UserError("a teacher's own blocks are no PEFT adapter; save the whole model")
  _check(tree, adapter, model_config)
  to_peft = _FORMATS[type(adapter)].to_peft
  tensors, raw, differs = to_peft(tree, adapter, model_config)
  raw["base_model_name_or_path"] = str(base_model)
  note = {"kind": adapter.kind} | dataclasses.asdict(adapter)
  if differs:
    note[_DIFFERS] = differs  # for people: we know what we wrote
  with replacing(folder, _OURS) as partial:
    write_json(partial / _CONFIG, raw, sort_keys=True)
    header = {_NOTE: json.dumps(note, sort_keys=True)}
    save_file(tensors, partial / _WEIGHTS, header)


def load_adapter(
  folder: str | os.PathLike, model_config: ModelConfig
) -> tuple[Tree, Adapter]:
  """(collection `adapter`, what it is) from a PEFT folder, ours or another's.

  Args:
    folder: as `save_adapter` or PEFT wrote it.
    model_config: of the model that the module is for.

  Raises:
    UserError: where the folder holds none of our kinds of module, does not fit the
      model, or uses an option that we do not compute.
  """
  folder = Path(folder)
  raw = read_json(folder / _CONFIG)
  if wrong := list(problems(raw, _KEYS)):
    raise UserError(f"{folder / _CONFIG}: {'; '.join(wrong)}")
  path = folder / _WEIGHTS
  if not path.exists():
    pickled = "; pickled adapters are not read, since a pickle can run code"
    raise UserError(f"{path} does not exist" + pickled * any(folder.glob("*.bin")))
  file = open_safetensors(path)
  _check_dtypes(file, path)
  cls, noted = _TYPES.get(raw.get("peft_type"), Lora), _noted(file, path)
  ours = noted if isinstance(noted, cls) else None
  tree, adapter = _FORMATS[cls].read(raw, file, ours, model_config, path)
  adapter.check(model_config)
  _check(tree, adapter, model_config)
  if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)):
    raise UserError(f"{path} holds numbers that are not finite")
  return jax.tree.map(jnp.array, tree), adapter


def _check_dtypes(file: safetensors.safe_open, path: Path) -> None:
  """Raises a UserError for tensors that hold no weights."""
  for name in file.keys():
    if (dtype := file.get_slice(name).get_dtype()) not in FLOATS:
      raise UserError(f"{path}: {name} is {dtype}, not one of {', '.join(FLOATS)}")


def _noted(file: safetensors.safe_open, path: Path) -> Adapter | None:
  """What the header says that we put there; None in another's file.

  Older notes name the fields of every kind, of which `make` takes the kind's own.
  """
  text = (file.metadata() or {}).get(_NOTE)
  if text is None:
    return None
  note = loads(text.encode(), f"{path}: the note {_NOTE!r} in its header", "file")
  if not isinstance(note, dict):
    raise UserError(f"{path}: the note {_NOTE!r} in its header is no object")
  try:
    return adapters.make(note.pop("kind", None), **note)
  except (UserError, TypeError) as error:  # TypeError: a field is missing
    raise UserError(f"{path}: the note in its header: {error}") from error


def _check(tree: Tree, adapter: Adapter, model_config: ModelConfig) -> None:
  """Raises a UserError unless the tree is what the model asks for."""
  found = traverse_util.flatten_dict(tree, sep="/")
  if isinstance(adapter, Prompt) and "prompt/vectors" in found:
    adapter = adapter.bare
  decoder = Decoder(model_config, adapter)
  tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  wanted = jax.eval_shape(decoder.init, jax.random.key(0), tokens)["adapter"]
  wanted = traverse_util.flatten_dict(wanted, sep="/")
  found, wanted = ({k: v.shape for k, v in x.items()} for x in (found, wanted))
  differing = [
    f"{k} is {found.get(k, 'missing')}, the model needs {wanted.get(k, 'none')}"
    for k in sorted({*wanted, *found})
    if wanted.get(k) != found.get(k)
  ]
  if differing:
    raise UserError("the adapter does not fit the model; " + "; ".join(differing))
