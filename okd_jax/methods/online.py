"""The online teacher for any method: on-policy OKD and its like.

The student's loss stays what the method says, on whatever text it says, with the
adapted teacher in the frozen one's place. The module's loss is OKD's L_t (`okd`), on
the data's own rows: only there is there gold to hold it.
"""

import dataclasses

import jax

from okd_jax.methods import okd
from okd_jax.methods.base.knobs import Knob
from okd_jax.methods.base.method import Method, Models, stop_gradient, token_sums

KNOBS = ("teacher_divergence", "teacher_kl_weight", "anchor_weight", "temperature")


def wrap(
  method: Method,
  *,
  teacher_divergence: str,
  teacher_kl_weight: Knob,
  anchor_weight: Knob,
  temperature: Knob,
  **shape: Knob,
) -> Method:
  """`method`, whose teacher is frozen, with a teacher that learns."""
  module_loss, module_knobs = okd.build_module_loss(
    teacher_divergence=teacher_divergence,
    teacher_kl_weight=teacher_kl_weight,
    anchor_weight=anchor_weight,
    temperature=temperature,
    **shape,
  )

  def loss(models, params, frozen, batch, key, knobs):
    own = {name: knobs[name] for name in method.knobs}
    adapted = with_adapter(models, stop_gradient(params["adapter"]))
    value, metrics = method.loss(adapted, params, frozen, batch, key, own)
    gold = batch.get("gold", batch)
    student = jax.tree.map(stop_gradient, params["student"])
    outputs = {"student": models.student(student, gold, jax.random.fold_in(key, 7))}
    outputs |= okd.teacher_outputs(models, params, frozen, gold, anchor_weight)
    rest = {name: knobs[name] for name in module_knobs}
    module, more = token_sums(models, module_loss, outputs, gold, rest)
    return value + module, metrics | more

  plan = method.sequences
  if plan.prepare:
    inner = plan.prepare

    def prepare(models, params, frozen, batch, key):
      adapted = with_adapter(models, params["adapter"])
      return inner(adapted, params, frozen, batch, key)

    plan = dataclasses.replace(plan, prepare=prepare)
  plan = dataclasses.replace(plan, gold=plan.gold or plan.source != "gold")
  return dataclasses.replace(
    method,
    loss=loss,
    teacher="adapted",
    knobs=dict(method.knobs) | module_knobs,
    updates=(("student", "adapter"),),
    sequences=plan,
    takes_stored=False,
  )


def wrap_several(method: Method, anchor_weight: Knob, **given) -> Method:
  """`method`, of several frozen teachers, those of whom learn that have a module.

  given: the other knobs of `wrap`.
  """
  module_loss, module_knobs = okd.build_module_loss(
    anchor_weight=anchor_weight, **given
  )

  def adapt(models, modules):
    named = {
      name: with_adapter(own, modules[name]) if name in modules else own
      for name, own in models.named.items()
    }
    return dataclasses.replace(models, named=named)

  def loss(models, params, frozen, batch, key, knobs):
    modules = params["adapter"]
    own = {name: knobs[name] for name in method.knobs}
    adapted = adapt(models, stop_gradient(modules))
    value, metrics = method.loss(adapted, params, frozen, batch, key, own)
    student = stop_gradient(models.student(params["student"], batch, None))
    rest = {name: knobs[name] for name in module_knobs}
    for name in sorted(modules):
      one = {"adapter": modules[name]}
      teacher = models.named[name]
      outputs = okd.teacher_outputs(teacher, one, frozen[name], batch, anchor_weight)
      outputs |= {"student": student}
      module, more = token_sums(models, module_loss, outputs, batch, rest)
      value += module
      metrics |= {f"{k}_{name}": v for k, v in more.items()}
    return value, metrics

  plan = method.sequences
  if inner := plan.prepare:

    def prepare(models, params, frozen, batch, key):
      return inner(adapt(models, params["adapter"]), params, frozen, batch, key)

    plan = dataclasses.replace(plan, prepare=prepare)
  first, *rest = method.updates
  return dataclasses.replace(
    method,
    loss=loss,
    knobs=dict(method.knobs) | module_knobs,
    updates=((*first, "adapter"), *rest),
    sequences=plan,
  )


def with_adapter(models: Models, adapter) -> Models:
  """The models, with the adapted teacher wherever the plain one is asked for."""

  def teacher(frozen, _, batch, mix=None):
    return models.teacher(frozen, adapter, batch, mix)

  return dataclasses.replace(models, teacher=teacher)
