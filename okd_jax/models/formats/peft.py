"""Online modules as PEFT adapter folders, both ways; LoRA here, the rest beside it.

Prefixes and prompts have a format of their own, see `prompt_peft.py`. For LoRA, PEFT
adds (lora_alpha / r) B A x to a layer's output: A is our `down` and B our `up`, both
transposed, and lora_alpha / r is our scale.

GPT-2 computes query, key and value in one layer, `c_attn`, where we have three, each
with its own pair of rank r. On `c_attn` n of our pairs are exactly one pair of rank
n r, each B in the rows of its own slice and zeros elsewhere:

    A = [A_query; A_value]    B = [[B_query, 0], [0, 0], [0, B_value]]

The header of our safetensors file says that a pair is made like this, so that it is
split again on the way in. Elsewhere made adapters have one pair for all of `c_attn`:
there query, key and value each get all of A and their own slice of B.
"""

import dataclasses
import json
import math
import os
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from safetensors.numpy import save_file

from okd_jax.errors import UserError
from okd_jax.models.adapters import AdapterConfig
from okd_jax.models.config import ModelConfig
from okd_jax.models.formats import prompt_peft
from okd_jax.models.formats.hf import FAMILIES, open_safetensors
from okd_jax.models.formats.weights import listing
from okd_jax.models.transformer import Decoder
from okd_jax.runtime.files import read_json, replacing, write_json

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_OURS = re.compile(r"adapter_config\.json|adapter_model\.safetensors|README\.md")
_NOTE = "okd_jax"  # the header's only key: two would be written in random order
_DIFFERS = "peft_differs_because"

# Options that change what is computed in ways we do not; unset means absent or falsy.
_MUST_BE_UNSET = (
  "alora_invocation_tokens",
  "layer_replication",
  "lora_bias",
  "modules_to_save",
  "target_parameters",
  "trainable_token_indices",
  "use_bdlora",
  "use_dora",
  "use_qalora",
)
# Other ways to initialise also change the base weights.
_PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva")


@dataclasses.dataclass(frozen=True)
class _Slice:
  """One of our projections within a layer of theirs."""

  path: str  # 'attention/query'
  part: int
  parts: int

  @property
  def target(self) -> str:
    return self.path.split("/")[1]


def save_adapter(
  folder: str | os.PathLike,
  adapter,
  adapter_config: AdapterConfig,
  model_config: ModelConfig,
  base_model: str,
) -> None:
  """Writes the collection `adapter` as a folder for `PeftModel.from_pretrained`.

  `base_model` is the hub id or folder of the model that the adapter belongs to. The
  folder appears whole or not at all, with the same bytes each time.
  """
  if adapter_config.kind == "blocks":
    raise UserError("a teacher's own blocks are no PEFT adapter; save the whole model")
  flat = _checked(adapter, adapter_config, model_config)
  note = dataclasses.asdict(adapter_config)
  if adapter_config.kind == "lora":
    tensors, raw = _to_peft(flat, adapter_config, model_config)
  else:
    tensors, raw = prompt_peft.to_peft(adapter, adapter_config, model_config)
    if reason := prompt_peft.why_not_exact(adapter_config, model_config):
      note[_DIFFERS] = reason  # for people: we know what we wrote
  raw["base_model_name_or_path"] = str(base_model)
  with replacing(folder, _OURS) as partial:
    write_json(partial / _CONFIG, raw, sort_keys=True)
    header = {_NOTE: json.dumps(note, sort_keys=True)}
    save_file(tensors, partial / _WEIGHTS, header)


def load_adapter(
  folder: str | os.PathLike, model_config: ModelConfig
) -> tuple[dict, AdapterConfig]:
  """(collection `adapter`, its config) from a PEFT folder, ours or another's.

  Raises:
    UserError: where the folder holds none of our kinds of module, does not fit the
      model, or uses an option that we do not compute.
  """
  folder = Path(folder)
  raw = read_json(folder / _CONFIG)
  path = folder / _WEIGHTS
  if not path.exists():
    pickled = "; pickled adapters are not read, since a pickle can run code"
    raise UserError(f"{path} does not exist" + pickled * any(folder.glob("*.bin")))
  file = open_safetensors(path)
  note = json.loads((file.metadata() or {}).get(_NOTE, "null"))
  config = None
  if note is not None:
    note.pop(_DIFFERS, None)
    config = AdapterConfig(**note)
  if prompt_peft.is_prompt_learning(raw):
    tree, config = _read_prompt(raw, file, config, model_config, path)
  else:
    tree, config = _read_lora(raw, file, config, model_config, path)
  _checked(tree, config, model_config)
  return jax.tree.map(jnp.array, tree), config


def _read_prompt(raw, file, config, model_config, path: Path):
  names = list(file.keys())
  if names != [prompt_peft.TENSOR]:
    raise UserError(f"{path} holds {', '.join(names)}, not {prompt_peft.TENSOR} alone")
  table = file.get_tensor(prompt_peft.TENSOR).astype(np.float32)
  try:
    return prompt_peft.from_peft(raw, table, config, model_config)
  except UserError as error:
    raise UserError(f"{path} does not fit the model: {error}") from error


def _read_lora(raw, file, ours: AdapterConfig | None, model_config, path: Path):
  pairs = _parse(file, FAMILIES[model_config.family], path)
  config = ours or _foreign_config(raw, pairs, model_config, path.parent)
  try:
    flat = _split(pairs, config, model_config, shared=ours is None)
  except (KeyError, ValueError) as error:
    raise UserError(f"{path} does not fit the model: {error}") from error
  return {"layers": traverse_util.unflatten_dict(flat, sep="/")}, config


def _checked(adapter, adapter_config, model_config) -> dict[str, np.ndarray]:
  """{'attention/query/down': array, …}; a UserError unless the model asks for these."""
  decoder = Decoder(model_config, adapter=adapter_config)
  tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  wanted = jax.eval_shape(decoder.init, jax.random.key(0), tokens)["adapter"]
  wanted = {k: v.shape for k, v in traverse_util.flatten_dict(wanted, sep="/").items()}
  flat = traverse_util.flatten_dict(adapter, sep="/")
  if adapter_config.kind == "prompt" and "prompt/vectors" in flat:
    wanted = {"prompt/vectors": (adapter_config.length, model_config.hidden_size)}
  found = {k: v.shape for k, v in flat.items()}
  differing = [
    f"{k} is {found.get(k, 'missing')}, the model needs {wanted.get(k, 'none')}"
    for k in sorted({*wanted, *found})
    if wanted.get(k) != found.get(k)
  ]
  if differing:
    raise UserError("the adapter does not fit the model; " + "; ".join(differing))
  return {k.removeprefix("layers/"): np.asarray(v, np.float32) for k, v in flat.items()}


def _to_peft(flat, config: AdapterConfig, model_config) -> tuple[dict, dict]:
  """(tensors, PEFT's config without the base model's name) of LoRA pairs."""
  family = FAMILIES[model_config.family]
  modules = _modules(family, config.targets)
  layers = config.num_layers(model_config.num_layers)
  first = model_config.num_layers - layers
  tensors = {}
  for name, slices in modules.items():
    for layer in range(layers):
      down, up = _fuse([_pair(flat, s.path, layer) for s in slices], slices)
      key = _key(family, first + layer, name)
      tensors[f"{key}.lora_A.weight"] = np.ascontiguousarray(down.T)
      tensors[f"{key}.lora_B.weight"] = np.ascontiguousarray(up.T)
  ranks = {name: config.rank * len(slices) for name, slices in modules.items()}
  raw = _config_to_peft(family, ranks, config.scale)
  if first:
    raw["layers_to_transform"] = list(range(first, model_config.num_layers))
    raw["layers_pattern"] = family.LAYERS
  return tensors, raw


def _modules(family, targets) -> dict[str, list[_Slice]]:
  """Their layers that hold any of our targets: {'attn.c_attn': [query, value]}."""
  modules: dict[str, list[_Slice]] = {}
  for path, (name, part, parts) in family.PROJECTIONS.items():
    if (piece := _Slice(path, part, parts)).target in targets:
      modules.setdefault(name, []).append(piece)
  return modules


def _key(family, layer: int, name: str) -> str:
  return f"base_model.model.{family.PREFIX}{family.LAYERS}.{layer}.{name}"


def _pair(flat, path: str, layer: int):
  return flat[f"{path}/down"][layer], flat[f"{path}/up"][layer]


def _fuse(pairs, slices: list[_Slice]):
  """One (down [D, n r], up [n r, parts H]) from n pairs, each in its own columns."""
  parts = slices[0].parts
  ups = []
  for (_, up), piece in zip(pairs, slices, strict=True):
    wide = np.zeros((up.shape[0], parts, up.shape[1]), up.dtype)
    wide[:, piece.part] = up
    ups.append(wide.reshape(up.shape[0], -1))
  return np.concatenate([down for down, _ in pairs], -1), np.concatenate(ups)


def _config_to_peft(family, ranks: dict[str, int], scale: float):
  names = {name: _short(family, name) for name in ranks}
  # One rank for all where that is possible: few readers know rank_pattern.
  rank = min(ranks.values())
  patterns = {names[name]: r for name, r in ranks.items() if r != rank}
  return {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "inference_mode": True,
    "r": rank,
    "lora_alpha": scale * rank,
    "lora_dropout": 0.0,
    "bias": "none",
    "fan_in_fan_out": family.FAN_IN_FAN_OUT,
    "target_modules": sorted(names.values()),
    "rank_pattern": patterns,
    "alpha_pattern": {name: scale * r for name, r in patterns.items()},
  }


def _short(family, name: str) -> str:
  """The last part of a layer's name, or all where two layers share it ('c_proj')."""
  last = name.split(".")[-1]
  names = {other for other, _, _ in family.PROJECTIONS.values()}
  return last if sum(n.split(".")[-1] == last for n in names) == 1 else name


def _parse(file, family, path: Path) -> dict[str, dict[int, dict[str, np.ndarray]]]:
  """{'attn.c_attn': {layer: {'A': array, 'B': array}}} of a safetensors file."""
  names = {name for name, _, _ in family.PROJECTIONS.values()}
  pattern = re.compile(
    rf"base_model\.model\.(?:{re.escape(family.PREFIX)})?{family.LAYERS}\.(\d+)\."
    rf"({'|'.join(map(re.escape, names))})\.lora_([AB])\.weight"
  )
  pairs, unknown = {}, []
  for key in file.keys():
    if found := pattern.fullmatch(key):
      layer = pairs.setdefault(found[2], {}).setdefault(int(found[1]), {})
      layer[found[3]] = file.get_tensor(key).astype(np.float32)
    else:
      unknown.append(key)
  halves = [
    f"{name} of layer {layer}"
    for name, layers in pairs.items()
    for layer, pair in layers.items()
    if len(pair) != 2
  ]
  problems = [
    *listing("tensors that no such model has", unknown),
    *listing("only one of A and B", halves),
  ]
  if problems or not pairs:
    raise UserError(f"{path}: {'; '.join(problems) or 'there is no LoRA in it'}")
  return pairs


def _foreign_config(raw, pairs, model_config, folder: Path) -> AdapterConfig:
  """What the tensors and PEFT's config say, in our terms."""
  problems = [f"{name}={raw[name]}" for name in _MUST_BE_UNSET if raw.get(name)]
  for name, plain in (
    ("peft_type", ("LORA",)),
    ("bias", ("none", None)),
    ("init_lora_weights", _PLAIN_INITS),
    ("rank_pattern", ({}, None)),
    ("alpha_pattern", ({}, None)),
  ):
    if raw.get(name, plain[0]) not in plain:
      problems.append(f"{name}={raw[name]!r}")
  ranks = {pair["A"].shape[0] for layers in pairs.values() for pair in layers.values()}
  depths = {tuple(sorted(layers)) for layers in pairs.values()}
  total = model_config.num_layers
  top = tuple(range(total - len(next(iter(depths))), total))
  if len(ranks) > 1:
    problems.append(f"several ranks, {sorted(ranks)}")
  if depths != {top}:
    problems.append(f"layers {sorted(depths)}, not the top ones of {total} alike")
  if problems:
    raise UserError(f"{folder}: this adapter is not supported: {'; '.join(problems)}")
  projections = FAMILIES[model_config.family].PROJECTIONS
  rank = ranks.pop()
  divisor = math.sqrt(rank) if raw.get("use_rslora") else rank
  return AdapterConfig(
    rank=rank,
    scale=raw["lora_alpha"] / divisor,
    targets=tuple(
      p.split("/")[1] for p, (name, _, _) in projections.items() if name in pairs
    ),
    layers=len(top) % total,
  )


def _split(pairs, config: AdapterConfig, model_config, *, shared: bool):
  """{'attention/query/down': [k, D, r], …} from their pairs.

  `shared`: the projections of one fused layer have all of A in common, where ours
  have rows of their own.
  """
  layers = config.num_layers(model_config.num_layers)
  indices = range(model_config.num_layers - layers, model_config.num_layers)
  flat = {}
  modules = _modules(FAMILIES[model_config.family], config.targets)
  for name, slices in modules.items():
    a = np.stack([pairs[name][layer]["A"] for layer in indices])
    b = np.stack([pairs[name][layer]["B"] for layer in indices])
    width = b.shape[1] // slices[0].parts
    for number, piece in enumerate(slices):
      start = 0 if shared else number * config.rank
      rank = slice(start, start + config.rank)
      out = slice(piece.part * width, (piece.part + 1) * width)
      flat[f"{piece.path}/down"] = a[:, rank].swapaxes(1, 2)
      flat[f"{piece.path}/up"] = b[:, out, rank].swapaxes(1, 2)
  return flat
