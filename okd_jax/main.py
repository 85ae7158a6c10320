"""Trains, evaluates and exports a student as a configuration file says.

    python -m okd_jax.main --config=configs/X.py --workdir=DIR [--config.key=value …]

The same command resumes a run that was stopped or killed. Every key is listed, with
its meaning, in configs/default.py. DIR gets config.json, metrics.jsonl, checkpoints/,
student/ (a Hugging Face folder), adapter/ (PEFT format, if there is an online module)
and report.html.
"""

import difflib
import os
import sys
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from okd_jax import cli, train
from okd_jax.errors import UserError

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "configuration file, or file.py:variant", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run's results")


def main(arguments: list[str]) -> None:
  """Runs the configuration that the arguments name; a UserError if it is wrong."""
  if {"--help", "-h", "--helpfull"} & set(arguments):
    print(f"{__doc__}\nKeys and defaults:\n{_default_keys()}", end="")
    return
  _parse(arguments)
  if _CONFIG.value is None or not _WORKDIR.value:
    raise UserError("--config=FILE and --workdir=DIR are both needed (see --help)")
  cli.use_compilation_cache()
  train.run(_CONFIG.value, Path(_WORKDIR.value))


def _parse(arguments: list[str]) -> None:
  """Reads the flags; the ways in which that fails become a UserError."""
  # A configuration file may import its neighbours, wherever the command runs.
  sys.path.insert(0, os.getcwd())
  _check_keys(arguments)
  try:
    rest = flags.FLAGS([sys.argv[0], *arguments])
  except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
    raise UserError(_last_line(error)) from error
  if rest[1:]:
    raise UserError(f"unexpected arguments {' '.join(rest[1:])}; flags start with --")


def _check_keys(arguments: list[str]) -> None:
  """Every --config.a.b must be a key of the configuration that --config names."""
  given = dict(a.lstrip("-").partition("=")[::2] for a in _joined(arguments))
  if "config" not in given:
    return
  path = given["config"].split(":")[0]
  if not Path(path).is_file():
    raise UserError(f"--config={given['config']}: there is no file {path}")
  values = flags.FlagValues()
  plain = config_flags.DEFINE_config_file(
    "config", flag_values=values, sys_argv=[sys.argv[0]]
  )
  try:
    values([sys.argv[0], f"--config={given['config']}"])
  except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
    raise UserError(f"{path}: {_last_line(error)}") from error
  for name in given:
    if name.startswith("config."):
      _check_key(name.split(".")[1:], plain.value)


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


def _last_line(error: Exception) -> str:
  # An error inside the file comes with its whole traceback as text: keep its end.
  return str(error).strip().splitlines()[-1]


def _default_keys() -> str:
  """configs/default.py as the list of its keys."""
  path = Path(__file__).parents[1] / "configs" / "default.py"
  if not path.exists():
    return "  see configs/default.py in the repository\n"
  lines = path.read_text(encoding="utf8").splitlines()
  wanted = [line.strip() for line in lines if line.startswith(("  config.", "  # "))]
  return "".join(
    f"  {line}\n" if line.startswith("#") else f"  --{line}\n"
    for line in wanted
    if "= ConfigDict(" not in line and "lock(" not in line
  )


if __name__ == "__main__":
  cli.run(main)
