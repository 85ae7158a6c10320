"""Stages: the runs that come before a run, each an ordinary run in its own folder.

A stage is configs/default.py with what a run and its stages share, and with the stage's
own changes. Nothing else of the run reaches it: its method, teachers, adapters, what
chooses the best step and when to stop are its own.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from okd_jax.config.read import add_method_file, defaults
from okd_jax.errors import UserError

STAGE = "stage:"  # prefix of a path that means what an earlier stage exported
_SHARED = ("data", "train", "optim", "mesh", "checkpoint", "eval")
_OWN = {"eval": ("best", "patience")}  # of shared sections, what is not shared
_PATHS = (
  ("teacher", "path"),
  ("teacher", "adapter"),
  ("student", "path"),
  ("data", "tokenizer"),
)


@dataclasses.dataclass(frozen=True)
class Stage:
  """One run of several: its name, '' for the last, configuration and folder."""

  name: str
  config: ConfigDict
  workdir: Path


def stages(config: ConfigDict, workdir: Path) -> list[Stage]:
  """The stages that `config` names, in order, and at last the run itself.

  Raises:
    UserError: for a stage with unknown keys, or a path that means no stage.
  """
  base = config.copy_and_resolve_references()
  # Read from the original, since a copy would bring the stages into sorted order.
  changes = {name: config.stages[name].to_dict() for name in config.stages}
  base.stages = ConfigDict()
  return [
    *(_stage(name, base, changes, workdir) for name in changes),
    Stage("", _resolved(base, changes, workdir), workdir),
  ]


def untrained(part: Stage) -> dict[str, str]:
  """Of keys whose path is an earlier stage that has left no student yet, its name."""
  root, config = part.workdir.parents[1] if part.name else part.workdir, part.config
  paths = {f"{section}.{key}": config[section][key] for section, key in _PATHS}
  paths |= {f"teachers.{name}": path for name, path in config.teachers.items()}
  return {
    key: Path(path).name
    for key, path in paths.items()
    if path and Path(path) == _folder(root, Path(path).name)
    if not (Path(path) / "student").is_dir()
  }


def _stage(
  name: str, base: ConfigDict, changes: Mapping[str, Any], workdir: Path
) -> Stage:
  config = defaults()
  config.data.columns.unlock()  # their names are the user's own
  for section in _SHARED:
    own = _OWN.get(section, ())
    shared = {k: v for k, v in base[section].to_dict().items() if k not in own}
    config[section].update(shared)
  method = changes[name].get("method", {})
  if file := method.get("file", "") or (method and base.method.file):
    add_method_file(config, file)
  try:
    config.update(changes[name])
  except (AttributeError, KeyError, TypeError) as error:
    raise UserError(f"stage {name}: {str(error).splitlines()[0]}") from error
  return Stage(name, _resolved(config, changes, workdir), _folder(workdir, name))


def _resolved(
  config: ConfigDict, names: Mapping[str, Any], workdir: Path
) -> ConfigDict:
  """Puts the folders of earlier stages in the place of 'stage:NAME'."""
  for section, key in _PATHS:
    config[section][key] = stage_path(
      config[section][key], f"{section}.{key}", names, workdir
    )
  for name in config.teachers:
    config.teachers[name] = stage_path(
      config.teachers[name], f"teachers.{name}", names, workdir
    )
  return config


def stage_path(value: str, key: str, names: Mapping[str, Any], workdir: Path) -> str:
  """A path, the folder of an earlier stage in the place of 'stage:NAME'."""
  if not value.startswith(STAGE):
    return value
  name = value.removeprefix(STAGE)
  if name not in names:
    raise UserError(
      f"{key}={value!r}, but the stages are: {', '.join(names) or 'none'}"
    )
  return str(_folder(workdir, name))


def _folder(workdir: Path, name: str) -> Path:
  return workdir / "stages" / name
