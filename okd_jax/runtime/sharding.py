"""Where arrays live: a mesh of (data, fsdp, tensor) and regex rules on paths.

The model code carries no annotations. Trained, frozen and optimiser trees follow the
same rules, since an optimiser moment's path ends in its parameter's path.
"""

import functools
import math
import re
from collections.abc import Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import (
  AbstractMesh,
  AxisType,
  Mesh,
  NamedSharding,
  PartitionSpec,
  Sharding,
)
from jax.tree_util import KeyPath
from jaxtyping import Array, Float, Int, PyTree, Shaped

from okd_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
# Rows of a batch are split over every device that does not share a row's matmuls.
BATCH = PartitionSpec(("data", "fsdp"))

# Of the rules whose pattern is found in 'a/b/c', the first that comes out even holds,
# or else the last one, but for the axes that do not. The leading axis of stacked layers
# stays whole, being scanned. Whatever no rule names is replicated.
RULES: tuple[tuple[str, PartitionSpec], ...] = (
  # Virtual tokens: few, and every device needs all of them. The rules below are for
  # stacked layers, which `prompt/out/kernel` is not.
  (r"(^|/)(prompt/.+|attention/prefix_(key|value))$", PartitionSpec()),
  # By rows where it can be: a TPU's compiler scatters a sum over columns only if each
  # device gets a multiple of 128, and adds up all of it on all devices otherwise.
  (r"(^|/)(embed/embedding|head)$", PartitionSpec(("tensor", "fsdp"), None)),
  (r"(^|/)(embed/embedding|head)$", PartitionSpec("tensor", "fsdp")),
  (r"position_embed/embedding$", PartitionSpec("fsdp", None)),
  (r"position_embed/embedding$", PartitionSpec(None, "fsdp")),
  (r"(widen|narrow)/kernel$", PartitionSpec("fsdp", "tensor")),
  (r"experts_(gate|up)/kernel$", PartitionSpec(None, None, "fsdp", "tensor")),
  (r"experts_down/kernel$", PartitionSpec(None, None, "tensor", "fsdp")),
  (r"router/kernel$", PartitionSpec(None, "fsdp", None)),
  (r"(^|/)(query|key|value|gate|up)/kernel$", PartitionSpec(None, "fsdp", "tensor")),
  (r"(^|/)(out|down)/kernel$", PartitionSpec(None, "tensor", "fsdp")),
  (
    r"(^|/)(query|key|value|gate|up)/(bias|kernel_scale)$",
    PartitionSpec(None, "tensor"),
  ),
  (r"experts_\w+/kernel_scale$", PartitionSpec()),
  (r"(^|/)(out|down)/kernel_scale$", PartitionSpec(None, "fsdp")),
  (r"/down$", PartitionSpec(None, "fsdp", None)),
  (r"/up$", PartitionSpec(None, None, "fsdp")),
)


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1) -> Mesh:
  """A mesh over all devices; one size may be -1: whatever the others leave.

  Raises:
    UserError: if the sizes do not multiply to the number of devices.
  """
  sizes = np.array([data, fsdp, tensor])
  count = jax.device_count()
  wanted = ", ".join(f"mesh.{a}={s}" for a, s in zip(AXES, sizes, strict=True))
  if (sizes == -1).sum() > 1 or ((sizes < 1) & (sizes != -1)).any():
    raise UserError(f"{wanted}: sizes are at least 1, and only one may be -1")
  known = int(np.prod(sizes[sizes != -1]))
  sizes[sizes == -1] = count // known
  if np.prod(sizes) != count:
    raise UserError(f"{wanted} does not fit the {count} devices at hand")
  try:
    return jax.make_mesh(tuple(map(int, sizes)), AXES, axis_types=(AxisType.Auto,) * 3)
  except NotImplementedError as error:  # of a TPU's torus, which is cut along its axes
    why = str(error).split(".")[0]
    raise UserError(f"{wanted} does not fit the devices' topology: {why}") from error


def described(mesh: Mesh) -> str:
  """'mesh data=2 x fsdp=4', for people."""
  sizes = [f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1]
  return f"mesh {' x '.join(sizes) or 'of one device'}"


def shardings(
  tree: PyTree, mesh: Mesh | AbstractMesh, whole: bool = False
) -> PyTree[NamedSharding]:
  """A NamedSharding for every leaf (array or ShapeDtypeStruct), by its path.

  whole: whether fsdp leaves the tree whole, as it does a frozen teacher that fits.
  """
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: place(mesh, path_name(path), leaf.shape, whole), tree
  )


def spec(
  path: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh, whole: bool = False
) -> PartitionSpec:
  """What the rules say of a parameter (`RULES`); whole: without fsdp."""
  sizes = {n: s for n, s in mesh.shape.items() if not (whole and n == "fsdp")}
  found = PartitionSpec()
  for pattern, rule in RULES:
    if re.search(pattern, path) and len(shape) >= len(rule):
      axes = [_known(names, sizes) for names in rule]
      ways = [math.prod(sizes[name] for name in names) for names in axes]
      even = [size % n == 0 for size, n in zip(shape, ways, strict=False)]
      found = PartitionSpec(
        *(a if fits else () for a, fits in zip(axes, even, strict=True))
      )
      if all(even):
        break
  return found


def _known(
  names: str | tuple[str, ...] | None, sizes: Mapping[str, int]
) -> tuple[str, ...]:
  """The axes of one entry of a rule that the mesh has."""
  names = (names,) if isinstance(names, str) else names or ()
  return tuple(name for name in names if name in sizes)


def place(
  mesh: Mesh | AbstractMesh, path: str, shape: tuple[int, ...], whole: bool = False
) -> NamedSharding:
  """Where the rules put the parameter of this path and shape; whole: without fsdp."""
  return NamedSharding(mesh, spec(path, shape, mesh, whole))


def path_name(path: KeyPath) -> str:
  """'a/b/c' for a key path of jax.tree_util."""
  return jax.tree_util.keystr(path, simple=True, separator="/")


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Rows over data and fsdp."""
  return NamedSharding(mesh, BATCH)


def own_rows(count: int, mesh: Mesh) -> Int[np.ndarray, " M"]:
  """Which of a batch's `count` rows lie on this process's devices, ascending.

  Processes that the tensor axis goes across have the same rows.

  Raises:
    ValueError: if the rows do not spread evenly over the devices.
  """
  parts, ways = _own_parts(mesh), _row_ways(mesh)
  if count < 1 or count % ways:
    raise ValueError(f"{count} rows cannot be divided among {ways} devices")
  return np.concatenate([np.arange(count).reshape(ways, -1)[part] for part in parts])


def put_batch(batch: PyTree[np.ndarray], mesh: Mesh) -> PyTree[Array]:
  """The `own_rows` of a batch, any tree of arrays, as global arrays."""
  parts, ways = _own_parts(mesh), _row_ways(mesh)

  def place(rows: np.ndarray) -> Array:
    """This process's rows [m, …] as those of all [B, …]."""
    size = len(rows) // len(parts)

    def part(index: tuple[slice, ...]) -> np.ndarray:
      at = parts.index((index[0].start or 0) // size) * size
      return rows[at : at + size]

    shape = (size * ways, *rows.shape[1:])
    return jax.make_array_from_callback(shape, batch_sharding(mesh), part)

  return jax.tree.map(place, batch)


def spread(batch: PyTree[np.ndarray], where: Sharding) -> PyTree[Array]:
  """A batch that every process has whole, each device its part; nothing is sent."""
  return jax.tree.map(
    lambda x: jax.make_array_from_callback(x.shape, where, lambda index: x[index]),
    batch,
  )


def _row_ways(mesh: Mesh) -> int:
  """How many parts the rows of a batch come in."""
  return mesh.shape["data"] * mesh.shape["fsdp"]


def _own_parts(mesh: Mesh) -> list[int]:
  """Which of these lie on this process's devices, ascending."""
  places = batch_sharding(mesh).addressable_devices_indices_map((_row_ways(mesh),))
  return sorted({index[0].start or 0 for index in places.values()})


def gathered(tree: PyTree[Array]) -> PyTree[Array | np.ndarray]:
  """The tree with every array whole in this process; all processes must call it."""

  def whole(leaf: Array) -> Array | np.ndarray:
    if leaf.is_fully_addressable or leaf.is_fully_replicated:
      return leaf
    return multihost_utils.process_allgather(leaf, tiled=True)

  return jax.tree.map(whole, tree)


def whole_rows(batch_size: int, mesh: Mesh) -> int:
  """`batch_size`, rounded up to what spreads evenly over the devices."""
  ways = _row_ways(mesh)
  return -(-batch_size // ways) * ways


def check_batch(batch_size: int, microbatches: int, mesh: Mesh, group: int = 1) -> None:
  """Raises a UserError unless every micro-batch spreads evenly over the devices.

  group: rows that must stay together.
  """
  ways = _row_ways(mesh)
  if microbatches < 1 or batch_size % (microbatches * ways * group):
    groups = f" and of 1 / adapter.rows = {group}" if group > 1 else ""
    raise UserError(
      f"train.batch_size={batch_size} must be a multiple of train.microbatches="
      f"{microbatches} times the {ways} devices that rows are split over "
      f"(mesh.data x mesh.fsdp){groups}"
    )


def as_parameters(tree: PyTree[Array]) -> PyTree[Array]:
  """Inside jit: each leaf where the parameter of its path lives, if there is a mesh.

  Of gradients, so that their sum over devices is scattered, and never whole.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if not set(AXES) <= set(mesh.axis_names):
    return tree
  return jax.lax.with_sharding_constraint(tree, shardings(tree, mesh))


def with_whole_modules(tree: PyTree[Array]) -> PyTree[Array]:
  """Inside jit: the low-rank factors in it on every device, if there is a mesh.

  They are small, and gathered once they keep all layers from waiting for them.
  """
  if jax.sharding.get_abstract_mesh().empty:
    return tree

  def whole(path: KeyPath, leaf: Array) -> Array:
    small = re.search(r"/(down|up)$", path_name(path))
    return jax.lax.with_sharding_constraint(leaf, PartitionSpec()) if small else leaf

  return jax.tree_util.tree_map_with_path(whole, tree)


def by_rows(x: Shaped[Array, "B ..."]) -> Shaped[Array, "B ..."]:
  """Inside jit: `x` divided as the rows of a batch are, where they come out even.

  Without that word XLA may divide activations as the weights are, by channels, and
  then has to gather all of them to come back.
  """
  mesh = jax.sharding.get_abstract_mesh().shape
  if not set(AXES) <= set(mesh) or len(x) % (mesh["data"] * mesh["fsdp"]):
    return x
  return jax.lax.with_sharding_constraint(x, BATCH)


def with_whole_rows(
  table: Float[Array | np.ndarray, "V D"], path: str, trained: bool = True
) -> Float[Array | np.ndarray, "V D"]:
  """Inside jit: the table of this path as a lookup by rows of a batch wants it.

  Columns that lie on several devices would be looked up for all rows of the batch.
  The gradient is scattered over them before it meets another one of the same table.

  trained: whether anybody asks for that; a frozen table may lie whole already.
  """
  mesh = jax.sharding.get_abstract_mesh().shape
  if not set(AXES) <= set(mesh):
    return table
  where = functools.partial(spec, path, table.shape, jax.sharding.get_abstract_mesh())
  if trained:
    table = jax.lax.with_sharding_constraint(table, where())
  return jax.lax.with_sharding_constraint(table, where(whole=True))
