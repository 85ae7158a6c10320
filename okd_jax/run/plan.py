"""Phase 5, the plan: apply functions, optimisers, schedule, steps, and state shapes."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping

import jax
import optax

from okd_jax import methods
from okd_jax.config.schema import TrainSettings
from okd_jax.methods import Models
from okd_jax.run import optim
from okd_jax.run.cast import Cast
from okd_jax.run.job import Job
from okd_jax.run.state import TrainState, random_state
from okd_jax.teachers.load import ONLY


@dataclasses.dataclass(frozen=True)
class Plan:
  """How a run trains.

  models: what a method sees of the cast; dropout is the training student's alone.
  optimizers: of each trained tree, by name.
  steps: in all.
  learning_rate: of a step, counted from 0.
  random: makes the state of step 0 with a random student.
  abstract: that state's shapes.
  """

  models: Models
  optimizers: Mapping[str, optax.GradientTransformation]
  steps: int
  learning_rate: Callable[[int], float]
  random: Callable[[], TrainState]
  abstract: TrainState


def make_plan(job: Job, cast: Cast, rows: int) -> Plan:
  """The plan of a run over so many rows; from shapes alone, nothing is computed.

  Raises:
    UserError: for a schedule that does not fit the steps.
  """
  settings, method = job.settings, job.method
  steps = count_steps(settings.train, rows)
  learning_rate = optim.schedule(settings.optim, steps)
  optimizers = {"student": optim.build(settings.optim, learning_rate)}
  if cast.adapted:
    every, scale = settings.adapter.every, settings.adapter.lr_scale
    # An adapter's nth update is in step n * every.
    optimizers["adapter"] = optim.build(
      settings.optim, lambda update: learning_rate(update * every), scale
    )
  optimizers |= {name: optax.adam(rate) for name, (_, rate) in method.trees.items()}
  random = functools.partial(
    random_state,
    settings.train.seed,
    cast,
    optimizers,
    method.trees,
    method.carried,
    settings.train.skips > 0,
  )
  models = make_models(job, cast)
  return Plan(models, optimizers, steps, learning_rate, random, jax.eval_shape(random))


def make_models(job: Job, cast: Cast) -> Models:
  """What a method sees of the cast."""
  settings, stored = job.settings, cast.stored.get("train")
  return methods.apply_functions(
    cast.student.clone(dropout=settings.train.dropout),
    cast.teachers,
    cast.adapted,
    settings.train.loss_chunk,
    stored.about["vocab_size"] if stored else None,
    job.one_row_in,
    settings.adapter.module_tokens,
    ONLY if settings.teacher.itself else "",
  )


def count_steps(train: TrainSettings, rows: int) -> int:
  """Steps of a run: train.steps, or those of train.epochs over so many rows."""
  if train.steps:
    return train.steps
  return max(1, math.ceil(train.epochs * rows / train.batch_size))
