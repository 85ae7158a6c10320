"""What is imported before anybody needs it: --help and wrong flags wait for no JAX."""

import json
import subprocess
import sys

import pytest

HEAVY = {"jax", "flax", "optax", "orbax", "transformers", "datasets", "grain", "scipy"}
HEAVY |= {"matplotlib", "pyarrow", "huggingface_hub", "fsspec", "etils"}

COMMANDS = ["analyze", "cache_teacher", "evaluate", "export", "generate", "lm_eval"]
COMMANDS += ["main", "plan", "prepare", "preview", "sample", "score", "study"]

CALL = """
import importlib, json, sys
command = importlib.import_module("okd_jax." + sys.argv.pop(1)).command
try:
  command()
except SystemExit as left:
  status = left.code or 0
else:
  status = 0
print(json.dumps([status, sorted({name.partition(".")[0] for name in sys.modules})]))
"""


def call(name: str, *arguments: str) -> tuple[int, set[str], str]:
  """(status, packages that were imported, what was said) of a command."""
  command = [sys.executable, "-c", CALL, name, *arguments]
  done = subprocess.run(command, capture_output=True, text=True, check=True)
  *said, last = done.stdout.splitlines()
  status, packages = json.loads(last)
  return status, set(packages), "\n".join(said) + done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_help_imports_nothing_heavy(name):
  status, packages, said = call(name, "--help")
  assert status == 0 and len(said) > 200
  assert not packages & HEAVY


@pytest.mark.parametrize("name", COMMANDS)
def test_a_wrong_flag_imports_nothing_heavy(name):
  status, packages, said = call(name, "--nosuch=1")
  assert status == 2 and said
  assert not packages & HEAVY


@pytest.mark.parametrize(
  "wrong, words",
  [
    ("--config.train.stepz=5", "did you mean --config.train.steps?"),
    ("--config.train.steps=many", "train.steps"),
    ("--config=nosuch", "no such file"),
  ],
)
def test_so_does_a_wrong_key(wrong, words):
  flags = [] if wrong.startswith("--config=") else ["--config=debug"]
  status, packages, said = call("main", *flags, wrong, "--workdir=w")
  assert status == 2 and words in said
  assert not packages & HEAVY


def test_the_package_itself_offers_all_it_has():
  code = "import okd_jax, sys; print('jax' in sys.modules, len(okd_jax.METHODS) > 9)"
  code += "; from okd_jax import losses, models, distill; print(dir(okd_jax))"
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  first, names = done.stdout.splitlines()
  assert first == "False True" and "distill" in names
