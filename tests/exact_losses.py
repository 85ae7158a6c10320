"""A hundred losses of one small run, compared bit by bit with those of a file.

    python tests/exact_losses.py            # 0 if all are equal
    python tests/exact_losses.py --write    # they have moved on purpose: takes today's

OKD through the command, as a user calls it: float32, one CPU device, one thread of
XLA's, no instructions that only some processors have, so that other machines find the
same bits. There is a file for each version of JAX, tests/golden/exact-VERSION.json;
each loss stands there as a hexadecimal float, whole.
"""

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
STEPS = 100
CHANGES = {
  "data.holdout": 4,
  "data.max_length": 48,
  "data.max_prompt_length": 40,
  "data.overlong_prompt": "truncate",
  "teacher.model.hidden_size": 16,
  "teacher.model.num_layers": 2,
  "student.model.hidden_size": 8,
  "student.model.num_layers": 1,
  "train.steps": STEPS,
  "train.batch_size": 4,
  "train.log_every": 1,
  "checkpoint.every": 1000,
  "eval.every": 0,
  "eval.limit": 4,
  "eval.generate": False,
}
if __name__ == "__main__":
  # SSE4.2 is everywhere; wider units add in another order, and FMA rounds but once.
  os.environ["XLA_FLAGS"] = (
    "--xla_cpu_max_isa=SSE4_2 --xla_cpu_multi_thread_eigen=false"
  )
  os.environ["JAX_PLATFORMS"] = "cpu"
  sys.path.insert(0, str(ROOT))


# Of our own: the standard library's documentation differs from Python to Python.
ROWS = [
  {"prompt": f"Count from {i} to {i + 5}: ", "completion": f"{[*range(i, i + 6)]}"}
  for i in range(40)
]


def golden(version: str) -> Path:
  return ROOT / "tests" / "golden" / f"exact-{version}.json"


def measure() -> list[float]:
  """The losses of the run."""
  from okd_jax import main

  flags = [f"--config.{key}={value}" for key, value in CHANGES.items()]
  with tempfile.TemporaryDirectory() as folder:
    data = Path(folder, "rows.jsonl")
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    flags.append(f"--config.data.train={data}")
    with contextlib.redirect_stdout(io.StringIO()):
      main.main(["--config=configs/debug.py", f"--workdir={folder}/run", *flags])
    lines = Path(folder, "run/metrics.jsonl").read_text().splitlines()
  rows = [row for row in map(json.loads, lines) if row["kind"] == "train"]
  return [row["loss"] for row in rows]


def difference(kept: list[str], found: list[str]) -> str:
  """What differs, and what to do about it; '' where nothing does."""
  pairs = zip(kept, found, strict=True)
  wrong = [(i, *pair) for i, pair in enumerate(pairs, 1) if pair[0] != pair[1]]
  if not wrong:
    return ""
  step, old, new = wrong[0]
  return (
    f"{len(wrong)} of {len(kept)} losses have moved, first that of step {step}: "
    f"{float.fromhex(old)!r} there, {float.fromhex(new)!r} here. If that is not meant, "
    "the change that did it changes training. If it is, say why in BUILD_NOTES.md, run "
    "`python tests/exact_losses.py --write` with each version of JAX that has a file, "
    "and check the files in"
  )


def command(arguments: list[str]) -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--write", action="store_true", help="keep what comes out")
  args = parser.parse_args(arguments)
  import jax

  os.chdir(ROOT)
  path = golden(jax.__version__)
  found = [float(loss).hex() for loss in measure()]
  if args.write:
    path.write_text(json.dumps(found, indent=1) + "\n")
    return 0
  if not path.exists():
    print(
      f"there is no {path.name} for this version of JAX; write it with "
      "`python tests/exact_losses.py --write` at a commit whose losses are right"
    )
    return 2
  problem = difference(json.loads(path.read_text()), found)
  print(problem or "equal")
  return int(bool(problem))


if __name__ == "__main__":
  sys.exit(command(sys.argv[1:]))
