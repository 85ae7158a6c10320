"""The state of step 0: a student, its teachers' modules and what a method adds."""

import functools

import jax
import jax.numpy as jnp

from okd_jax import models
from okd_jax.models.adapters import take_blocks
from okd_jax.run.step import TrainState, init_state
from okd_jax.runtime import sharding


def named(decoders, role: str = "teacher") -> list[str]:
  """The names of several teachers, or of those that adapt."""
  prefix = f"{role}:"
  return [key.removeprefix(prefix) for key in decoders if key.startswith(prefix)]


def random_state(config, decoders, optimizers, prompt_ids, method) -> TrainState:
  """The state of step 0 with a student drawn at random, a prompt of `prompt_ids` 0."""
  student_key, adapter_key, key = jax.random.split(jax.random.key(config.train.seed), 3)
  tokens = jnp.zeros((1, 1), jnp.int32)
  params = {"student": decoders["student"].init(student_key, tokens)["params"]}
  if "adapted" in decoders:
    params["adapter"] = decoders["adapted"].init(adapter_key, tokens)["adapter"]
  modules = {
    name: decoders[f"adapted:{name}"].init(jax.random.fold_in(adapter_key, i), tokens)
    for i, name in enumerate(named(decoders, "adapted"))
  }
  if modules:
    params["adapter"] = {name: tree["adapter"] for name, tree in modules.items()}
  count, width = len(named(decoders)), decoders["student"].config.hidden_size
  for i, (name, (init, _)) in enumerate(sorted(method.trees.items())):
    params[name] = init(jax.random.fold_in(key, i), count, width)
  if prompt_ids is not None:
    size = decoders["adapted"].config.hidden_size
    vectors = jnp.zeros((len(prompt_ids), size))
    params["adapter"] = {"prompt": {"vectors": vectors}}  # no MLP: a text is a start
  return init_state(params, optimizers, key)


def first_state(
  config, mesh, teacher, random, abstract, prompt_ids, adapter
) -> TrainState:
  """The state of step 0; no array is ever whole on one device."""
  where = sharding.shardings(abstract, mesh)
  state = jax.jit(random, out_shardings=where)()
  if prompt_ids is not None:
    vectors = teacher.params["embed"]["embedding"][prompt_ids].astype(jnp.float32)
    prompt = {"prompt": {"vectors": vectors}}
    prompt = jax.device_put(prompt, where.params["adapter"])
    state = state.replace(params=state.params | {"adapter": prompt})
  if adapter and adapter.kind == "blocks":
    take = functools.partial(take_blocks, config=adapter)
    own = where.params["adapter"]["layers"]
    layers = jax.jit(take, out_shardings=own)(teacher.params["layers"])
    state = state.replace(params=state.params | {"adapter": {"layers": layers}})
  if config.student.path:
    put = functools.partial(sharding.put, mesh)
    params = models.load(config.student.path, put=put).params
  elif config.student.layers:
    # Copies, in float32: the step donates the student's buffers, not the teacher's.
    params, _ = models.take_layers(
      teacher.params, teacher.config, config.student.layers
    )
    params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    params = jax.device_put(params, where.params["student"])
  else:
    return state
  return state.replace(params=state.params | {"student": params})
