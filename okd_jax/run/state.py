"""What a run carries from step to step, and how it is at step 0."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key, PyTree

from okd_jax.config.schema import Settings
from okd_jax.run import student
from okd_jax.run.cast import Cast
from okd_jax.runtime import sharding


@flax.struct.dataclass
class TrainState:
  """All that a run must carry from step to step; the frozen teachers are not in it.

  params and opt_state are dicts with the trained trees: 'student'; 'adapter' in methods
  that adapt teachers, a tree by teacher's name; and what else a method trains
  (`Method.trees`). carried are the numbers of `Method.carried`. skipped: how many
  updates were left out, in runs that may leave out some; else None.
  """

  step: Int[Array, ""]
  params: dict[str, Any]
  opt_state: dict[str, Any]
  key: Key[Array, ""]
  carried: dict[str, Float[Array, ""]] = flax.struct.field(default_factory=dict)
  skipped: Int[Array, ""] | None = None


def init_state(
  params: dict[str, PyTree],
  optimizers: Mapping[str, optax.GradientTransformation],
  key: Key[Array, ""],
  carried: Mapping[str, float] | None = None,
  skips: bool = False,
) -> TrainState:
  """The state of step 0; skips: whether it counts updates that are left out."""
  opt_state = {name: optimizers[name].init(tree) for name, tree in params.items()}
  numbers = {name: jnp.float32(value) for name, value in (carried or {}).items()}
  zero = jnp.zeros((), jnp.int32)
  skipped = jnp.zeros((), jnp.int32) if skips else None
  return TrainState(zero, params, opt_state, key, numbers, skipped)


def random_state(
  seed: int,
  cast: Cast,
  optimizers: Mapping[str, optax.GradientTransformation],
  trees: Mapping[str, tuple[Callable[..., PyTree], float]],
  carried: Mapping[str, float] | None = None,
  skips: bool = False,
) -> TrainState:
  """The state of step 0 with a student drawn at random.

  Args:
    trees: what a method trains besides (`Method.trees`).
    carried: what it carries from step to step (`Method.carried`).
    skips: as in `init_state`.
  """
  student_key, adapter_key, key, tree_key = student.keys(seed)
  tokens = jnp.zeros((1, 1), jnp.int32)
  params = {"student": student.drawn(cast, student_key)}
  if cast.adapted:
    params["adapter"] = {}
  for i, (name, decoder) in enumerate(sorted(cast.adapted.items())):
    own = jax.random.fold_in(adapter_key, i)
    params["adapter"][name] = decoder.init(own, tokens)["adapter"]
  count, width = len(cast.teachers), cast.student.config.hidden_size
  for i, (name, (init, _)) in enumerate(sorted(trees.items())):
    params[name] = init(jax.random.fold_in(tree_key, i), count, width)
  return init_state(params, optimizers, key, carried, skips)


def first_state(
  settings: Settings,
  cast: Cast,
  random: Callable[[], TrainState],
  abstract: TrainState,
  mesh: Mesh,
) -> TrainState:
  """The state of step 0; no array is ever whole on one device.

  Args:
    random: makes it with a random student, `abstract` are its shapes.

  Raises:
    UserError: for a student's weights that cannot be read.
  """
  where = sharding.shardings(abstract, mesh)
  state = jax.jit(random, out_shardings=where)()
  params = dict(state.params)
  begun = student.first(settings, cast, mesh)
  if begun is not None:
    params["student"] = begun
  for name, decoder in cast.adapted.items():
    start, base = decoder.adapter.start, cast.teacher_params(name, params)
    if jax.eval_shape(start, base) is not None:
      own = jax.jit(start, out_shardings=where.params["adapter"][name])(base)
      params["adapter"] = params["adapter"] | {name: own}
  return state.replace(params=params)
