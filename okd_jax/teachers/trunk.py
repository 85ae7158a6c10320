"""Cached activations: the frozen trunk below the adapters, computed once for a run.

With `adapter.layers=k` only the top k layers of the teacher hold adapters, so what
enters them depends on the text alone. Kept in bfloat16, 2 D bytes a token, in memory or
on disk, it leaves k layers and the head of the teacher's work, and of its weights.
Computing it costs one pass of the trunk, so it pays from the second epoch on. Rows that
a method samples have no trunk to keep: there the teacher stays whole.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from okd_jax.config.schema import Settings
from okd_jax.data import Example
from okd_jax.data.batch import Batch
from okd_jax.data.rows import digest
from okd_jax.errors import UserError
from okd_jax.methods import Method
from okd_jax.models import Decoder, output
from okd_jax.runtime.files import local
from okd_jax.teachers import load, precompute, store

MEMORY = "memory"

_INPUTS = (
  "embed",
  "position_embed",
  "widen",
)  # what only the embedding of tokens reads


class Kept(NamedTuple):
  """What enters the adapted layers.

  train: of the training rows, by their numbers.
  eval: of the held-out rows; None where the teacher stays whole and needs none.
  """

  train: store.Store | store.Memory
  eval: store.Store | store.Memory | None

  @property
  def replaces(self) -> bool:
    """Whether it serves all rows of the run, so that the layers below may go."""
    return self.eval is not None


@runtime_checkable
class Adapted(Protocol):
  """Those of a cast that a trunk is about."""

  teachers: Mapping[str, Decoder]
  adapted: Mapping[str, Decoder]
  frozen: Mapping[str, PyTree]


@runtime_checkable
class Rows(Protocol):
  """The training rows and the held-out ones."""

  train: Sequence[Example]
  eval: Sequence[Example]


Whole = TypeVar("Whole", bound=Adapted)


def opened(method: Method, cast: Adapted, data: Rows, settings: Settings) -> Kept:
  """Where `teacher.trunk` wants the trunk kept, empty or not.

  Raises:
    UserError: if there is no such trunk, or the folder holds another.
  """
  where, start = settings.teacher.trunk, _layers(cast)
  if not start:
    raise UserError(
      f"teacher.trunk={where}: no layer is below the adapters; set adapter.layers to "
      "fewer than the teacher has"
    )
  if where == MEMORY and jax.process_count() > 1:
    raise UserError(
      "teacher.trunk=memory is for one process; name a folder that all can read"
    )

  def begun(rows: Sequence[Example], *folder: str) -> store.Store | store.Memory:
    if where == MEMORY:
      return store.Memory(len(rows), " ".join(["trunk", *folder]))
    about = load.teacher_key(settings, rows)
    about |= {"layers": start} | load.dtypes(settings)
    return store.begin(local(where).joinpath(*folder), len(rows), about)

  train = begun(data.train)
  if _needs_all(method, cast):
    return Kept(train, None)
  # Runs that share the training rows may hold out different ones.
  name = f"eval-{digest(data.eval)[:8]}"
  return Kept(train, begun(data.eval, name))


def complete(
  cast: Adapted,
  data: Rows,
  settings: Settings,
  mesh: Mesh,
  kept: Kept,
  heard: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Kept:
  """What `opened` gave, with all rows; `heard` as in `precompute.fill`."""
  [(name, decoder)] = cast.teachers.items()
  start = _layers(cast)

  def below(frozen: PyTree, batch: Batch) -> dict[str, Array]:
    hidden = output(decoder, {"params": frozen}, batch, stop=start).hidden
    return {"hidden": hidden.astype(jnp.bfloat16)}

  for rows, part in ((data.train, kept.train), (data.eval, kept.eval)):
    if part is not None:
      precompute.fill(
        rows,
        part,
        below,
        "segment_ids",
        frozen=cast.frozen[name],
        mesh=mesh,
        length=settings.data.max_length,
        batch_size=settings.eval.batch_size,
        heard=heard,
      )
  return kept


def only_top(cast: Whole) -> Whole:
  """The cast with the adapted layers and the head alone of its teacher.

  What lies below is deleted from the devices, whoever still refers to it; outputs then
  need the trunk's rows, and the decoders refuse to do without.
  """
  [(name, decoder)] = cast.teachers.items()
  start, config = _layers(cast), decoder.config
  config = config.of_layers(range(start, config.num_layers))

  def short(decoders: Mapping[str, Decoder]) -> dict[str, Decoder]:
    return {n: d.clone(config=config, only_top=True) for n, d in decoders.items()}

  params = dict(cast.frozen[name])
  for part in _INPUTS:
    if part in params and not (part == "embed" and config.tie_embeddings):
      jax.tree.map(lambda x: x.delete(), params.pop(part))
  params["layers"] = jax.tree.map(
    functools.partial(_cut, start=start), params["layers"]
  )
  return dataclasses.replace(
    cast,
    teachers=short(cast.teachers),
    adapted=short(cast.adapted),
    frozen={**cast.frozen, name: params},
  )


def _cut(stack: Array, start: int) -> Array:
  """The layers from `start` on, in the same sharding; the others are deleted."""
  top = jax.jit(lambda x: x[start:], out_shardings=stack.sharding)(stack)
  stack.delete()
  return top


def _layers(cast: Adapted) -> int:
  """How many layers the trunk has; 0 where nobody adapts."""
  for decoder in cast.adapted.values():
    return decoder.adapter.trunk_layers(decoder.config.num_layers)
  return 0


def _needs_all(method: Method, cast: Adapted) -> bool:
  """Whether the whole teacher is wanted: for rows that nobody keeps, or to export."""
  plan: Any = method.sequences
  unkept = plan.sampled or plan.beforehand or plan.prepare or plan.own_tokens
  [decoder] = cast.adapted.values()
  return bool(unkept) or decoder.adapter.folder == "teacher"
