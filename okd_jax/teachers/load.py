"""Teachers: who they are, what has adapted them, and what of them is kept."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from okd_jax import models
from okd_jax.errors import UserError
from okd_jax.models.adapters import merge
from okd_jax.models.formats.weights import Put
from okd_jax.teachers.store import Store, digest, rows_digest


def load_teacher(config, put: Put) -> models.Model:
  """The teacher, what adapted it added; of a stored one all but the weights."""
  settings = config.teacher
  dtype = jnp.dtype(settings.dtype or config.train.dtype)
  if settings.cache:
    return models.load(settings.path, params=False)
  teacher = models.load(settings.path, dtype=dtype, put=put)
  if not settings.adapter:
    return teacher
  adapter, kind = models.load_adapter(_adapter_folder(config), teacher.config)
  where = jax.tree.map(lambda x: x.sharding, teacher.params)
  merged = jax.jit(merge, static_argnums=2, out_shardings=where)
  return dataclasses.replace(teacher, params=merged(teacher.params, adapter, kind))


def load_several(config, put: Put) -> dict[str, models.Model]:
  """The models of `teachers`, by name in alphabetical order; none is no error."""
  dtype = jnp.dtype(config.teacher.dtype or config.train.dtype)
  named = config.teachers.to_dict()
  return {
    name: models.load(named[name], dtype=dtype, put=put) for name in sorted(named)
  }


def _adapter_folder(config) -> Path:
  """The PEFT folder that teacher.adapter names, or the one of that run."""
  folder = Path(config.teacher.adapter).expanduser()
  return folder / "adapter" if (folder / "adapter").is_dir() else folder


def open_stored(config, train, held_out, vocab_size: int) -> dict[str, Store]:
  """What a stored teacher said about the rows of 'train' and, if there are any, 'eval'.

  vocab_size: the student's.

  Raises:
    UserError: if it is of other data or another teacher, speaks of tokens that the
      student lacks, or is not complete.
  """
  found = {}
  for part, examples in {"train": train, "eval": held_out}.items():
    if not examples:
      continue
    folder = Path(config.teacher.cache) / part
    found[part] = Store(folder, len(examples), stored_key(config, examples))
    known = found[part].about["vocab_size"]
    if known > vocab_size:
      raise UserError(
        f"teacher.cache: {folder} was written for a student of {known} tokens, this "
        f"one has {vocab_size}; write another with this student's configuration"
      )
    if missing := found[part].missing():
      raise UserError(
        f"teacher.cache: {folder} lacks {len(missing)} of {len(examples)} rows; run "
        "the command that wrote it again"
      )
  return found


def dtypes(config) -> dict[str, str]:
  """What a teacher is computed in, and its weights."""
  weights = config.teacher.dtype or config.train.dtype
  return {"computed_in": config.train.dtype, "weights": weights}


def stored_key(config, examples) -> dict[str, Any]:
  """What a stored teacher's words depend on."""
  return teacher_key(config, examples) | {"temperature": config.method.temperature}


def teacher_key(config, examples) -> dict[str, Any]:
  """What a teacher's states depend on; the teacher itself only where it is named."""
  key = {"data": rows_digest(examples)}
  if config.teacher.path:
    key["teacher"] = models.fingerprint(config.teacher.path)
    key["adapter"] = _adapter_digest(config)
  elif config.teacher.model.hidden_size:
    key["teacher"] = (
      f"random, seed {config.train.seed}: {config.teacher.model.to_json()}"
    )
  return key


def _adapter_digest(config) -> str:
  if not config.teacher.adapter:
    return ""
  files = sorted(_adapter_folder(config).glob("adapter_*"))
  return digest(file.read_bytes() for file in files)
