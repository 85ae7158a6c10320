"""Weight tables: how a checkpoint's tensors map onto our parameter tree.

A family is a tuple of `Weight` rows. `assemble` follows the table from tensors to
parameters, `disassemble` back, and both check the whole against the shapes that the
decoder itself asks for before they touch any data.

    layers/mlp/up/kernel  [N, in, out]  <->  N tensors layers.{}.mlp.up_proj.weight
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.typing import DTypeLike

from okd_jax.errors import UserError
from okd_jax.models.config import Field, ModelConfig
from okd_jax.models.transformer import Decoder

Put = Callable[[str, np.ndarray], jax.Array]
Params = dict[str, Any]  # by name, down to arrays: {"layers": {"mlp": {"up": …}}}

_Shapes = Mapping[str, jax.ShapeDtypeStruct]  # 'layers/mlp/up/kernel' to its shape


@dataclasses.dataclass(frozen=True)
class Weight:
  """One parameter of ours and the tensor it is stored as.

  path: our parameter, 'layers/attention/query/kernel'; under 'layers/' it is
    stacked from one tensor a layer.
  name: their tensor; '{}' stands for the layer's index.
  transpose: torch's Linear keeps [out, in] where our kernels are [in, out].
  part, parts: the tensor is a fused one; the parameter is number `part` of `parts`
    equal slices of its output axis.
  """

  path: str
  name: str
  transpose: bool = False
  part: int = 0
  parts: int = 1

  def names(self, num_layers: int) -> list[str]:
    """The tensors that this parameter is made of, bottom layer first."""
    if not self.path.startswith("layers/"):
      return [self.name]
    return [self.name.format(layer) for layer in range(num_layers)]


def parameter_shapes(config: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
  """What the decoder asks for: 'layers/attention/query/kernel' to its shape."""
  tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  tree = jax.eval_shape(Decoder(config).init, jax.random.key(0), tokens)["params"]
  return traverse_util.flatten_dict(tree, sep="/")


def assemble(
  config: ModelConfig,
  table: Iterable[Weight],
  shapes: Mapping[str, tuple[int, ...]],
  read: Callable[[str], np.ndarray],
  put: Put,
  *,
  dtype: DTypeLike,
  where: str,
) -> Params:
  """Builds the parameter tree from a checkpoint, one parameter at a time.

  Args:
    shapes: every tensor in the checkpoint and its shape.
    read: fetches one tensor.
    put: places a finished parameter, given its path, on its device or devices.
    dtype: what the parameters become.
    where: the checkpoint's name, for the error.

  Raises:
    UserError: naming every missing, unexpected and misshapen tensor.
  """
  wanted = parameter_shapes(config)
  rows = _rows(table, wanted)
  _check(config, rows, wanted, shapes, where)
  params = {}
  for row in rows:
    stacked = np.empty(wanted[row.path].shape, dtype)
    slots = stacked if row.path.startswith("layers/") else stacked[None]
    for slot, name in zip(slots, row.names(config.num_layers), strict=True):
      slot[...] = _ours(row, read(name))
    params[row.path] = put(row.path, stacked)
  return traverse_util.unflatten_dict(params, sep="/")


def disassemble(
  config: ModelConfig, table: Iterable[Weight], params: Params, *, dtype: DTypeLike
) -> dict[str, np.ndarray]:
  """The checkpoint's tensors, by name: the way back from `assemble`.

  Raises:
    UserError: where the tree is not the one that `config` describes.
  """
  wanted = parameter_shapes(config)
  flat = traverse_util.flatten_dict(params, sep="/")
  _check_tree(wanted, flat)
  pieces: dict[str, list[np.ndarray]] = {}
  transposed = set()
  for row in _rows(table, wanted):
    array = np.asarray(flat[row.path]).astype(dtype)
    slots = array if row.path.startswith("layers/") else array[None]
    for slot, name in zip(slots, row.names(config.num_layers), strict=True):
      pieces.setdefault(name, []).append(slot)
      if row.transpose:
        transposed.add(name)
  fused = {name: np.concatenate(parts, -1) for name, parts in sorted(pieces.items())}
  return {
    name: np.ascontiguousarray(tensor.T) if name in transposed else tensor
    for name, tensor in fused.items()
  }


def listing(kind: str, items: Iterable[object]) -> list[str]:
  """['kind: a, b'], or nothing where there are no items; for error messages."""
  text = ", ".join(str(item) for item in items)
  return [f"{kind}: {text}"] if text else []


def require(config: ModelConfig, **fields: Field) -> None:
  """Raises a UserError unless each field of `config` has the value given here."""
  wrong = [
    f"{name}={getattr(config, name)!r} where it needs {value!r}"
    for name, value in fields.items()
    if getattr(config, name) != value
  ]
  if wrong:
    raise UserError(
      f"the {config.family} layout cannot hold this model: {'; '.join(wrong)}"
    )


def _rows(table: Iterable[Weight], wanted: _Shapes) -> list[Weight]:
  """The rows that this config uses: biases and heads come and go with it."""
  rows = [row for row in table if row.path in wanted]
  if uncovered := set(wanted) - {row.path for row in rows}:
    raise KeyError(f"the weight table lacks {sorted(uncovered)}")
  return rows


def _check(
  config: ModelConfig,
  rows: Sequence[Weight],
  wanted: _Shapes,
  shapes: Mapping[str, tuple[int, ...]],
  where: str,
) -> None:
  needed = {}
  for row in rows:
    shape = wanted[row.path].shape
    shape = shape[1:] if row.path.startswith("layers/") else shape
    for name in row.names(config.num_layers):
      needed[name] = _theirs(row, shape)
  problems = [
    *listing("missing", (name for name in needed if name not in shapes)),
    *listing("unexpected", (name for name in shapes if name not in needed)),
    *listing(
      "misshapen",
      (
        f"{name} {list(shapes[name])} instead of {list(shape)}"
        for name, shape in needed.items()
        if name in shapes and tuple(shapes[name]) != shape
      ),
    ),
  ]
  if problems:
    raise UserError(
      f"{where}: the tensors are not those that its configuration describes; "
      + "; ".join(problems)
    )


def _check_tree(
  wanted: _Shapes, flat: Mapping[str, jax.Array | np.ndarray | jax.ShapeDtypeStruct]
) -> None:
  problems = [
    *listing("missing", sorted(set(wanted) - set(flat))),
    *listing("unexpected", sorted(set(flat) - set(wanted))),
    *listing(
      "misshapen",
      (
        f"{path} {list(flat[path].shape)} instead of {list(wanted[path].shape)}"
        for path in sorted(set(wanted) & set(flat))
        if flat[path].shape != wanted[path].shape
      ),
    ),
  ]
  if problems:
    raise UserError(
      "the parameters are not those that the configuration describes; "
      + "; ".join(problems)
    )


def _ours(row: Weight, tensor: np.ndarray) -> np.ndarray:
  tensor = tensor.T if row.transpose else tensor
  width = tensor.shape[-1] // row.parts
  return tensor[..., row.part * width : (row.part + 1) * width]


def _theirs(row: Weight, shape: tuple[int, ...]) -> tuple[int, ...]:
  """The shape of the stored tensor, given that of one layer's parameter."""
  shape = (*shape[:-1], shape[-1] * row.parts)
  return shape[::-1] if row.transpose else shape
