"""Eight simulated devices, rank promotion as an error, and a place for programs."""

import os
from pathlib import Path

os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
# Commands that tests start compile the same programs over and over.
_CACHE = Path(__file__).parents[1] / ".pytest_cache" / "xla"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
# Tests build the same tiny programs again and again: keep even the quickest ones.
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

SHARED = Path(__file__).parents[1].parent / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
  """The folder of real models and data beside the checkout; skips without it."""
  if not SHARED.is_dir():
    pytest.skip("needs the shared models and data beside the checkout")
  return SHARED
