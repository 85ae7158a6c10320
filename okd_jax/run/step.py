"""The one jitted training step."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Key, PyTree, Shaped

from okd_jax.data.batch import Batch
from okd_jax.evaluation import figures
from okd_jax.methods import Method, Models
from okd_jax.methods.base.knobs import knobs_at, progress
from okd_jax.methods.base.method import told
from okd_jax.run.state import TrainState
from okd_jax.runtime.sharding import (
  as_parameters,
  batch_sharding,
  shardings,
  with_whole_modules,
)

Metrics = dict[str, Float[Array, ""]]


def train_step(
  state: TrainState,
  frozen: Mapping[str, PyTree],
  batch: Batch,
  *,
  method: Method,
  models: Models,
  optimizers: Mapping[str, optax.GradientTransformation],
  microbatches: int,
  steps: int,
) -> tuple[TrainState, Metrics]:
  """One update of every trained tree; a pure function.

  Knobs that move reach their ends at the last of `steps`.

  Gradients are taken with respect to the moving trees alone, so what is frozen has no
  gradient buffers. If a loss, a figure, a gradient or what the optimiser knows is not
  finite, all trees and optimisers' states come back as they were, and the metric
  'finite' is 0; a state that counts such steps counts one more, 'skipped'. Of an update
  that overflows in some numbers, by sound gradients, these alone stay as they were.
  """
  batch = _weighted(batch, method.weights, models.one_row_in)
  key = jax.random.fold_in(state.key, state.step)
  now = knobs_at(method.knobs, progress(state.step, steps)) | told(state.carried)

  def loss(params: PyTree, part: Batch, part_key: Key[Array, ""]):
    seen = models.seen(params, frozen)
    return method.loss(models, *seen, part, part_key, now)

  params, opt_state, norms = dict(state.params), dict(state.opt_state), {}
  sound = []
  logged = {f"method.{k}": v for k, v in now.items() if isinstance(v, jax.Array)}
  for names in method.updates:
    whole = with_whole_modules(params)
    moving = {name: whole[name] for name in names}
    total, metrics, grads = _accumulate(
      loss, moving, whole, batch, key, microbatches, models.one_row_in
    )
    # Of passes in sequence, each figure is that of the one that moved its tree.
    for figure, value in (metrics | {"loss": total}).items():
      if figures.owner(figure) in names or figure not in logged:
        logged[figure] = value
    for name in names:
      logged[f"{name}_grad_norm"] = optax.tree.norm(grads[name])
      own = opt_state[name], params[name]
      sound.append(_finite_if_sound(optimizers[name], *own))
      params[name], opt_state[name], norms[f"{name}_update_norm"] = _updated(
        optimizers[name], grads[name], *own
      )
  moves = jnp.isfinite(sum(logged.values()) + sum(sound))
  params = _kept(moves, params, state.params)
  opt_state = _kept(moves, opt_state, state.opt_state)
  finite = moves & jnp.isfinite(sum(norms.values()))
  _, base = models.seen(params, frozen)
  logged |= norms | _adapter_norms(models, base, params.get("adapter", {}))
  carried = method.carry(state.carried, logged, progress(state.step + 1, steps))
  carried = _kept(finite, carried, state.carried)
  new = TrainState(state.step + 1, params, opt_state, state.key, carried, state.skipped)
  return _counted(new, moves, finite, logged | _counts(batch))


def _adapter_norms(
  models: Models, frozen: Mapping[str, PyTree], adapters: Mapping[str, PyTree]
) -> Metrics:
  return {
    f"adapter_norm{models.suffix(name)}": models.teachers[name].adapter_norm(
      frozen[name], adapter
    )
    for name, adapter in adapters.items()
  }


def _finite_if_sound(
  optimizer: optax.GradientTransformation, opt_state: PyTree, params: PyTree
) -> Float[Array, ""]:
  """A number that is finite if an update by finite gradients will be.

  Whether it may be done must be known before any of it is; if all of it were computed
  first, it would fill as much memory as the parameters. So this looks at what there is,
  moments and parameters, and lets the optimiser move ones: a learning rate that is not
  finite spoils these as it does all others.
  """
  one = jax.tree.map(lambda x: jnp.ones((1,) * x.ndim, x.dtype), params)
  fresh = jax.tree.map(
    lambda own, now: own if now.ndim else now, optimizer.init(one), opt_state
  )
  leaves = jax.tree.leaves((params, opt_state, optimizer.update(one, fresh, one)))
  return sum(x.sum() for x in leaves if jnp.issubdtype(x.dtype, jnp.inexact))


def _updated(
  optimizer: optax.GradientTransformation,
  grads: PyTree,
  opt_state: PyTree,
  params: PyTree,
) -> tuple[PyTree, PyTree, Float[Array, ""]]:
  """(parameters, optimiser's state, norm of the update) of one tree."""
  updates, opt_state = optimizer.update(grads, opt_state, params)
  return optax.apply_updates(params, updates), opt_state, optax.tree.norm(updates)


def _kept(finite: Bool[Array, ""], new: PyTree, old: PyTree) -> PyTree:
  """The new tree, or the old one to the last bit; never a number that is not finite."""

  def keep(new: Shaped[Array, "..."], old: Shaped[Array, "..."]):
    return jnp.where(finite & jnp.isfinite(new), new, old)

  return jax.tree.map(keep, new, old)


def _counted(
  state: TrainState, moves: Bool[Array, ""], finite: Bool[Array, ""], logged: Metrics
) -> tuple[TrainState, Metrics]:
  """(state, metrics) with whether the step was taken, and how many were not.

  An update that overflows in some numbers only has moved the others: 'skipped' is -1,
  as it was not left out.
  """
  logged["finite"] = finite.astype(jnp.float32)
  if state.skipped is None:
    return state, logged
  state = state.replace(skipped=state.skipped + ~moves)
  skipped = jnp.where(moves & ~finite, -1, state.skipped)
  return state, logged | {"skipped": skipped.astype(jnp.float32)}


def _counts(batch: Batch) -> Metrics:
  return {
    "tokens": jnp.sum(batch.segment_ids != 0, dtype=jnp.float32),
    "trained_tokens": jnp.sum(batch.mask, dtype=jnp.float32),
  }


def _weighted(
  batch: Batch,
  weights: Callable[[Bool[Array, "B L"]], Float[Array, "B L"]],
  one_row_in: int,
) -> Batch:
  """The batch, and the batches beside it (such as gold), with their weights."""

  def own(rows: Batch | None) -> Batch | None:
    return rows if rows is None else _weighted(rows, weights, one_row_in)

  module = None
  if one_row_in > 1:
    teaches = jnp.arange(len(batch.mask)) % one_row_in == 0
    module = weights(batch.mask & teaches[:, None])
  return batch.replace(
    weights=weights(batch.mask),
    module_weights=module,
    gold=own(batch.gold),
    answers={writer: own(rows) for writer, rows in batch.answers.items()},
    other_tokens=own(batch.other_tokens),
    partner=own(batch.partner),
  )


def _accumulate(
  loss: Callable[..., tuple[Array, Metrics]],
  moving: dict[str, PyTree],
  params: dict[str, PyTree],
  batch: Batch,
  key: Key[Array, ""],
  microbatches: int,
  one_row_in: int,
) -> tuple[Array, Metrics, dict[str, PyTree]]:
  """(loss, metrics, gradients) summed over micro-batches.

  The weights were normalised over the whole batch, so plain sums are its means. Groups
  of `one_row_in` rows stay together, so that in each part the same rows teach.
  """

  def value(moving: dict[str, PyTree], part: Batch, index: Any):
    return loss(params | moving, part, jax.random.fold_in(key, index))

  gradient = _gradient(value)
  if microbatches == 1:
    (total, metrics), grads = gradient(moving, batch, 0)
    return total, metrics, grads
  # Group i goes to part i % microbatches: every device keeps a share of each part.
  group = max(one_row_in, 1)

  def cut(x: Shaped[Array, "B ..."]) -> Shaped[Array, "N M ..."]:
    rows = x.reshape(-1, microbatches, group, *x.shape[1:]).swapaxes(0, 1)
    return rows.reshape(microbatches, -1, *x.shape[1:])

  parts = jax.tree.map(cut, batch)

  def body(sums: PyTree, inputs: PyTree):
    new = gradient(moving, *inputs)
    return jax.tree.map(jnp.add, sums, new), None

  shapes = jax.eval_shape(gradient, moving, jax.tree.map(lambda x: x[0], parts), 0)
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
  index = jnp.arange(microbatches)
  ((total, metrics), grads), _ = jax.lax.scan(body, zeros, (parts, index))
  return total, metrics, grads


def _gradient(value: Callable[..., Any]) -> Callable[..., Any]:
  """`value` and its gradients, each where its parameter is."""

  def call(*args: Any):
    found, grads = jax.value_and_grad(value, has_aux=True)(*args)
    return found, as_parameters(grads)

  return call


def compile_step(
  method: Method,
  models: Models,
  optimizers: Mapping[str, optax.GradientTransformation],
  microbatches: int,
  steps: int,
  state: TrainState,
  mesh: Mesh,
  learns: bool = True,
) -> Callable[..., tuple[TrainState, Metrics]]:
  """`train_step` under jit: (state, frozen, batch) -> (state, metrics).

  learns: False holds the adapters: nothing is differentiated by them.

  `state` may be abstract. Its buffers are donated: the new state takes their place.
  The frozen tree keeps the sharding it was loaded in.
  """
  if not learns:
    models = dataclasses.replace(models, one_row_in=0)
    method = dataclasses.replace(method, updates=_without_adapters(method.updates))
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


def _without_adapters(
  updates: tuple[tuple[str, ...], ...],
) -> tuple[tuple[str, ...], ...]:
  kept = (tuple(name for name in names if name != "adapter") for names in updates)
  return tuple(names for names in kept if names)
