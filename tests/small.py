"""A run that is even smaller than configs/debug.py, and its parts."""

from configs import debug
from okd_jax.run import build
from okd_jax.run.step import compile_step
from okd_jax.runtime.workdir import Workdir
from okd_jax.teachers import trunk


def config(**changes):
  config = debug.get_config()
  config.method.name = "kd"
  config.data.train = "embedded:eval"
  config.data.holdout = 8
  config.data.max_length = 96
  config.data.max_prompt_length = 80
  config.train.steps = 4
  config.unlock()
  config.update_from_flattened_dict(changes)
  return config


def built(config, folder):
  """The run of a configuration, ready for its loop."""
  return build.build(config, Workdir(folder))


def step_of(run, microbatches=1):
  """Its compiled step; the mesh must be set."""
  plan = run.plan
  return compile_step(
    run.method,
    plan.models,
    plan.optimizers,
    microbatches,
    plan.steps,
    plan.abstract,
    run.mesh,
  )


def opened(run):
  """Its trunk as it is before anything is computed."""
  return trunk.opened(run.method, run.cast, run.data, run.settings)


def kept(run):
  """Its whole trunk, or None if it keeps none."""
  if not run.settings.teacher.trunk:
    return None
  return trunk.complete(run.cast, run.data, run.settings, run.mesh, opened(run))
