"""Cached activations: the frozen trunk below the adapters, computed once for a run.

With `adapter.layers=k` only the top k layers of the teacher hold adapters, so what
enters them depends on the text alone. Kept in bfloat16, 2 D bytes a token, in memory or
on disk, it leaves k layers and the head of the teacher's work. Computing it costs one
pass of the trunk, so it pays from the second epoch on; rows that a method samples have
no trunk to keep, and evaluation runs the whole teacher.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from okd_jax.config.schema import Settings
from okd_jax.data import Example
from okd_jax.data.batch import Batch
from okd_jax.errors import UserError
from okd_jax.methods import Method
from okd_jax.models import Decoder, output
from okd_jax.teachers import load, precompute, store

MEMORY = "memory"

Kept = store.Store | store.Memory


@runtime_checkable
class Adapted(Protocol):
  """Those of a cast that a trunk is about."""

  teachers: Mapping[str, Decoder]
  adapted: Mapping[str, Decoder]
  frozen: Mapping[str, PyTree]


@runtime_checkable
class Rows(Protocol):
  """The training rows."""

  train: Sequence[Example]


def opened(method: Method, cast: Adapted, data: Rows, settings: Settings) -> Kept:
  """Where `teacher.trunk` wants the trunk kept, empty or not.

  Raises:
    UserError: if there is no such trunk, or the folder holds another.
  """
  where, start = settings.teacher.trunk, _layers(cast)
  if problem := _problem(method, cast, start, settings.method.name):
    raise UserError(f"teacher.trunk={where}: {problem}")
  if where == MEMORY:
    if jax.process_count() > 1:
      raise UserError(
        "teacher.trunk=memory is for one process; name a folder that all can read"
      )
    return store.Memory(len(data.train), "trunk")
  about = load.teacher_key(settings, data.train)
  about |= {"layers": start} | load.dtypes(settings)
  return store.begin(Path(where), len(data.train), about)


def complete(
  cast: Adapted, data: Rows, settings: Settings, mesh: Mesh, kept: Kept
) -> Kept:
  """What `opened` gave, with all rows."""
  [(name, decoder)] = cast.teachers.items()
  start = _layers(cast)

  @jax.jit
  def below(frozen: PyTree, batch: Batch) -> dict[str, Array]:
    hidden = output(decoder, {"params": frozen}, batch, stop=start).hidden
    return {"hidden": hidden.astype(jnp.bfloat16)}

  precompute.fill(
    data.train,
    kept,
    below,
    "segment_ids",
    frozen=cast.frozen[name],
    mesh=mesh,
    length=settings.data.max_length,
    batch_size=settings.eval.batch_size,
  )
  return kept


def _layers(cast: Adapted) -> int:
  """How many layers the trunk has; 0 where nobody adapts."""
  for decoder in cast.adapted.values():
    return decoder.adapter.trunk_layers(decoder.config.num_layers)
  return 0


def _problem(method: Method, cast: Adapted, start: int, name: str) -> str:
  plan: Any = method.sequences
  if not cast.adapted:
    return f"{name} has no adapter here"
  if not start:
    return "there is no layer below the adapters; set adapter.layers=k for the top k"
  if plan.sampled and not plan.gold:
    return f"{name} trains on sampled rows alone"
  return ""
