"""Commands and configurations of okd_jax as the benchmarks run them."""

import ast
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

from ml_collections import ConfigDict

from okd_jax.errors import UserError


def call(module: str, log: Path, *arguments: str) -> None:
  """Runs `python -m okd_jax.MODULE`, its output into log; a UserError if it fails."""
  print(log.with_suffix(""), file=sys.stderr, flush=True)
  log.parent.mkdir(parents=True, exist_ok=True)
  env = {"PYTHONPATH": os.getcwd()} | os.environ
  with log.open("w") as file:
    command = [sys.executable, "-m", f"okd_jax.{module}", *arguments]
    done = subprocess.run(command, stdout=file, stderr=file, env=env)
  if done.returncode:
    raise UserError(f"okd_jax.{module} failed; its last words are in {log}")


def rows(workdir: Path, kind: str) -> list[dict]:
  """The rows of one kind in a run's metrics.jsonl."""
  lines = (workdir / "metrics.jsonl").read_text(encoding="utf8").splitlines()
  return [row for row in map(json.loads, lines) if row["kind"] == kind]


def vary(config: ConfigDict, name: str) -> ConfigDict:
  """A copy for the method of 'NAME' or of 'NAME@KEY=VALUE@...', with these keys.

  Raises:
    UserError: for a key that does not exist, or a value of another type.
  """
  config = config.copy_and_resolve_references()
  config.method.name, *changes = name.split("@")
  for change in changes:
    key, _, value = change.partition("=")
    *path, last = key.split(".")
    try:
      section = functools.reduce(getattr, path, config)
      text = section.get_type(last) is str
      section[last] = value if text else ast.literal_eval(value)
    except (AttributeError, KeyError, SyntaxError, TypeError, ValueError) as error:
      raise UserError(
        f"--names={name}: {change!r} sets no key of configs/default.py to a value "
        "of its type"
      ) from error
  return config
