"""What a run runs on, with which packages, and what it costs."""

import contextlib
import importlib.metadata
import json
import logging
import os
import platform
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from okd_jax.errors import UserError
from okd_jax.runtime.files import read_json
from okd_jax.runtime.workdir import Workdir

_log = logging.getLogger(__name__)
_PACKAGES = ("okd_jax", "jax", "flax", "optax", "orbax-checkpoint", "transformers")


def machine() -> dict[str, Any]:
  """The devices, and what of the host this process may use."""
  device = jax.devices()[0]
  own = getattr(os, "sched_getaffinity", None)  # not on macOS
  return {
    "device": device.device_kind,
    "devices": jax.device_count(),
    "processes": jax.process_count(),
    "cpus": len(own(0)) if own else os.cpu_count(),
  }


def versions() -> dict[str, str]:
  """Python's and the packages', those that are installed."""
  found = {"python": platform.python_version()}
  for name in _PACKAGES:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      found[name] = importlib.metadata.version(name)
  return found


def command() -> str:
  """The command line of this process, as a shell takes it."""
  return shlex.join(sys.orig_argv)


def commit() -> str:
  """The commit that this package is of, '' where nobody knows.

  pip knows it of what it installed from a repository; a checkout is asked by git, and
  '-dirty' says that files of it have changed since.
  """
  root = Path(__file__).resolve().parents[2]
  if not (root / ".git").exists():
    return _installed_from()
  ask = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
  try:
    done = subprocess.run(
      [*ask, "--exclude=*"], capture_output=True, text=True, timeout=10
    )
  except (OSError, subprocess.TimeoutExpired):
    return ""
  return done.stdout.strip() if not done.returncode else ""


def _installed_from() -> str:
  try:
    text = importlib.metadata.distribution("okd_jax").read_text("direct_url.json")
  except importlib.metadata.PackageNotFoundError:
    return ""
  return json.loads(text or "{}").get("vcs_info", {}).get("commit_id", "")


def peak() -> dict[str, Any]:
  """The most memory so far: of a device, or on CPU of the process."""
  used = [(device.memory_stats() or {}) for device in jax.local_devices()]
  peaks = [stats["peak_bytes_in_use"] for stats in used if "peak_bytes_in_use" in stats]
  if peaks:
    return {"peak_bytes": max(peaks), "of": "device"}
  kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  unit = 1 if sys.platform == "darwin" else 1024
  return {"peak_bytes": kilobytes * unit, "of": "process"}


def device_bytes() -> int:
  """What one device may hold, the same in every process; 0 where nobody says."""
  stats = jax.local_devices()[0].memory_stats() or {}
  mebibytes = np.int32(stats.get("bytes_limit", 0) >> 20)
  if jax.process_count() > 1:
    mebibytes = multihost_utils.broadcast_one_to_all(mebibytes)
  return int(mebibytes) << 20


@contextlib.contextmanager
def counted(workdir: Workdir) -> Iterator[None]:
  """Adds what the block costs to the run's cost.json, however the block ends.

  `seconds` are all that passed, over the run's parts; of `peak_bytes` the most stays.
  What a killed process took is not in it. A damaged file is told of and begun anew: no
  run is worth less than what it says.
  """
  began, before = time.monotonic(), _cost(workdir)
  try:
    yield
  finally:
    found = peak()
    if before.get("of") == found["of"]:
      found["peak_bytes"] = max(found["peak_bytes"], before["peak_bytes"])
    seconds = before.get("seconds", 0.0) + time.monotonic() - began
    workdir.write_json(workdir.cost, found | {"seconds": round(seconds, 1)})


def _cost(workdir: Workdir) -> dict[str, Any]:
  """What the run's earlier parts cost."""
  if not workdir.cost.exists():
    return {}
  try:
    found = read_json(workdir.cost)
    numbers = float(found["seconds"]), int(found["peak_bytes"])
    return {"seconds": numbers[0], "peak_bytes": numbers[1], "of": str(found["of"])}
  except (UserError, KeyError, TypeError, ValueError):
    _log.warning("%s is damaged: what the run has cost is counted anew", workdir.cost)
    return {}
