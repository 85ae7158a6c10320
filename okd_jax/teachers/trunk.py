"""The frozen trunk below the online modules, computed once for all epochs.

With `adapter.layers=k` only the top k layers of the teacher hold modules, so what
enters them depends on the text alone. Kept in bfloat16, 2 D bytes a token, in memory or
on disk, it leaves k layers and the head of the teacher's work. Computing it costs one
pass of the trunk, so it pays from the second epoch on; rows that a method samples have
no trunk to keep, and evaluation runs the whole teacher.
"""

import logging
from pathlib import Path

import jax
import jax.numpy as jnp

from okd_jax.errors import UserError
from okd_jax.models import output
from okd_jax.run import build as setup
from okd_jax.teachers import load as teachers
from okd_jax.teachers import precompute, store

MEMORY = "memory"
_log = logging.getLogger("okd_jax")


Kept = store.Store | store.Memory


def opened(run: setup.Run) -> Kept | None:
  """Where `teacher.trunk` wants it kept, empty or not; None if it asks for nothing.

  Raises:
    UserError: if there is no such trunk, or the folder holds another.
  """
  where, config = run.config.teacher.trunk, run.config
  if not where:
    return None
  start = _start(run)
  if where == MEMORY:
    if jax.process_count() > 1:
      raise UserError(
        "teacher.trunk=memory is for one process; name a folder that all can read"
      )
    return store.Memory(len(run.train), "trunk")
  about = teachers.teacher_key(config, run.train)
  about |= {"layers": start} | teachers.dtypes(config)
  if jax.process_index() == 0:
    store.begin(where, len(run.train), about)
  precompute.barrier("begun")
  return store.Store(where, len(run.train), about)


def prepare(run: setup.Run, kept: Kept | None) -> Kept | None:
  """What `opened` gave, complete."""
  if kept is None:
    return None
  start, decoder = _start(run), run.decoders["teacher"]

  @jax.jit
  def below(frozen, batch):
    hidden = output(decoder, {"params": frozen}, batch, stop=start).hidden
    return {"hidden": hidden.astype(jnp.bfloat16)}

  precompute.fill(run, run.train, kept, below, "segment_ids")
  rows = run.steps * run.config.train.batch_size
  if rows < 2 * len(run.packs):
    _log.warning(
      "%s: the run sees its %d rows %.1f times; a trunk pays from the second time on",
      Path(kept.name).name,
      len(run.packs),
      rows / len(run.packs),
    )
  return kept


def _start(run: setup.Run) -> int:
  """How many layers the trunk has."""
  plan, problem, start = run.method.sequences, "", 0
  if run.adapter:
    total = run.decoders["teacher"].config.num_layers
    start = total - run.adapter.num_layers(total)
  if run.adapter is None:
    problem = f"{run.config.method.name} has no online module here"
  elif not start:
    problem = "there is no layer below the modules; set adapter.layers=k for the top k"
  elif plan.sampled and not plan.gold:
    problem = f"{run.config.method.name} trains on sampled rows alone"
  if problem:
    raise UserError(f"teacher.trunk={run.config.teacher.trunk}: {problem}")
  return start
