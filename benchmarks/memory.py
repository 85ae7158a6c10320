"""Memory of a long run: the resident set of its process, step by step.

    python benchmarks/memory.py --steps=10000 --figure=memory.svg [--config.key=value …]

Runs configs/debug.py in a process of its own, reads /proc beside it, and prints the
resident memory at every tenth of the run, and how much it has grown since a tenth of
the steps was done: what leaks grows for ever. Linux alone has /proc.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import matplotlib
from command import rows

_EVERY = 0.2  # seconds from one look to the next


def main(arguments: list[str]) -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--steps", type=int, default=10_000)
  parser.add_argument("--figure", type=Path, help="where to draw it")
  parser.add_argument("--output", type=Path, help="a JSON file of [step, MB]")
  args, keys = parser.parse_known_args(arguments)
  with tempfile.TemporaryDirectory() as folder:
    found = watch(Path(folder) / "run", args.steps, keys)
  for tenth in range(1, 11):
    step, size = min(found, key=lambda one: abs(one[0] - tenth * args.steps // 10))
    print(f"step {step:6d}  {size:8.1f} MB")
  settled = [size for step, size in found if step >= args.steps // 10]
  print(f"grown since the first tenth: {settled[-1] - settled[0]:+.1f} MB")
  if args.output:
    args.output.write_text(json.dumps(found) + "\n")
  if args.figure:
    draw(found, args.figure)


def watch(workdir: Path, steps: int, keys: list[str]) -> list[tuple[int, float]]:
  """(step, MB) over a run's training, evaluations among it."""
  command = [sys.executable, "-m", "okd_jax.main", "--config=configs/debug.py"]
  command += [f"--workdir={workdir}", f"--config.train.steps={steps}"]
  command += ["--config.train.log_every=50", "--config.eval.every=1000"]
  command += ["--config.checkpoint.every=500", *keys]
  quiet = subprocess.DEVNULL
  process = subprocess.Popen(command, stdout=quiet, stderr=quiet)
  page, found = os.sysconf("SC_PAGE_SIZE"), []
  statm = Path(f"/proc/{process.pid}/statm")
  while process.poll() is None:
    time.sleep(_EVERY)
    try:
      size = int(statm.read_text().split()[1]) * page / 1e6
      step = rows(workdir, "train")[-1]["step"]
    except (OSError, IndexError, json.JSONDecodeError):  # not yet, or no more
      continue
    if not found or found[-1][0] != step:
      found.append((step, size))
  if process.returncode:
    raise SystemExit(f"the run ended with status {process.returncode}")
  return found


def draw(found: list[tuple[int, float]], path: Path) -> None:
  matplotlib.use("agg")
  from matplotlib import pyplot

  figure, axes = pyplot.subplots(figsize=(6, 3), layout="constrained")
  axes.plot(*zip(*found, strict=True))
  top = 1.15 * max(size for _, size in found)
  axes.set(xlabel="step", ylabel="resident memory, MB", ylim=(0, top))
  figure.savefig(path)


if __name__ == "__main__":
  main(sys.argv[1:])
