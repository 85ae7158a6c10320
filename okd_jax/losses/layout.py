"""The positions of a batch in chunks, those that count first.

Each device keeps its own rows: they are one group, laid out by itself, so that no
position ever moves to another device.
"""

import functools
import math
from collections.abc import Hashable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, PyTree, Shaped

Name = Hashable  # of a model: 'student', or whatever its loss knows it by
Labels = PyTree[Shaped[Array | np.ndarray, "B L ..."]]
# (hidden states by model, each of its own width, labels, weights) of some positions,
# a table of them: XLA on a CPU divides its rows among the cores.
Hidden = dict[Name, Float[Array, "_ _ _"]]
Chunk = tuple[Hidden, PyTree[Shaped[Array, "T C ..."]], Float[Array, "T C"]]
Chunks = tuple[
  dict[Name, Float[Array, "N T C _"]],
  PyTree[Shaped[Array, "N T C ..."]],
  Float[Array, "N T C"],
]

_TALL = 8  # rows of the table, of each device's positions

# Of the mesh, which the rows of a batch and which a vocabulary are divided by.
_ROW_AXES, _VOCABULARY_AXIS = ("data", "fsdp"), "tensor"


def counting_first(
  hidden: Mapping[Name, Float[Array, "B L _"]],
  labels: Labels,
  weights: Float[Array | np.ndarray, "B L"],
  size: int,
) -> tuple[Chunks, Int[Array, ""], Int[Array, "G M"]]:
  """The positions that count, before all others, in chunks.

  Those of one device's rows are one group, so that short rows and long prompts leave
  no gaps: of padding and prompts hardly any logit is ever computed.

  Args:
    size: positions of each group in a chunk.

  Returns:
    ((hidden states, labels, weights) [chunks, T, C, …], how many chunks have a
    position that counts, places [G, M]: where each one went).
  """
  shards, tall = row_shards(len(weights)), math.gcd(size, _TALL)
  group = functools.partial(_grouped, shards=shards)
  counts = group(weights) != 0
  order, places = partition(counts)

  def lay_out(x: Shaped[Array, "B L ..."]) -> Shaped[Array, "N T C ..."]:
    x = cut(_pick(group(x), order), size)
    x = x.reshape(-1, shards * tall, size // tall, *x.shape[3:])
    return placed(x, rows=1)

  # Where nothing counts the logits are made 0: no NaN there can reach a gradient.
  hidden = {
    name: jnp.where(weights[..., None] != 0, h, 0) for name, h in hidden.items()
  }
  chunks = jax.tree.map(lay_out, (hidden, labels, weights))
  return chunks, -(-counts.sum(1).max() // size), places


def partition(
  first: Bool[Array | np.ndarray, "G M"],
) -> tuple[Int[Array, "G M"], Int[Array, "G M"]]:
  """A stable partition: those that are `first` before all others, both in their order.

  A stable argsort says the same, but a TPU's compiler took 12 seconds for one of 4096
  values and did not finish one of 8192.

  Returns:
    (order: which one stands at each place, places: where each one stands).

  >>> order, places = partition(jnp.array([[False, True, False, True]]))
  >>> print(order, places)
  [[1 3 0 2]] [[2 0 3 1]]
  """
  ahead, behind = (jnp.cumsum(x, axis=1, dtype=jnp.int32) for x in (first, ~first))
  places = jnp.where(first, ahead, ahead[:, -1:] + behind) - 1
  index = jnp.arange(first.shape[1], dtype=jnp.int32)

  def invert(places: Int[Array, " M"]) -> Int[Array, " M"]:
    return index.at[places].set(index, unique_indices=True, mode="promise_in_bounds")

  return jax.vmap(invert)(places), places


def chunk_at(chunks: Chunks, i: Int[Array, ""] | int) -> Chunk:
  """Chunk number i."""
  return jax.tree.map(lambda x: x[i], chunks)


def put_back(
  chunks: Float[Array, "N T C D"], places: Int[Array, "G M"], shape: tuple[int, ...]
) -> Float[Array, "_ _ D"]:
  """[chunks, T, C, …] to [B, L, …], each value from where `places` says it went."""
  groups, length = places.shape
  joined = join(chunks.reshape(len(chunks), groups, -1, *chunks.shape[3:]), length)
  return _pick(joined, places).reshape(shape)


def cut(x: Shaped[Array, "G N ..."], size: int) -> Shaped[Array, "chunks G C ..."]:
  """[G, N, …] to [chunks, G, C, …]; the last chunk is filled with zeros."""
  groups, length = x.shape[:2]
  count = -(-length // size)
  pad = [(0, 0), (0, count * size - length)] + [(0, 0)] * (x.ndim - 2)
  x = jnp.pad(x, pad).reshape(groups, count, size, *x.shape[2:])
  return jnp.moveaxis(x, 1, 0)


def join(
  chunks: Shaped[Array, "chunks G C ..."], length: int
) -> Shaped[Array, "G _ ..."]:
  """The way back from `cut`, to `length` positions."""
  joined = jnp.moveaxis(chunks, 0, 1)
  return joined.reshape(joined.shape[0], -1, *joined.shape[3:])[:, :length]


def row_shards(rows: int) -> int:
  """How many devices share the rows; 1 where that does not come out even."""
  shards = _row_ways()
  return 1 if rows % shards else shards


def vocabulary_shards() -> int:
  """How many devices share a vocabulary."""
  return jax.sharding.get_abstract_mesh().shape.get(_VOCABULARY_AXIS, 1)


def placed(
  x: Shaped[Array, "..."], rows: int | None = None, vocabulary: int | None = None
) -> Shaped[Array, "..."]:
  """`x` divided along these axes as rows and vocabularies are, whole along all others.

  Args:
    rows: the axis of groups of rows, or of what is made of them; where nobody shares
      the rows, the compiler may divide it as it likes.
    vocabulary: that of equal shares of a vocabulary.
  """
  mesh, spec = jax.sharding.get_abstract_mesh().shape, [None] * x.ndim
  axes = tuple(axis for axis in _ROW_AXES if axis in mesh)
  if rows is not None and axes:
    spec[rows] = (
      axes if not x.shape[rows] % _row_ways() else PartitionSpec.UNCONSTRAINED
    )
  if vocabulary is not None and _VOCABULARY_AXIS in mesh:
    spec[vocabulary] = _VOCABULARY_AXIS
  if not mesh:
    return x
  return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def _row_ways() -> int:
  mesh = jax.sharding.get_abstract_mesh().shape
  return math.prod(mesh.get(axis, 1) for axis in _ROW_AXES)


def _grouped(x: Shaped[Array, "B L ..."], shards: int) -> Shaped[Array, "G N ..."]:
  """[B, L, …] to [G, N, …]: what is on one device, or was meant to be, in one group."""
  return placed(x.reshape(shards, -1, *x.shape[2:]), rows=0)


def _pick(
  x: Shaped[Array, "G N ..."], places: Int[Array, "G N"]
) -> Shaped[Array, "G N ..."]:
  """The values of each group at its `places`, [G, N, …] at [G, N]."""
  return jax.vmap(lambda group, places: group[places])(x, places)
