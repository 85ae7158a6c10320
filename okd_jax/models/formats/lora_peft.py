"""LoRA pairs as PEFT's tensors, both ways.

PEFT adds (lora_alpha / r) B A x to a layer's output: A is our `down` and B our `up`,
both transposed, and lora_alpha / r is our scale.

GPT-2 computes query, key and value in one layer, `c_attn`, where we have three, each
with its own pair of rank r. On `c_attn` n of our pairs are exactly one pair of rank
n r, each B in the rows of its own slice and zeros elsewhere:

    A = [A_query; A_value]    B = [[B_query, 0], [0, 0], [0, B_value]]

The header of our safetensors file says that a pair is made like this, so that it is
split again on the way in. Elsewhere made adapters have one pair for all of `c_attn`:
there query, key and value each get all of A and their own slice of B.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import safetensors
from flax import traverse_util
from jaxtyping import Float

from okd_jax.errors import UserError
from okd_jax.models.adapters import Lora
from okd_jax.models.adapters.base import Tree
from okd_jax.models.bounds import number, shown
from okd_jax.models.config import ModelConfig
from okd_jax.models.formats.families import Family, family_of
from okd_jax.models.formats.weights import listing, parameter_shapes

Flat = dict[str, np.ndarray]  # 'attention/query/down' to its array
Pair = tuple[
  Float[np.ndarray, "D _"], Float[np.ndarray, "_ _"]
]  # down [D, r], up [r, H]
Parsed = dict[str, dict[int, dict[str, np.ndarray]]]

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
_ALPHA = 8  # PEFT's lora_alpha where the file names none
_ALPHAS = number(-1e6, 1e6)
_PATTERN, _STARS = re.compile(r"(?:[\w.^$-]|\\\.|\.\*){1,200}"), 4
# Other ways to initialise also change the base weights.
_PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva")


@dataclasses.dataclass(frozen=True)
class _Slice:
  """One of our projections within a layer of theirs.

  path: 'attention/query'.
  start, stop: its columns in their layer's output.
  width: of their whole output.
  """

  path: str
  start: int
  stop: int
  width: int

  @property
  def target(self) -> str:
    """The name that `Lora.targets` has for it."""
    return self.path.split("/")[1]


def to_peft(tree: Tree, adapter: Lora, model_config: ModelConfig) -> tuple:
  """A module in PEFT's terms, one of the formats of `peft`.

  Args:
    tree: the collection `adapter`, known to be the one that the model asks for.
    adapter: what it is.
    model_config: the teacher's.

  Returns:
    (tensors, PEFT's config without the base model's name, '').
  """
  flat = traverse_util.flatten_dict(tree["layers"], sep="/")
  flat = {key: np.asarray(leaf, np.float32) for key, leaf in flat.items()}
  family = family_of(model_config.family)
  modules = _modules(model_config, adapter.targets)
  first = adapter.trunk_layers(model_config.num_layers)
  tensors = {}
  for name, slices in modules.items():
    for layer in range(model_config.num_layers - first):
      down, up = _fuse([_pair(flat, s.path, layer) for s in slices], slices)
      key = _key(family, first + layer, name)
      tensors[f"{key}.lora_A.weight"] = np.ascontiguousarray(down.T)
      tensors[f"{key}.lora_B.weight"] = np.ascontiguousarray(up.T)
  ranks = {name: adapter.rank * len(slices) for name, slices in modules.items()}
  raw = _config_to_peft(family, ranks, adapter.scale)
  if first:
    raw["layers_to_transform"] = list(range(first, model_config.num_layers))
    raw["layers_pattern"] = family.layers
  return tensors, raw, ""


def read(
  raw: dict,
  file: safetensors.safe_open,
  ours: Lora | None,
  model_config: ModelConfig,
  path: Path,
) -> tuple[Tree, Lora]:
  """(collection `adapter`, what it is) of what `to_peft` or another wrote.

  Args:
    raw: PEFT's config.
    file: the open tensors.
    ours: what they are, where the folder is ours; None where it is another's.
    model_config: the teacher's.
    path: the file's name.

  Raises:
    UserError: the tensors do not fit the model, or are another's and use an option that
      we do not compute.
  """
  # Options first: some of them put tensors into the file that no table has.
  if ours is None and (problems := list(_option_problems(raw))):
    raise UserError(
      f"{path.parent}: this adapter is not supported: {'; '.join(problems)}"
    )
  pairs = _parse(file, family_of(model_config.family), path)
  try:
    adapter, pairs = (ours, pairs) if ours else _alike(raw, pairs, model_config, path)
    flat = _split(pairs, adapter, model_config, shared=ours is None)
  except (KeyError, ValueError) as error:
    raise UserError(f"{path} does not fit the model: {error}") from error
  return {"layers": traverse_util.unflatten_dict(flat, sep="/")}, adapter


def _modules(
  model_config: ModelConfig, targets: Iterable[str]
) -> dict[str, list[_Slice]]:
  """Their layers that hold any of our targets: {'attn.c_attn': [query, value]}."""
  modules: dict[str, list[_Slice]] = {}
  shapes = parameter_shapes(model_config)
  for path, (name, fused) in family_of(model_config.family).projections.items():
    if f"layers/{path}/kernel" not in shapes:
      continue
    widths = [shapes[f"layers/{p}/kernel"].shape[-1] for p in fused]
    index = fused.index(path)
    start, stop = sum(widths[:index]), sum(widths[: index + 1])
    if (piece := _Slice(path, start, stop, sum(widths))).target in targets:
      modules.setdefault(name, []).append(piece)
  return modules


def _key(family: Family, layer: int, name: str) -> str:
  return f"base_model.model.{family.prefix}{family.layers}.{layer}.{name}"


def _pair(flat: Flat, path: str, layer: int) -> Pair:
  return flat[f"{path}/down"][layer], flat[f"{path}/up"][layer]


def _fuse(pairs: Sequence[Pair], slices: list[_Slice]) -> Pair:
  """One (down [D, n r], up [n r, width]) from n pairs, each in its own columns."""
  ups = []
  for (_, up), piece in zip(pairs, slices, strict=True):
    wide = np.zeros((up.shape[0], piece.width), up.dtype)
    wide[:, piece.start : piece.stop] = up
    ups.append(wide)
  return np.concatenate([down for down, _ in pairs], -1), np.concatenate(ups)


def _config_to_peft(family: Family, ranks: dict[str, int], scale: float) -> dict:
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
    "fan_in_fan_out": family.fan_in_fan_out,
    "target_modules": sorted(names.values()),
    "rank_pattern": patterns,
    "alpha_pattern": {name: scale * r for name, r in patterns.items()},
  }


def _short(family: Family, name: str) -> str:
  """The last part of a layer's name, or all where two layers share it ('c_proj')."""
  last = name.split(".")[-1]
  names = {other for other, _ in family.projections.values()}
  return last if sum(n.split(".")[-1] == last for n in names) == 1 else name


def _parse(file: safetensors.safe_open, family: Family, path: Path) -> Parsed:
  """{'attn.c_attn': {layer: {'A': array, 'B': array}}} of a safetensors file."""
  names = {name for name, _ in family.projections.values()}
  pattern = re.compile(
    rf"base_model\.model\.(?:{re.escape(family.prefix)})?{family.layers}\.([0-9]{{1,6}})\."
    rf"({'|'.join(map(re.escape, names))})\.lora_([AB])\.weight"
  )
  pairs, unknown = {}, []
  for key in file.keys():
    if found := pattern.fullmatch(key):
      layer = pairs.setdefault(found[2], {}).setdefault(int(found[1]), {})
      layer[found[3]] = file.get_tensor(key).astype(np.float32)
    else:
      unknown.append(key)
  empty = [key for key in file.keys() if 0 in file.get_slice(key).get_shape()]
  if empty:
    raise UserError(
      f"{path}: {empty[0]} is empty, as DeepSpeed's ZeRO stage 3 leaves it; save the "
      "adapter again with stage3_gather_16bit_weights_on_model_save"
    )
  flat = [key for key in file.keys() if len(file.get_slice(key).get_shape()) != 2]
  halves = [
    f"{name} of layer {layer}"
    for name, layers in pairs.items()
    for layer, pair in layers.items()
    if len(pair) != 2
  ]
  problems = [
    *listing("tensors that no such model has", unknown),
    *listing("only one of A and B", halves),
    *listing("no matrices", flat),
  ]
  if problems or not pairs:
    raise UserError(f"{path}: {'; '.join(problems) or 'there is no LoRA in it'}")
  return pairs


def _alike(
  raw: dict, pairs: Parsed, model_config: ModelConfig, path: Path
) -> tuple[Lora, Parsed]:
  """Another's pairs in our terms: one rank and scale, all layers from the lowest up.

  What a pair lacks of the largest rank is filled with zeros, and so are the layers
  between that have none: neither adds anything. A scale of its own goes into B.
  """
  family, total = family_of(model_config.family), model_config.num_layers
  numbers = {i for layers in pairs.values() for i in layers}
  if beyond := sorted(i for i in numbers if i >= total):
    raise UserError(f"{path} adapts layer {beyond[-1]}, but the model has {total}")
  scales = {
    (name, i): _scale(raw, f"{family.prefix}{family.layers}.{i}.{name}", pair)
    for name, layers in pairs.items()
    for i, pair in layers.items()
  }
  scale = max(scales.values()) if len({*scales.values()}) == 1 else 1.0
  rank = max(
    pair["A"].shape[0] for layers in pairs.values() for pair in layers.values()
  )
  first = min(numbers)
  alike: Parsed = {}
  for name, layers in pairs.items():
    some, alike[name] = next(iter(layers.values())), {}
    for i in range(first, total):
      a, b = np.zeros((rank, some["A"].shape[1])), np.zeros((some["B"].shape[0], rank))
      if i in layers:
        own = layers[i]["A"].shape[0]
        a[:own], b[:, :own] = layers[i]["A"], layers[i]["B"]
        b *= scales[name, i] / scale
      alike[name][i] = {"A": a.astype(np.float32), "B": b.astype(np.float32)}
  targets = tuple(
    p.split("/")[1] for p, (name, _) in family.projections.items() if name in pairs
  )
  layers = (total - first) % total
  return Lora(rank=rank, scale=scale, targets=targets, layers=layers), alike


def _scale(raw: dict, module: str, pair: dict[str, np.ndarray]) -> float:
  """By what PEFT multiplies B A x in this module of theirs."""
  alpha = raw.get("lora_alpha", _ALPHA)
  for pattern, value in (raw.get("alpha_pattern") or {}).items():
    # Names, perhaps with .* in them: of any regular expression the search may not end.
    if not (_PATTERN.fullmatch(pattern) and pattern.count("*") <= _STARS):
      raise UserError(f"alpha_pattern names {pattern!r}, which is not supported")
    if not _ALPHAS.fits(value):
      raise UserError(f"alpha_pattern.{pattern}={shown(value)} must be {_ALPHAS}")
    if re.match(rf"(.*\.)?({pattern})$", module):
      alpha = value
      break
  rank = pair["A"].shape[0]
  return float(alpha) / (math.sqrt(rank) if raw.get("use_rslora") else rank)


def _option_problems(raw: dict) -> Iterator[str]:
  """PEFT's options that we do not compute."""
  yield from (f"{name}={raw[name]}" for name in _MUST_BE_UNSET if raw.get(name))
  for name, plain in (
    ("peft_type", ("LORA",)),
    ("bias", ("none", None)),
    ("init_lora_weights", _PLAIN_INITS),
  ):
    if raw.get(name, plain[0]) not in plain:
      yield f"{name}={raw[name]!r}"


def _split(
  pairs: Parsed, adapter: Lora, model_config: ModelConfig, *, shared: bool
) -> Flat:
  """{'attention/query/down': [k, D, r], …} from their pairs.

  `shared`: the projections of one fused layer have all of A in common, where ours
  have rows of their own.
  """
  total = model_config.num_layers
  indices = range(adapter.trunk_layers(total), total)
  flat = {}
  modules = _modules(model_config, adapter.targets)
  for name, slices in modules.items():
    a = np.stack([pairs[name][layer]["A"] for layer in indices])
    b = np.stack([pairs[name][layer]["B"] for layer in indices])
    for at, piece in enumerate(slices):
      start = 0 if shared else at * adapter.rank
      rank = slice(start, start + adapter.rank)
      out = slice(piece.start, piece.stop)
      flat[f"{piece.path}/down"] = a[:, rank].swapaxes(1, 2)
      flat[f"{piece.path}/up"] = b[:, out, rank].swapaxes(1, 2)
  return flat
