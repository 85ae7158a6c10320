"""The online teacher for any method: on-policy OKD and its like.

The student's loss stays what the method says, on whatever text it says, with adapted
teachers in the place of the frozen ones. Each adapter's loss is OKD's L_t (`okd`), on
the data's own rows: only there is there gold to hold it.
"""

import dataclasses
from collections.abc import Mapping

import jax
from jaxtyping import Array, Key, PyTree

from okd_jax.data.batch import Batch, first_rows
from okd_jax.losses import Output
from okd_jax.methods import online_module
from okd_jax.methods.base import (
  Loss,
  Method,
  Models,
  Now,
  Params,
  Sequences,
  Teacher,
  stop_gradient,
  token_sums,
  weigh,
)
from okd_jax.models import Mix

_DROPOUT = 7  # folded into the step's key: the student's second pass, for the adapters


def wrap(method: Method, knobs: online_module.Knobs) -> Method:
  """`method`, those of its teachers learning that have a tree of params['adapter']."""
  module_loss, own = online_module.build_loss(knobs), knobs.module_numbers()
  held = knobs.held(method).carried.keys() - method.carried.keys()

  def loss(
    models: Models,
    params: Params,
    frozen: Params,
    batch: Batch,
    key: Key[Array, ""] | None,
    now: Now,
  ) -> Loss:
    theirs = {name: now[name] for name in method.numbers}
    adapted = with_adapters(models, stop_gradient(params["adapter"]))
    found = method.loss(adapted, params, frozen, batch, key, theirs)
    if not models.one_row_in:
      return found
    value, metrics = found
    gold = _teaching(batch if batch.gold is None else batch.gold, models.one_row_in)
    student = jax.tree.map(stop_gradient, params["student"])
    again = models.student(student, gold, jax.random.fold_in(key, _DROPOUT))
    rest = {name: now[name] for name in (*own, *held)}
    for name in sorted(params["adapter"]):
      both = online_module.adapted_outputs(
        models, name, params, frozen, gold, knobs.anchored
      )
      outputs = {"student": again} | both
      rows = _gated(models, outputs, gold)
      own_loss, more = token_sums(models, module_loss, outputs, rows, rest)
      value += own_loss
      metrics |= {f"{k}{models.suffix(name)}": v for k, v in more.items()}
    return value, metrics

  return dataclasses.replace(
    knobs.held(method),
    loss=loss,
    adapts=True,
    knobs=dict(method.knobs) | own,
    updates=((*method.updates[0], "adapter"), *method.updates[1:]),
    sequences=_with_gold(method.sequences),
    takes_stored=False,
    takes_rows=True,
  )


def _teaching(rows: Batch, one_row_in: int) -> Batch:
  """Those rows that teach the adapters, with the weights of a mean over them."""
  if one_row_in == 1:
    return rows
  first = first_rows(rows, one_row_in)
  return first.replace(weights=first.module_weights)


def _gated(models: Models, outputs: Mapping[str, Output], rows: Batch) -> Batch:
  """The rows, weights on those of their tokens that teach the adapter."""
  gate = models.module_tokens
  if gate is None:
    return rows
  return rows.replace(weights=weigh(gate, models, outputs, rows.weights))


def _with_gold(plan: Sequences) -> Sequences:
  """The sequences, gold rows beside sampled ones, prepared by adapted teachers."""
  inner = plan.prepare

  def prepare(
    models: Models,
    params: Params,
    frozen: Params,
    batch: Batch,
    key: Key[Array, ""],
    now: Now,
  ) -> Batch:
    adapted = with_adapters(models, params["adapter"])
    return inner(adapted, params, frozen, batch, key, now)

  return dataclasses.replace(
    plan, gold=plan.gold or plan.source != "gold", prepare=inner and prepare
  )


def with_adapters(models: Models, adapters: Mapping[str, PyTree]) -> Models:
  """The models, with an adapted teacher wherever the plain one is asked for."""
  named = {
    name: _with_adapter(teacher, adapters[name]) if name in adapters else teacher
    for name, teacher in models.teachers.items()
  }
  return dataclasses.replace(models, teachers=named)


def _with_adapter(teacher: Teacher, adapter: PyTree) -> Teacher:
  def apply(frozen: PyTree, _: None, batch: Batch, mix: Mix | None = None) -> Output:
    return teacher.apply(frozen, adapter, batch, mix)

  return dataclasses.replace(teacher, apply=apply)
