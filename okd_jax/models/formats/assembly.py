"""From a checkpoint's tensors to our parameters and back, as a family's table says.

Both ways go tensor by tensor and part by part: what one process needs of one parameter
is all that is in its memory at once.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol, runtime_checkable

import jax
import numpy as np
from flax import traverse_util
from jax.sharding import Sharding
from jax.typing import DTypeLike

from okd_jax.models import int8
from okd_jax.models.config import ModelConfig
from okd_jax.models.formats import parts
from okd_jax.models.formats.parts import Bounds, Where
from okd_jax.models.formats.weights import (
  Params,
  Shapes,
  Weight,
  check_tensors,
  check_tree,
  columns_of,
  parameter_shapes,
  stored_shape,
  used_rows,
)


@runtime_checkable
class Source(Protocol):
  """A checkpoint that parameters are read from.

  name: for errors; shapes: of every tensor in it.
  whole: whether a part of a tensor costs as much as all of it.
  """

  name: str
  whole: bool
  shapes: Mapping[str, tuple[int, ...]]

  def read(self, name: str, bounds: Bounds) -> np.ndarray:
    """What of a tensor lies within the bounds."""


def assemble(
  config: ModelConfig,
  table: Iterable[Weight],
  source: Source,
  *,
  dtype: DTypeLike,
  where: Where,
  quantize: bool = False,
  layers: range | None = None,
) -> Params:
  """Builds the parameter tree from a checkpoint, one parameter's part at a time.

  Args:
    source: the checkpoint.
    dtype: what the parameters become.
    where: places a parameter, given its path and shape.
    quantize: makes the layers' kernels int8 (`models.int8`).
    layers: builds that part of the tree alone; an empty range is all but the layers.

  Raises:
    UserError: naming every missing, unexpected and misshapen tensor.
  """
  first = layers.start if layers else 0
  wanted = parameter_shapes(config.of_layers(layers) if layers else config)
  rows, shapes = used_rows(table, wanted), source.shapes
  if layers is not None:
    rows = [row for row in rows if row.path.startswith("layers/") == bool(layers)]
    names = [n for row in rows for n in row.names(wanted[row.path].shape, first)]
    shapes = {name: shapes[name] for name in names if name in shapes}
  check_tensors(rows, wanted, shapes, source.name, first)
  params = {}
  for row in rows:
    read = functools.partial(_read, row, wanted, source, first)
    shape = wanted[row.path].shape
    if quantize and int8.applies(row.path):
      params |= _quantized(row.path, shape, read, where)
    else:
      stack = _whole_tensors if source.whole else _stacked
      params[row.path] = stack(shape, read, where(row.path, shape), dtype)
  return traverse_util.unflatten_dict(params, sep="/")


# (bounds in a parameter) -> of each of its tensors the place, and what lies within
_Read = Callable[[Bounds], Iterator[tuple[tuple[int, ...], np.ndarray]]]


def _read(
  row: Weight, wanted: Shapes, source: Source, first: int, bounds: Bounds
) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
  """Of each tensor its place in the part, and what of it lies there, [in, out]."""
  shape, columns = wanted[row.path].shape, columns_of(row, wanted)
  stack, inner = bounds[: row.stacked], list(bounds[row.stacked :])
  before = columns.start or 0
  inner[-1] = (inner[-1][0] + before, inner[-1][1] + before)
  inner = inner[::-1] if row.transpose else inner
  inner[0] = (inner[0][0] + row.skip, inner[0][1] + row.skip)
  names = row.names(shape, first)
  for at, name in zip(np.ndindex(shape[: row.stacked]), names, strict=True):
    if all(start <= i < stop for i, (start, stop) in zip(at, stack, strict=True)):
      tensor = source.read(name, tuple(inner))
      place = tuple(i - start for i, (start, _) in zip(at, stack, strict=True))
      yield place, tensor.T if row.transpose else tensor


def _stacked(
  shape: tuple[int, ...], read: _Read, where: Sharding, dtype: DTypeLike
) -> jax.Array:
  """Part by part, of which one alone is in host memory."""

  def make(bounds: Bounds) -> np.ndarray:
    part = np.empty(parts.sizes(bounds), dtype)
    for i, tensor in read(bounds):
      part[i] = tensor
    return part

  return parts.place(shape, where, make)


def _whole_tensors(
  shape: tuple[int, ...], read: _Read, where: Sharding, dtype: DTypeLike
) -> jax.Array:
  """Tensor by tensor, each read once for all parts."""
  filled = _zeros(shape, where, dtype)
  for i, tensor in read(_all(shape)):
    _fill(filled, i, tensor)
  return parts.place(shape, where, filled.__getitem__)


def _quantized(
  path: str, shape: tuple[int, ...], read: _Read, where: Where
) -> dict[str, jax.Array]:
  """Rounded tensor by tensor: the whole is never there in floats.

  A channel's scale is that of all its inputs, so each tensor is read whole, once for
  all parts.
  """
  scales = path.removesuffix("kernel") + int8.SCALE
  of_scales = (*shape[:-2], shape[-1])
  places = {path: where(path, shape), scales: where(scales, of_scales)}
  kernel = _zeros(shape, places[path], np.int8)
  scale = _zeros(of_scales, places[scales], np.float32)
  for i, tensor in read(_all(shape)):
    for filled, values in zip((kernel, scale), int8.quantize(tensor), strict=True):
      _fill(filled, i, values)
  return {
    path: parts.place(shape, places[path], kernel.__getitem__),
    scales: parts.place(of_scales, places[scales], scale.__getitem__),
  }


def _all(shape: tuple[int, ...]) -> Bounds:
  return tuple((0, size) for size in shape)


def _zeros(
  shape: tuple[int, ...], where: Sharding, dtype: DTypeLike
) -> dict[Bounds, np.ndarray]:
  own = parts.own_parts(shape, where)
  return {bounds: np.zeros(parts.sizes(bounds), dtype) for bounds in own}


def _fill(
  arrays: Mapping[Bounds, np.ndarray], at: tuple[int, ...], values: np.ndarray
) -> None:
  """Puts one tensor into the parts that have some of it."""
  for bounds, array in arrays.items():
    stack = bounds[: len(at)]
    if all(start <= i < stop for i, (start, stop) in zip(at, stack, strict=True)):
      inner = tuple(slice(*each) for each in bounds[len(at) :])
      place = tuple(i - start for i, (start, _) in zip(at, stack, strict=True))
      array[place] = values[inner]


def disassemble(
  config: ModelConfig, table: Iterable[Weight], params: Params, *, dtype: DTypeLike
) -> Iterator[tuple[str, np.ndarray]]:
  """The checkpoint's tensors, by name: the way back from `assemble`.

  One after the other is fetched from the devices; of arrays that are spread over
  processes all of them walk through.

  Raises:
    UserError: at once, where the tree is not the one that `config` describes.
  """
  wanted = parameter_shapes(config)
  flat = traverse_util.flatten_dict(params, sep="/")
  check_tree(wanted, flat)
  pieces: dict[str, list[tuple[Weight, tuple[int, ...]]]] = {}
  for row in used_rows(table, wanted):
    shape = wanted[row.path].shape
    places = np.ndindex(shape[: row.stacked])
    for name, place in zip(row.names(shape), places, strict=True):
      pieces.setdefault(name, []).append((row, place))
  return ((name, _joined(flat, pieces[name], dtype)) for name in sorted(pieces))


def _joined(
  flat: Mapping[str, jax.Array | np.ndarray],
  pieces: Sequence[tuple[Weight, tuple[int, ...]]],
  dtype: DTypeLike,
) -> np.ndarray:
  """The tensor that one or several parameters are a part of, as it is stored."""
  found = []
  for row, place in pieces:
    tensor = parts.fetch(flat[row.path], place).astype(dtype)
    if row.skip:
      tensor = np.concatenate([np.zeros_like(tensor[: row.skip]), tensor])
    found.append(tensor)
  tensor = np.concatenate(found, -1) if len(found) > 1 else found[0]
  transposed = any(row.transpose for row, _ in pieces)
  return np.ascontiguousarray(tensor.T) if transposed else tensor


def stored_shapes(
  config: ModelConfig, table: Iterable[Weight]
) -> dict[str, tuple[int, ...]]:
  """The shapes of what `disassemble` gives, by name and in its order."""
  wanted, found = parameter_shapes(config), {}
  for row in used_rows(table, wanted):
    theirs = stored_shape(row, wanted)
    found |= dict.fromkeys(row.names(wanted[row.path].shape), theirs)
  return dict(sorted(found.items()))
