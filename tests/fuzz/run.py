"""Thousands of inputs of every kind that somebody else may have made.

    python -m fuzz.run [--inputs=5200] [--seed=0] [--kinds=GGUF,adapters] [--output=F]

Each is tried in a process that handles many, with 2 GB of memory and 20 seconds for
one. Every input must be accepted, or be refused in a sentence; nothing may be written
but into the folder of the input, and nothing run. Prints a table by kind; status 1 if
an input did anything else. `--output` gets what broke something, for corpus.py.
"""

import argparse
import collections
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import IO

from fuzz.child import SECONDS

# In its order, so that this process need not import the package.
NAMES = ("jsonl", "json", "csv", "parquet, arrow", "templates", "overrides")
NAMES += ("safetensors, index", "config.json", "tokenizer", "GGUF", "adapters")
NAMES += ("prepared rows", "teacher caches")
ENDS = ("refused", "accepted", "traceback", "hang", "died", "strange")
_START = 180  # seconds that a process may take to begin


def main() -> int:
  parser = argparse.ArgumentParser(prog="fuzz.run", description=__doc__)
  parser.add_argument("--inputs", type=int, default=5200)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--kinds", default="", help="by semicolons; all of them")
  parser.add_argument("--output", default="", help="what broke something, as JSON")
  args = parser.parse_args()
  names = [name for name in args.kinds.split(";") if name] or NAMES
  left = dict.fromkeys(names, -(-args.inputs // len(names)))
  counts = {name: collections.Counter() for name in names}
  broken, seed = [], args.seed
  with tempfile.TemporaryDirectory(prefix="okd_fuzz_") as scratch:
    while any(left.values()):
      _one_process(Path(scratch), seed, left, counts, broken)
      seed += 1000
  _show(counts, broken)
  if args.output:
    Path(args.output).write_text(json.dumps(broken, indent=1))
  return int(bool(broken))


def _one_process(
  scratch: Path,
  seed: int,
  left: dict[str, int],
  counts: dict[str, collections.Counter],
  broken: list[dict],
) -> None:
  """Tries what is left, up to an input that ends the process or does not end."""
  home = {"HOME": str(scratch), "TMPDIR": str(scratch), "XDG_CACHE_HOME": str(scratch)}
  home["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, sys.path))
  home |= {"HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu", "OKD_JAX_ROWS": str(scratch)}
  kinds = [f"{name}={count}" for name, count in left.items() if count]
  child = subprocess.Popen(
    [sys.executable, "-m", "fuzz.child", str(scratch), str(seed), *kinds],
    stdout=subprocess.PIPE,
    stderr=subprocess.DEVNULL,
    stdin=subprocess.DEVNULL,
    env=os.environ
    | home
    | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
    cwd=scratch,
  )
  lines: queue.Queue = queue.Queue()
  threading.Thread(target=_forward, args=(child.stdout, lines), daemon=True).start()
  patience = _START
  try:
    while line := lines.get(timeout=patience):
      patience = 2 * SECONDS
      said = json.loads(line)
      name = said["kind"]
      left[name] -= 1
      end = "strange" if said["strange"] else said["end"]
      counts[name][end] += 1
      counts[name]["slowest"] = max(counts[name]["slowest"], said["seconds"])
      if end not in ("refused", "accepted"):
        broken.append(said)
    died = any(left.values())
  except queue.Empty:
    died = True
  child.kill()
  child.wait()
  if died:
    _note_death(scratch, child.returncode, left, counts, broken)


def _note_death(
  scratch: Path,
  code: int,
  left: dict[str, int],
  counts: dict[str, collections.Counter],
  broken: list[dict],
) -> None:
  """The input that was tried last, whose process has ended or been ended."""
  last = scratch / "last"
  if not last.exists():
    raise SystemExit(
      "the process that tries inputs does not start: python -m fuzz.child"
    )
  name, value = last.read_text("utf-8").split("\n", 1)
  last.unlink()
  left[name] = max(0, left[name] - 1)
  counts[name]["died"] += 1
  broken.append({"kind": name, "end": f"died ({code})", "value": value[:100_000]})


def _forward(stream: IO[bytes], lines: queue.Queue) -> None:
  for line in stream:
    lines.put(line)
  lines.put(None)


def _show(counts: dict[str, collections.Counter], broken: list[dict]) -> None:
  head = ["kind", "inputs", *ENDS, "slowest"]
  table = [head]
  for name, found in counts.items():
    numbers = [found[end] for end in ENDS]
    table.append([name, sum(numbers), *numbers, f"{found['slowest']:.1f} s"])
  whole = [sum(row[i] for row in table[1:]) for i in range(1, len(head) - 1)]
  table.append(["all", *whole, f"{max(c['slowest'] for c in counts.values()):.1f} s"])
  widths = [max(len(str(row[i])) for row in table) for i in range(len(head))]
  for row in table:
    print("  ".join(str(x).ljust(w) for x, w in zip(row, widths, strict=True)).rstrip())
  for said in broken:
    print(f"{said['kind']}: {said['end']}: {said.get('what')} ({said.get('where')})")


if __name__ == "__main__":
  sys.exit(main())
