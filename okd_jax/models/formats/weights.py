"""Weight tables: how a checkpoint's tensors map onto our parameter tree.

A family is a tuple of `Weight` rows. `assemble` follows the table from tensors to
parameters, `disassemble` back, and both check the whole against the shapes that the
decoder itself asks for before they touch any data.

    layers/mlp/up/kernel  [N, in, out]  <->  N tensors layers.{}.mlp.up_proj.weight
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.typing import DTypeLike

from okd_jax.errors import UserError
from okd_jax.models import int8
from okd_jax.models.config import Field, ModelConfig
from okd_jax.models.transformer import Decoder

Put = Callable[[str, np.ndarray], jax.Array]
Params = dict[str, Any]  # by name, down to arrays: {"layers": {"mlp": {"up": …}}}

_Shapes = Mapping[str, jax.ShapeDtypeStruct]  # 'layers/mlp/up/kernel' to its shape


@dataclasses.dataclass(frozen=True)
class Weight:
  """One parameter of ours and the tensor it is stored as.

  path: our parameter, 'layers/attention/query/kernel'.
  name: their tensor; a '{}' stands for the number of the layer, a second one for that
    of the expert: the parameter is stacked from all of these tensors.
  transpose: torch's Linear keeps [out, in] where our kernels are [in, out].
  fused: all parameters that the tensor holds, one after the other on its output axis.
  skip: rows that it has before ours and that no token reads.
  """

  path: str
  name: str
  transpose: bool = False
  fused: tuple[str, ...] = ()
  skip: int = 0

  def names(self, shape: tuple[int, ...], first: int = 0) -> list[str]:
    """The tensors that the parameter of this shape is made of, bottom layer first.

    first: the number of that layer.
    """
    indices = np.ndindex(shape[: self.stacked])
    return [self.name.format(*(i[0] + first, *i[1:]) if i else ()) for i in indices]

  @property
  def stacked(self) -> int:
    """How many axes the parameter has before those of one tensor."""
    return self.name.count("{}")


_LISTED = 12  # names in one message
QKV = ("attention/query", "attention/key", "attention/value")


def linear(name: str, *paths: str, transpose: bool = True) -> tuple[Weight, ...]:
  """Rows for the kernels and biases of a layer of theirs, one or several of ours.

  name: without 'weight' and 'bias'.
  paths: without 'layers/', in the order of the tensor's outputs.
  """
  return tuple(
    Weight(
      f"layers/{path}/{ours}",
      f"{name}.{theirs}",
      transpose and ours == "kernel",
      tuple(f"layers/{p}/{ours}" for p in paths) if len(paths) > 1 else (),
    )
    for path in paths
    for ours, theirs in (("kernel", "weight"), ("bias", "bias"))
  )


def norm(path: str, name: str) -> tuple[Weight, Weight]:
  """Rows for a norm's scale and its bias, if it has one."""
  return (
    Weight(f"{path}/scale", f"{name}.weight"),
    Weight(f"{path}/bias", f"{name}.bias"),
  )


def parameter_shapes(config: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
  """What the decoder asks for: 'layers/attention/query/kernel' to its shape."""
  return dict(_parameter_shapes(config))


@functools.lru_cache(maxsize=64)
def _parameter_shapes(config: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
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
  quantize: bool = False,
  layers: range | None = None,
) -> Params:
  """Builds the parameter tree from a checkpoint, one parameter at a time.

  Args:
    shapes: every tensor in the checkpoint and its shape.
    read: fetches one tensor.
    put: places a finished parameter, given its path, on its device or devices.
    dtype: what the parameters become.
    where: the checkpoint's name, for the error.
    quantize: makes the layers' kernels int8 (`models.int8`).
    layers: builds that part of the tree alone; an empty range is all but the layers.

  Raises:
    UserError: naming every missing, unexpected and misshapen tensor.
  """
  first = layers.start if layers else 0
  wanted = parameter_shapes(config.of_layers(layers) if layers else config)
  rows = _rows(table, wanted)
  if layers is not None:
    rows = [row for row in rows if row.path.startswith("layers/") == bool(layers)]
    names = [n for row in rows for n in row.names(wanted[row.path].shape, first)]
    shapes = {name: shapes[name] for name in names if name in shapes}
  _check(rows, wanted, shapes, where, first)
  params = {}
  for row in rows:
    stack = _quantized if quantize and int8.applies(row.path) else _stacked
    for path, array in stack(row, wanted, read, first, dtype):
      params[path] = put(path, array)
  return traverse_util.unflatten_dict(params, sep="/")


_Stack = Iterator[tuple[str, np.ndarray]]  # our parameters by path


def _tensors(
  row: Weight, wanted: _Shapes, read: Callable[[str], np.ndarray], first: int
) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
  """Of each tensor its place in the parameter and our part of it, [in, out]."""
  shape, columns = wanted[row.path].shape, _columns(row, wanted)
  names = row.names(shape, first)
  for i, name in zip(np.ndindex(shape[: row.stacked]), names, strict=True):
    tensor = read(name)[row.skip :]
    yield i, (tensor.T if row.transpose else tensor)[..., columns]


def _stacked(
  row: Weight,
  wanted: _Shapes,
  read: Callable[[str], np.ndarray],
  first: int,
  dtype: DTypeLike,
) -> _Stack:
  stacked = np.empty(wanted[row.path].shape, dtype)
  for i, tensor in _tensors(row, wanted, read, first):
    stacked[i] = tensor
  yield row.path, stacked


def _quantized(
  row: Weight,
  wanted: _Shapes,
  read: Callable[[str], np.ndarray],
  first: int,
  _: DTypeLike,
) -> _Stack:
  """Rounded tensor by tensor: the whole is never there in floats."""
  shape = wanted[row.path].shape
  kernel = np.empty(shape, np.int8)
  scale = np.empty((*shape[:-2], shape[-1]), np.float32)
  for i, tensor in _tensors(row, wanted, read, first):
    kernel[i], scale[i] = int8.quantize(tensor)
  yield row.path, kernel
  yield row.path.removesuffix("kernel") + int8.SCALE, scale


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
    slots, names = _slots(row, array), row.names(array.shape)
    for slot, name in zip(slots, names, strict=True):
      if row.skip:
        slot = np.concatenate([np.zeros_like(slot[: row.skip]), slot])
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
  found = [str(item) for item in items]
  text, more = ", ".join(found[:_LISTED]), len(found) - _LISTED
  text += f" and {more} more" if more > 0 else ""
  return [f"{kind}: {text}"] if found else []


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
  rows: Sequence[Weight],
  wanted: _Shapes,
  shapes: Mapping[str, tuple[int, ...]],
  where: str,
  first: int,
) -> None:
  needed = {}
  for row in rows:
    theirs = _theirs(row, wanted)
    needed |= dict.fromkeys(row.names(wanted[row.path].shape, first), theirs)
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


def _slots(row: Weight, array: np.ndarray) -> np.ndarray:
  """The parameter as one array a tensor, in the order of their names."""
  return array.reshape(-1, *array.shape[row.stacked :])


def _columns(row: Weight, wanted: _Shapes) -> slice:
  """Which part of a tensor's output axis is the parameter's."""
  if not row.fused:
    return slice(None)
  before = row.fused[: row.fused.index(row.path)]
  start = sum(wanted[path].shape[-1] for path in before)
  return slice(start, start + wanted[row.path].shape[-1])


def _theirs(row: Weight, wanted: _Shapes) -> tuple[int, ...]:
  """The shape of each of the stored tensors."""
  shape = wanted[row.path].shape[row.stacked :]
  width = sum(wanted[path].shape[-1] for path in row.fused or (row.path,))
  shape = (*shape[:-1], width)
  shape = (shape[0] + row.skip, *shape[1:])
  return shape[::-1] if row.transpose else shape
