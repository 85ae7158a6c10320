"""A study: runs that differ in a few keys, each with several seeds.

A study's recipe has, beside get_config(), what all of them share, a get_study() that
returns the keywords of `Study` below: its arms, and what is to be measured of each.
"""

import dataclasses
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from okd_jax.config import read
from okd_jax.config.schema import DataSettings
from okd_jax.config.stages import stage_path, stages
from okd_jax.errors import UserError
from okd_jax.evaluation.held_out import Options

_RUNS = "runs"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
  """What is compared.

  name: of the recipe.
  about: its docstring.
  config: what all runs share; its stages are trained once.
  arms: what each changes, keys and values by the arm's name.
  seeds: so many, 0, 1, …; of a run's training and of the text that it samples.
  baseline: the arm that all are compared with, seed by seed.
  unit: the arm whose time for a step is 1.
  sets: held-out data to answer, by name; with them the protocol of MiniLLM and OKD,
    five draws at temperature 1.
  protocol: other fields of `evaluation.held_out.Options`.
  excess: new tokens over which exposure bias is measured; 0 leaves it out.
  judge: a model that reads the students' own text, 'stage:NAME' or a path.

  Raises:
    UserError: for an arm, a seed or a set that cannot be.
  """

  name: str
  about: str
  config: ConfigDict
  arms: Mapping[str, Mapping[str, Any]]
  seeds: int = 5
  baseline: str = "kd"
  unit: str = "okd"
  sets: Mapping[str, str] = dataclasses.field(default_factory=dict)
  protocol: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  excess: int = 16
  judge: str = ""

  def __post_init__(self):
    if self.seeds < 1 or not self.arms:
      raise UserError(f"study {self.name}: it needs an arm and a seed")
    for role in ("baseline", "unit"):
      arm = getattr(self, role)
      if arm not in self.arms:
        known = ", ".join(self.arms)
        raise UserError(f"study {self.name}: {role} {arm!r} is none of {known}")
    if bad := [arm for arm in self.arms if {*"/:\\"} & {*arm} or arm.startswith(".")]:
      raise UserError(f"study {self.name}: arm {bad[0]!r} cannot name a folder")
    if not self.held_out:
      raise UserError(f"study {self.name}: data.eval must name its held-out rows")
    Options(**self.protocol)

  @property
  def held_out(self) -> list[str]:
    """Where the rows come from that every run is judged on."""
    return self._data.eval_sources

  @property
  def columns(self) -> dict[str, str]:
    """What those rows call our keys."""
    return self._data.renames

  @property
  def _data(self) -> DataSettings:
    return DataSettings(**self.config.data.to_dict())


@dataclasses.dataclass(frozen=True)
class Job:
  """One run of a study.

  name: 'stage:NAME', or 'ARM:SEED'.
  judge: path of the study's judge, '' for none.
  """

  name: str
  config: ConfigDict
  workdir: Path
  judge: str = ""

  @property
  def arm(self) -> str:
    """'' of a stage."""
    return "" if self.name.startswith("stage:") else self.name.rpartition(":")[0]

  @property
  def seed(self) -> int:
    return int(self.name.rpartition(":")[2])


def load(spec: str, arguments: list[str]) -> Study:
  """The study of a recipe, with --config.key=value … set in what all runs share.

  Raises:
    UserError: if there is no such recipe, or it is no study.
  """
  config, names = read.run_recipe(spec)
  if "get_study" not in names:
    raise UserError(f"--config={spec} has no get_study(): it is a run, not a study")
  config = read.parsed(config, arguments)
  about = inspect.cleandoc(names.get("__doc__") or spec)
  return Study(
    name=Path(spec.partition(":")[0]).stem,
    about=about,
    config=config,
    **names["get_study"](),
  )


def select(study: Study, arms: str, seeds: int) -> Study:
  """The study with some of its arms, and so many seeds; '' and 0 leave them.

  arms: names by semicolons, since an arm's own name may have a comma.
  """
  chosen = [name.strip() for name in arms.split(";") if name.strip()]
  if unknown := [name for name in chosen if name not in study.arms]:
    raise UserError(f"--arms: {unknown[0]!r} is none of {'; '.join(study.arms)}")
  kept = {name: study.arms[name] for name in chosen or study.arms}
  roles = {
    role: getattr(study, role) if getattr(study, role) in kept else next(iter(kept))
    for role in ("baseline", "unit")
  }
  return dataclasses.replace(study, arms=kept, seeds=seeds or study.seeds, **roles)


def jobs(study: Study, workdir: Path) -> list[Job]:
  """All runs: the shared stages, then every arm with the first seed, and so on.

  Raises:
    UserError: for a key of an arm that does not exist.
  """
  *before, _ = stages(study.config, workdir)
  judge = stage_path(study.judge, "judge", dict.fromkeys(study.config.stages), workdir)
  found = [Job(f"stage:{part.name}", part.config, part.workdir) for part in before]
  for seed in range(study.seeds):
    for arm, changes in study.arms.items():
      config = study.config.copy_and_resolve_references()
      config.stages = _ordered(study.config)
      config.lock()
      keys = {"train.seed": seed} | dict(changes)
      try:
        config = read.changed(config, keys)
      except UserError as error:
        raise UserError(f"arm {arm}: {error}") from error
      own = stages(config, workdir)[-1].config
      place = workdir / _RUNS / arm / str(seed)
      found.append(Job(f"{arm}:{seed}", own, place, judge))
  return found


def _ordered(config: ConfigDict) -> ConfigDict:
  """The stages in their order, which a copy would lose."""
  kept = ConfigDict(sort_keys=False)
  for name in config.stages:
    kept[name] = config.stages[name]
  return kept


def named(jobs: list[Job], name: str) -> Job:
  """The job of that name; a UserError if there is none."""
  for job in jobs:
    if job.name == name:
      return job
  raise UserError(f"--run={name} is none of {', '.join(job.name for job in jobs)}")
