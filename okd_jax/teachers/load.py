"""Teachers: their weights, what has adapted them, and what their words depend on."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import PyTree

from okd_jax import models
from okd_jax.config.players import INT8, TeacherSettings
from okd_jax.config.schema import Settings
from okd_jax.data import Example, rows
from okd_jax.errors import UserError
from okd_jax.models import ModelConfig, int8, parameter_shapes
from okd_jax.runtime import machine, sharding
from okd_jax.runtime.files import local
from okd_jax.teachers.store import Store, digest

ONLY = "teacher"  # the name of the only one
_SHARE = 0.4  # of a device's memory, which a teacher may take beside all else


def load_teachers(
  settings: Settings, shapes: Mapping[str, ModelConfig], mesh: Mesh
) -> dict[str, PyTree]:
  """The frozen parameters of the teachers, by name, placed by the sharding rules.

  Of a teacher that is the student itself there are none.

  shapes: what the outline found; a teacher without a path is drawn at random.

  Raises:
    UserError: for a model or an adapter that cannot be read or does not fit.
  """
  if settings.teacher.itself:
    return {}
  whole = lies_whole(settings, shapes, mesh.shape)
  if settings.teacher.model.wanted and not settings.teachers:
    return {n: _random(shape, settings, mesh, whole) for n, shape in shapes.items()}
  adapter = settings.teacher.adapter
  read = functools.partial(
    models.load,
    dtype=jnp.dtype(settings.teacher_dtype),
    where=functools.partial(sharding.place, mesh, whole=whole),
    quantize=settings.quantizes and not adapter,
  )
  found = {name: read(teacher_path(settings, name)).params for name in shapes}
  if adapter:
    [(name, params)] = found.items()
    params = _merged(settings.teacher, shapes[name], params)
    found[name] = _quantized(params, mesh, whole) if settings.quantizes else params
  return found


def lies_whole(
  settings: Settings,
  shapes: Mapping[str, ModelConfig],
  sizes: Mapping[str, int],
  limit: int = 0,
) -> bool:
  """Whether fsdp leaves frozen teachers whole on every device (`mesh.teacher`).

  sizes: of the mesh's axes, by name.
  limit: bytes of a device; by default those of the devices at hand.
  """
  if settings.mesh.teacher != "auto" or sizes["fsdp"] == 1:
    return settings.mesh.teacher == "replicate"
  size = 1 if settings.quantizes else jnp.dtype(settings.teacher_dtype).itemsize
  leaves = [x for shape in shapes.values() for x in parameter_shapes(shape).values()]
  own = sum(leaf.size for leaf in leaves) * size / sizes["tensor"]
  return own <= _SHARE * (limit or machine.device_bytes())


def load_whole(
  settings: Settings,
  shapes: Mapping[str, ModelConfig],
  mesh: Mesh,
  dtype: str = "",
) -> dict[str, PyTree]:
  """`load_teachers` without int8, whatever teacher.dtype says.

  dtype: of the weights; '' is that of a teacher's other weights.
  """
  own = dataclasses.replace(settings.teacher, dtype=dtype or settings.teacher_dtype)
  return load_teachers(dataclasses.replace(settings, teacher=own), shapes, mesh)


def teacher_path(settings: Settings, name: str) -> str:
  """Where a teacher's weights are; '' of one that is drawn at random."""
  return settings.teachers[name] if settings.teachers else settings.teacher.path


def _quantized(params: PyTree, mesh: Mesh, whole: bool) -> PyTree:
  """The same with int8 kernels (`models.int8`), which take the place of the others."""
  where = sharding.shardings(jax.eval_shape(int8.quantized, params), mesh, whole)
  return jax.jit(int8.quantized, out_shardings=where, donate_argnums=0)(params)


def _merged(teacher: TeacherSettings, shape: ModelConfig, params: PyTree) -> PyTree:
  """The parameters with what an earlier run's adapter added."""
  tree, adapter = models.load_adapter(_adapter_folder(teacher), shape)
  where = jax.tree.map(lambda x: x.sharding, params)
  return jax.jit(adapter.merge, out_shardings=where)(params, tree)


def _random(shape: ModelConfig, settings: Settings, mesh: Mesh, whole: bool) -> PyTree:
  """A teacher that knows nothing: what trials and tests distil from."""
  # Its own key: a student of the same shape must not be born as its twin.
  key = jax.random.fold_in(jax.random.key(settings.train.seed), 1)
  init = functools.partial(models.init, shape)
  if settings.quantizes:
    floats, init = init, lambda key: int8.quantized(floats(key))
  where = sharding.shardings(jax.eval_shape(init, key), mesh, whole)
  return jax.jit(init, out_shardings=where)(key)


def _adapter_folder(teacher: TeacherSettings) -> Path:
  """The PEFT folder that teacher.adapter names, or the one of that run."""
  folder = local(teacher.adapter)
  return folder / "adapter" if (folder / "adapter").is_dir() else folder


def open_stored(
  settings: Settings,
  train: Sequence[Example],
  held_out: Sequence[Example],
  vocab_size: int,
) -> dict[str, Store]:
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
    folder = local(settings.teacher.cache) / part
    found[part] = Store(folder, len(examples), stored_key(settings, examples))
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


def dtypes(settings: Settings) -> dict[str, str]:
  """What a teacher is computed in, and its weights."""
  weights = INT8 if settings.quantizes else settings.teacher_dtype
  return {"computed_in": settings.train.dtype, "weights": weights}


def stored_key(settings: Settings, examples: Sequence[Example]) -> dict[str, Any]:
  """What a stored teacher's words depend on."""
  temperature = {"temperature": settings.method.temperature}
  return teacher_key(settings, examples) | temperature


def teacher_key(settings: Settings, examples: Sequence[Example]) -> dict[str, Any]:
  """What a teacher's states depend on; the teacher itself only where it is named."""
  key, teacher = {"data": rows.digest(examples)}, settings.teacher
  if teacher.path:
    key["teacher"] = models.fingerprint(teacher.path)
    key["adapter"] = adapter_digest(teacher)
  elif teacher.model.wanted:
    key["teacher"] = f"random, seed {settings.train.seed}: {teacher.model}"
  return key


def adapter_digest(teacher: TeacherSettings) -> str:
  """A digest of teacher.adapter's files, '' where there is none."""
  if not teacher.adapter:
    return ""
  files = sorted(_adapter_folder(teacher).glob("adapter_*"))
  return digest(file.read_bytes() for file in files)
