"""Eight simulated devices, rank promotion as an error, and the shared folder."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

os.environ["XLA_FLAGS"] = " ".join(
  [
    os.environ.get("XLA_FLAGS", ""),
    "--xla_force_host_platform_device_count=8",
    # Tests compile much and compute little.
    "--xla_backend_optimization_level=0",
  ]
)

# Tokenised rows of tests are nobody else's.
os.environ["OKD_JAX_ROWS"] = tempfile.mkdtemp(prefix="okd_jax_rows_")
atexit.register(shutil.rmtree, os.environ["OKD_JAX_ROWS"], ignore_errors=True)

import jax  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402

# Every annotated call of the package is checked while tests run: types, and shapes
# among the arguments and the result. Before anything of it is imported.
jaxtyping.install_import_hook("okd_jax", "checking.check")

jax.config.update("jax_numpy_rank_promotion", "raise")
# Programs for several CPU devices hang when they come out of the persistent cache
# (jax 0.10.2), so nothing here uses it; commands run as subprocesses do.
jax.config.update("jax_enable_compilation_cache", False)

SHARED = Path(__file__).parents[1].parent / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
  """The folder of real models and data beside the checkout; skips without it."""
  if not SHARED.is_dir():
    pytest.skip("needs the shared models and data beside the checkout")
  return SHARED


@pytest.fixture(scope="module", autouse=True)
def _few_programs():
  """Forgets compiled programs before there are too many.

  Each is some memory maps, of which Linux allows a process 65530; beyond that XLA
  crashes while it compiles.
  """
  yield
  maps = Path("/proc/self/maps")
  if maps.exists() and len(maps.read_bytes().splitlines()) > 25_000:
    jax.clear_caches()
