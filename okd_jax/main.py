"""Trains, evaluates and exports a student as a configuration file says.

    python -m okd_jax.main --config=configs/X.py --workdir=DIR [--config.key=value …]

The same command resumes a run that was stopped or killed. Every key is listed, with
its meaning, in configs/default.py. DIR gets config.json, metrics.jsonl, checkpoints/,
student/ (a Hugging Face folder), adapter/ (PEFT format, if there is an online module)
and report.html.
"""

import ctypes
import os
import platform
import re
import sys
from pathlib import Path

import jax
from absl import flags
from ml_collections import config_flags

from okd_jax import cli, train
from okd_jax.errors import UserError

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "configuration file, or file.py:variant", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run's results")


def main(arguments: list[str]) -> None:
  if {"--help", "-h", "--helpfull"} & set(arguments):
    print(f"{__doc__}\nKeys and defaults:\n{_default_keys()}", end="")
    return
  _parse(arguments)
  if _CONFIG.value is None or not _WORKDIR.value:
    raise UserError("--config=FILE and --workdir=DIR are both needed (see --help)")
  _keep_freed_memory()
  _use_compilation_cache()
  train.run(_CONFIG.value, Path(_WORKDIR.value))


def _parse(arguments: list[str]) -> None:
  """Reads the flags; the many ways in which that fails become a UserError."""
  # A configuration file may import its neighbours, wherever the command runs.
  sys.path.insert(0, os.getcwd())
  _check_file(arguments)
  try:
    rest = flags.FLAGS([sys.argv[0], *arguments])
  except (AttributeError, KeyError) as error:
    raise UserError(_unknown_key(error, arguments)) from error
  except (flags.Error, TypeError, ValueError) as error:
    # An error inside the file comes with its whole traceback as text: keep its end.
    raise UserError(str(error).strip().splitlines()[-1]) from error
  if rest[1:]:
    raise UserError(f"unexpected arguments {' '.join(rest[1:])}; flags start with --")


def _check_file(arguments: list[str]) -> None:
  """Whether --config=FILE[:variant] names a file; ml_collections tells it worse."""
  for argument in arguments:
    name, _, value = argument.lstrip("-").partition("=")
    path = value.split(":")[0]
    if name == "config" and path and not Path(path).is_file():
      raise UserError(f"--config={value}: there is no file {path}")


def _unknown_key(error: Exception, arguments: list[str]) -> str:
  """Names the whole flag, since the error knows only its last part."""
  text = str(error.args[0] if error.args else error)
  key = re.search(r"'?(\w+)", text)
  named = [a for a in arguments if key and f".{key[1]}" in a.split("=")[0]]
  hint = re.search(r"Did you mean \"(\w+)\"", text)
  if not named:
    return f"the configuration has no {text!r}"
  flag = named[0].split("=")[0]
  if not hint:
    return f"{flag} is no configuration key; configs/default.py lists them all"
  near = re.sub(rf"\b{key[1]}\b", hint[1], flag)
  return f"{flag} is no configuration key; did you mean {near}?"


def _use_compilation_cache() -> None:
  """Compiled programs outlive the process, unless the environment says otherwise."""
  if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    folder = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    jax.config.update("jax_compilation_cache_dir", str(folder / "okd_jax" / "xla"))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _keep_freed_memory() -> None:
  """Stops glibc from handing each step's buffers back to the kernel.

  On CPU XLA allocates every temporary anew; unless freed memory stays with the
  process, a quarter of the time goes to page faults (BUILD_NOTES.md, 2026-11-22).
  It must come before XLA starts its threads, since each takes an arena of its own.
  """
  if platform.libc_ver()[0] != "glibc":
    return
  mallopt = ctypes.CDLL(None).mallopt
  trim_threshold, mmap_max, arena_max = -1, -4, -8  # names in <malloc.h>
  mallopt(arena_max, 1)
  mallopt(mmap_max, 0)
  mallopt(trim_threshold, 2**31 - 1)


def _default_keys() -> str:
  """configs/default.py as the list of its keys."""
  path = Path(__file__).parents[1] / "configs" / "default.py"
  if not path.exists():
    return "  see configs/default.py in the repository\n"
  lines = path.read_text(encoding="utf8").splitlines()
  wanted = [line.strip() for line in lines if line.startswith("  config.")]
  return "".join(f"  --{line}\n" for line in wanted if "= ConfigDict()" not in line)


if __name__ == "__main__":
  cli.run(main)
