"""Stands in for what launch/ calls: programs that write down how they were called."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
OURS = ("PYTHON", "DEVICES", "PORT", "GRACE", "CUDA_VISIBLE_DEVICES", "XLA_FLAGS")


def tool(name: str) -> str:
  """A program that a wheel of the extra `test` brought."""
  return str(Path(sys.executable).with_name(name))


def stub(path: Path, body: str) -> Path:
  """A program at `path` that runs `body` in bash."""
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(f"#!/usr/bin/env bash\n{body}\n")
  path.chmod(0o755)
  return path


def environment(first_on_path: Path | None = None, **changes: object) -> dict[str, str]:
  """A user's environment, with programs of `first_on_path` before all others."""
  env = {k: v for k, v in os.environ.items() if k not in OURS}
  if first_on_path:
    env["PATH"] = f"{first_on_path}:{env['PATH']}"
  return env | {k: str(v) for k, v in changes.items()}


def bash(*command: object, env=None, status=0, timeout=60):
  """Runs a script of launch/; a run that ended as it should."""
  done = subprocess.run(
    ["bash", *map(str, command)],
    env=env or environment(),
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=timeout,
  )
  assert done.returncode == status, done.stdout + done.stderr
  return done
