"""Weight tables: how a checkpoint's tensors map onto our parameter tree.

A family is a tuple of `Weight` rows. `assembly` follows the table both ways, and checks
all against the shapes that the decoder itself asks for before it touches any data.

    layers/mlp/up/kernel  [N, in, out]  <->  N tensors layers.{}.mlp.up_proj.weight
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from okd_jax.errors import UserError
from okd_jax.models.config import Field, ModelConfig
from okd_jax.models.transformer import Decoder

Params = dict[str, Any]  # by name, down to arrays: {"layers": {"mlp": {"up": …}}}

Shapes = Mapping[str, jax.ShapeDtypeStruct]  # 'layers/mlp/up/kernel' to its shape


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
_FEW = 10_000  # tensors
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


def used_rows(table: Iterable[Weight], wanted: Shapes) -> list[Weight]:
  """The rows that this config uses: biases and heads come and go with it."""
  rows = [row for row in table if row.path in wanted]
  if uncovered := set(wanted) - {row.path for row in rows}:
    raise KeyError(f"the weight table lacks {sorted(uncovered)}")
  return rows


def check_tensors(
  rows: Sequence[Weight],
  wanted: Shapes,
  shapes: Mapping[str, tuple[int, ...]],
  where: str,
  first: int,
) -> None:
  """Compares a checkpoint's tensors with those that its configuration describes.

  first: the number of the first layer that is wanted.

  Raises:
    UserError: naming every missing, unexpected and misshapen tensor.
  """
  _check_count(rows, wanted, len(shapes), where)
  needed = {}
  for row in rows:
    theirs = stored_shape(row, wanted)
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


def _check_count(
  rows: Iterable[Weight], wanted: Shapes, there: int, where: str
) -> None:
  """Raises a UserError for more tensors than anybody would name one by one."""
  count = sum(math.prod(wanted[r.path].shape[: r.stacked]) for r in rows)
  if count > 4 * max(there, _FEW):  # too many to name
    raise UserError(
      f"{where}: its configuration describes {count:,} tensors, and it holds {there:,}"
    )


def check_tree(
  wanted: Shapes, flat: Mapping[str, jax.Array | np.ndarray | jax.ShapeDtypeStruct]
) -> None:
  """Compares parameters by path with the shapes that a decoder asks for.

  Raises:
    UserError: naming every missing, unexpected and misshapen parameter.
  """
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


def columns_of(row: Weight, wanted: Shapes) -> slice:
  """Which part of a tensor's output axis is the parameter's."""
  if not row.fused:
    return slice(None)
  before = row.fused[: row.fused.index(row.path)]
  start = sum(wanted[path].shape[-1] for path in before)
  return slice(start, start + wanted[row.path].shape[-1])


def stored_shape(row: Weight, wanted: Shapes) -> tuple[int, ...]:
  """The shape of each of the stored tensors."""
  shape = wanted[row.path].shape[row.stacked :]
  width = sum(wanted[path].shape[-1] for path in row.fused or (row.path,))
  shape = (*shape[:-1], width)
  shape = (shape[0] + row.skip, *shape[1:])
  return shape[::-1] if row.transpose else shape
