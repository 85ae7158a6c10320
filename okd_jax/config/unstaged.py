"""A run whose stages are not there yet, as if it began with what the stages begin with.

A stage changes weights and never a shape: for whoever plans a run, the model that a
stage starts from stands for the one that it will export.
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from okd_jax.config.stages import STAGE
from okd_jax.errors import UserError


def without_stages(config: ConfigDict) -> ConfigDict:
  """A copy in which 'stage:NAME' is the model that this stage's student starts from.

  Raises:
    UserError: for a stage that is none, or that starts from no model that has a name.
  """
  stages = {name: config.stages[name].to_dict() for name in config.stages}
  config = config.copy_and_resolve_references()
  config.stages = ConfigDict()
  for section in ("teacher", "student"):
    path = _start(config[section].path, f"{section}.path", stages)
    config[section].path = path
  for name, path in config.teachers.items():
    config.teachers[name] = _start(path, f"teachers.{name}", stages)
  return config


def _start(path: str, key: str, stages: Mapping[str, Mapping[str, Any]]) -> str:
  """The model at the beginning of the chain of stages."""
  seen: list[str] = []
  while path.startswith(STAGE):
    name = path.removeprefix(STAGE)
    start = stages.get(name, {}).get("student", {}).get("path", "")
    if name in seen or not start:
      raise UserError(
        f"{key}=stage:{name}: this stage starts from no model that a plan could read; "
        f"name one by --config.{key}=MODEL"
      )
    seen.append(name)
    path = start
  return path
