"""The student's weights at step 0, and those of them that never change.

A student that is trained in part carries an adapter, as teachers do: LoRA, or what is
trained of its own weights (`adapters.Part`).
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Key, PyTree

from okd_jax import models
from okd_jax.config.players import INT8
from okd_jax.config.schema import Settings
from okd_jax.methods.base import STUDENT
from okd_jax.models import int8
from okd_jax.models.adapters import Lora
from okd_jax.run.cast import Cast
from okd_jax.runtime import sharding

_TOKENS = (1, 1)  # shape to initialise with


def drawn(cast: Cast, key: Key[Array, ""]) -> PyTree:
  """What is trained of a student that is drawn at random."""
  variables = cast.student.init(key, jnp.zeros(_TOKENS, jnp.int32))
  adapter = cast.student.adapter
  if adapter is None:
    return variables["params"]
  begun = adapter.start(variables["params"])
  return variables["adapter"] if begun is None else begun


def first(settings: Settings, cast: Cast, mesh: Mesh) -> PyTree | None:
  """What is trained, where the student starts from weights; None if it is all drawn.

  Raises:
    UserError: for weights that cannot be read.
  """
  student, adapter = settings.student, cast.student.adapter
  if isinstance(adapter, Lora) or not (student.path or student.from_teacher):
    return None
  whole = _whole(settings, cast, mesh)
  return _placed(adapter.start, whole, mesh) if adapter else whole


def with_held(settings: Settings, cast: Cast, mesh: Mesh) -> Cast:
  """The cast with what is not trained of the student, if anything, in student.dtype.

  It is the same whenever it is asked for, so no checkpoint has it.

  Raises:
    UserError: for weights that cannot be read.
  """
  if cast.student.adapter is None:
    return cast
  frozen = {**cast.frozen, STUDENT: _held(settings, cast, mesh)}
  return dataclasses.replace(cast, frozen=frozen)


def _held(settings: Settings, cast: Cast, mesh: Mesh) -> PyTree:
  student, adapter = settings.student, cast.student.adapter
  quantize = student.dtype == INT8
  dtype = jnp.dtype("float32" if quantize else student.dtype or "float32")
  if student.path and isinstance(adapter, Lora):
    where = functools.partial(sharding.place, mesh)  # never whole in float32
    return models.load(student.path, dtype=dtype, where=where, quantize=quantize).params

  def part(whole: PyTree) -> PyTree:
    rest = jax.tree.map(lambda x: x.astype(dtype), adapter.held(whole))
    return int8.quantized(rest) if quantize else rest

  return _placed(part, _whole(settings, cast, mesh), mesh)


def merged(cast: Cast, trained: PyTree) -> PyTree:
  """The whole student, float32 where any of it was trained."""
  adapter = cast.student.adapter
  if adapter is None:
    return trained
  frozen = int8.dequantized(cast.frozen[STUDENT])
  frozen = jax.tree.map(lambda x: x.astype(jnp.float32), frozen)
  return adapter.merge(frozen, trained)


def _whole(settings: Settings, cast: Cast, mesh: Mesh) -> PyTree:
  """All of the student at step 0, in float32."""
  student, where = settings.student, functools.partial(sharding.place, mesh)
  if student.path:
    return models.load(student.path, where=where).params
  if student.from_teacher:
    [(name, teacher)] = cast.teachers.items()
    keep = student.taken(teacher.config.num_layers)

    def part(whole: PyTree) -> PyTree:
      # Copies: the step donates the student's buffers, not the teacher's.
      own, config = models.take_layers(whole, teacher.config, keep)
      own = jax.tree.map(lambda x: x.astype(jnp.float32), int8.dequantized(own))
      return models.narrowed(own, config, cast.kept) if cast.kept else own

    return _placed(part, cast.frozen[name], mesh)
  key, tokens = keys(settings.train.seed)[0], jnp.zeros(_TOKENS, jnp.int32)
  return _placed(lambda k: cast.student.init(k, tokens)["params"], key, mesh)


def keys(seed: int) -> Key[Array, "4"]:
  """Of the student, of adapters, of the run, and of a method's own trees."""
  # A key is also what `fold_in` makes of the seed's and its number here: that of
  # number 1 is a random teacher's, so an adapter's is folded once more.
  return jax.random.split(jax.random.key(seed), 4)


def _placed(
  function: Callable[[PyTree], PyTree], argument: PyTree, mesh: Mesh
) -> PyTree:
  """The function's result, each array where the sharding rules place it."""
  where = sharding.shardings(jax.eval_shape(function, argument), mesh)
  return jax.jit(function, out_shardings=where)(argument)
