"""What is torn in the cache of compiled programs does not stay there."""

import os
import subprocess
import sys
import warnings

import pytest

from okd_jax.runtime import cli

PROGRAM = """
import jax, jax.numpy as jnp
from okd_jax.runtime import cli

def main(arguments):
  cli.use_compilation_cache()
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  print(jax.jit(lambda x: jnp.sin(x) + 1)(2.0))

cli.run(main)
"""


@pytest.mark.slow
def test_a_torn_program_is_replaced_and_told(tmp_path):
  env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
  env |= {"JAX_COMPILATION_CACHE_DIR": str(tmp_path)}

  def start():
    done = subprocess.run(
      [sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done

  first = start()
  entries = sorted(tmp_path.glob("jit__lambda*-cache"))
  assert entries
  whole = [entry.stat().st_size for entry in entries]
  for entry in entries:
    entry.write_bytes(entry.read_bytes()[: entry.stat().st_size // 2])
  second = start()
  assert second.stdout == first.stdout
  assert "jit__lambda is torn: compiled anew" in second.stderr
  assert [entry.stat().st_size for entry in entries] == whole
  assert "torn" not in start().stderr


def test_other_warnings_are_shown_as_ever(tmp_path):
  (tmp_path / "jit_step-0-cache").touch()
  (tmp_path / "jit_steps-0-cache").touch()
  with warnings.catch_warnings(record=True) as shown:
    warnings.simplefilter("always")
    cli._remove_torn_entries(str(tmp_path))
    warnings.warn("something else", stacklevel=1)
    said = "Error reading persistent compilation cache entry for 'jit_step': E: x"
    warnings.warn(said, stacklevel=1)
  assert [str(one.message) for one in shown] == ["something else"]
  assert [path.name for path in tmp_path.iterdir()] == ["jit_steps-0-cache"]
