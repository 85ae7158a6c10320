"""A configuration from the command line: --config=FILE and --config.key=value."""

import difflib
import json
import os
import runpy
import sys
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from okd_jax.errors import UserError

_WRONG = (flags.Error, AttributeError, KeyError, TypeError, ValueError)

_TEACHERS = "config.teachers."

DEFAULTS = Path(__file__).parents[1] / "configs" / "default.py"  # not in a wheel


def read(arguments: list[str]) -> ConfigDict:
  """The locked configuration that these flags describe; there may be no others.

  Raises:
    UserError: for a missing file, a key that does not exist, or a wrong value.
  """
  # A configuration file may import its neighbours, wherever the command runs.
  sys.path.insert(0, os.getcwd())
  arguments = _joined(arguments)
  given = dict(a.lstrip("-").partition("=")[::2] for a in arguments)
  foreign = [a for a in arguments if not a.lstrip("-").startswith(("config", "noconf"))]
  if foreign:
    raise UserError(f"unexpected arguments {' '.join(foreign)} (see --help)")
  if not given.get("config"):
    raise UserError("--config=FILE is needed (see --help)")
  path = given["config"].split(":")[0]
  if not Path(path).is_file():
    raise UserError(f"--config={given['config']}: there is no file {path}")
  plain = _parse([f"--config={given['config']}"], f"{path}: ")
  named = {k: v for k, v in given.items() if k.startswith(_TEACHERS)}
  for name in given:
    if name.startswith("config.") and name not in named:
      _check_key(name.split(".")[1:], plain)
  config = _parse([a for a in arguments if not a.lstrip("-").startswith(_TEACHERS)])
  # New names, which no flag can have.
  with config.unlocked():
    config.teachers.update({k.removeprefix(_TEACHERS): v for k, v in named.items()})
  return config


def saved(path: Path) -> dict:
  """A workdir's config.json; keys younger than the run have their defaults.

  Raises:
    UserError: if it is damaged.
  """
  try:
    values = json.loads(path.read_text(encoding="utf8"))
  except ValueError as error:
    raise UserError(f"{path} is damaged ({error}); name another workdir") from error
  if not DEFAULTS.exists():
    return values
  defaults = runpy.run_path(str(DEFAULTS))["get_config"]().to_dict()
  return _filled(values, json.loads(json.dumps(defaults)))


def _filled(values, defaults):
  """`values`, where these lack a key with that of `defaults`."""
  if not (isinstance(values, dict) and isinstance(defaults, dict)):
    return values
  both = {key: _filled(value, defaults.get(key)) for key, value in values.items()}
  return defaults | both


def _parse(arguments: list[str], prefix: str = "") -> ConfigDict:
  """Reads the flags; the ways in which that fails become a UserError."""
  values = flags.FlagValues()
  arguments = [sys.argv[0], *arguments]
  try:
    holder = config_flags.DEFINE_config_file(
      "config", flag_values=values, sys_argv=arguments, lock_config=True
    )
    values(arguments)
  except _WRONG as error:
    # An error inside the file comes with its whole traceback as text: keep its end.
    raise UserError(prefix + str(error).strip().splitlines()[-1]) from error
  return holder.value


def _joined(arguments: list[str]) -> list[str]:
  """'--config FILE' as '--config=FILE'; both are accepted."""
  joined = []
  for argument in arguments:
    if joined and joined[-1].startswith("--config") and "=" not in joined[-1]:
      if not argument.startswith("-"):
        joined[-1] += f"={argument}"
        continue
    joined.append(argument)
  return joined


def _check_key(path: list[str], config) -> None:
  for depth, key in enumerate(path):
    if not isinstance(config, ConfigDict) or key not in config:
      known = list(config) if isinstance(config, ConfigDict) else []
      near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
      better = ".".join(["--config", *path[:depth], *near, *path[depth + 1 :]])
      hint = f"did you mean {better}?" if near else "configs/default.py lists them all"
      raise UserError(f"--config.{'.'.join(path)} is no configuration key; {hint}")
    config = config[key]
