"""The training state and the one jitted training step."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, Key

from okd_jax.methods import Method, Models
from okd_jax.runtime.sharding import batch_sharding, shardings


@flax.struct.dataclass
class TrainState:
  """All that a run must carry from step to step; the frozen teacher is not in it.

  params and opt_state are dicts with the trained trees 'student', in methods that
  adapt the teacher 'adapter', and what else a method trains (`Method.trees`).
  """

  step: Int[Array, ""]
  params: dict[str, Any]
  opt_state: dict[str, Any]
  key: Key[Array, ""]


def init_state(params, optimizers: Mapping, key) -> TrainState:
  """The state of step 0."""
  opt_state = {name: optimizers[name].init(tree) for name, tree in params.items()}
  return TrainState(jnp.zeros((), jnp.int32), params, opt_state, key)


def train_step(
  state: TrainState,
  frozen,
  batch: dict[str, Array],
  *,
  method: Method,
  models: Models,
  optimizers: Mapping[str, optax.GradientTransformation],
  microbatches: int,
  steps: int,
) -> tuple[TrainState, dict[str, Array]]:
  """One update of every trained tree; a pure function.

  Knobs that move reach their ends at the last of `steps`.

  Gradients are taken with respect to the moving trees alone, so the frozen teacher
  has no gradient buffers. If a loss, gradient or update is not finite, the state comes
  back unchanged and the metric 'finite' is 0.
  """
  batch = _weighted(batch, method.weights)
  key = jax.random.fold_in(state.key, state.step)
  knobs = method.knobs_at(jnp.clip(state.step / max(steps - 1, 1), 0, 1))
  loss_fn = functools.partial(method.loss, models, knobs=knobs)
  params, opt_state = dict(state.params), dict(state.opt_state)
  logged = {f"method.{k}": v for k, v in knobs.items() if isinstance(v, jax.Array)}
  for names in method.updates:
    loss, metrics, grads = _accumulate(
      loss_fn, {n: params[n] for n in names}, params, frozen, batch, key, microbatches
    )
    # Of passes in sequence, each figure is that of the one that moved its tree.
    new = metrics | {"loss": loss}
    logged |= {k: v for k, v in new.items() if _owner(k) in names or k not in logged}
    for name in names:
      updates, opt_state[name] = optimizers[name].update(
        grads[name], opt_state[name], params[name]
      )
      params[name] = optax.apply_updates(params[name], updates)
      logged[f"{name}_grad_norm"] = optax.tree.norm(grads[name])
      logged[f"{name}_update_norm"] = optax.tree.norm(updates)
  if "adapter" in params:
    logged |= _module_norms(frozen, params["adapter"], models)
  finite = jnp.isfinite(sum(logged.values()))
  new = TrainState(state.step + 1, params, opt_state, state.key)
  keep = functools.partial(jnp.where, finite)
  new = new.replace(
    params=jax.tree.map(keep, new.params, state.params),
    opt_state=jax.tree.map(keep, new.opt_state, state.opt_state),
  )
  logged["finite"] = finite.astype(jnp.float32)
  logged["tokens"] = jnp.sum(batch["segment_ids"] != 0, dtype=jnp.float32)
  logged["trained_tokens"] = jnp.sum(batch["mask"], dtype=jnp.float32)
  return new, logged


def _module_norms(frozen, adapter, models: Models) -> dict[str, Array]:
  """'adapter_norm', of several teachers one for each."""
  if not models.named:
    return {"adapter_norm": models.module_norm(frozen, adapter)}
  return {
    f"adapter_norm_{name}": models.named[name].module_norm(frozen[name], tree)
    for name, tree in adapter.items()
  }


def _owner(name: str) -> str:
  """The tree that a metric is about."""
  prefixes = {"module": "adapter", "policy": "policy"}
  return next((t for p, t in prefixes.items() if name.startswith(p)), "student")


def _weighted(batch, weights: Callable):
  """The batch, and the batches beside it (such as 'gold'), with their weights."""
  rows = {k: v for k, v in batch.items() if isinstance(v, dict) and "mask" in v}
  beside = {k: _weighted(v, weights) for k, v in rows.items()}
  return batch | beside | {"weights": weights(batch["mask"])}


def _accumulate(loss, moving, params, frozen, batch, key, microbatches):
  """(loss, metrics, gradients) summed over micro-batches.

  The weights were normalised over the whole batch, so plain sums are its means.
  """

  def value(moving, part, index):
    part_key = jax.random.fold_in(key, index)
    return loss(params | moving, frozen, part, part_key)

  gradient = jax.value_and_grad(value, has_aux=True)
  if microbatches == 1:
    (total, metrics), grads = gradient(moving, batch, 0)
    return total, metrics, grads
  # Row i goes to part i % microbatches: every device keeps a share of each part.
  parts = jax.tree.map(
    lambda x: x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1), batch
  )

  def body(sums, inputs):
    new = gradient(moving, *inputs)
    return jax.tree.map(jnp.add, sums, new), None

  shapes = jax.eval_shape(gradient, moving, jax.tree.map(lambda x: x[0], parts), 0)
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
  index = jnp.arange(microbatches)
  ((total, metrics), grads), _ = jax.lax.scan(body, zeros, (parts, index))
  return total, metrics, grads


def compile_step(
  method: Method,
  models: Models,
  optimizers: Mapping[str, optax.GradientTransformation],
  microbatches: int,
  steps: int,
  state: TrainState,
  mesh: Mesh,
) -> Callable:
  """`train_step` under jit: (state, frozen, batch) -> (state, metrics).

  `state` may be abstract. Its buffers are donated: the new state takes their place.
  The frozen tree keeps the sharding it was loaded in.
  """
  state_shardings = shardings(state, mesh)
  replicated = NamedSharding(mesh, PartitionSpec())
  step = functools.partial(
    train_step,
    method=method,
    models=models,
    optimizers=optimizers,
    microbatches=microbatches,
    steps=steps,
  )
  return jax.jit(
    step,
    in_shardings=(state_shardings, None, batch_sharding(mesh)),
    out_shardings=(state_shardings, replicated),
    donate_argnames="state",
  )
