"""What a run waits for before its first batch: rows tokenised, and rows found again.

    python benchmarks/rows.py --folder=runs/rows --output=rows.json
    python benchmarks/rows.py --folder=runs/rows --sizes=1000,30000 --processes=2

Each size is a jsonl file of made prompts and answers, some 76 tokens together. A first
start tokenises it; a second one does what a run does with rows that are kept: finds
them, draws the held-out ones, packs, digests, and makes the first batch. Each is a
process of its own, in which nothing else runs but the imports. Prints a table of
BENCHMARKS.md. Files and rows stay in the folder; a first start makes its rows anew.
"""

import argparse
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from okd_jax import models
from okd_jax.bench import measure
from okd_jax.config import read
from okd_jax.config.schema import DataSettings, EvalSettings
from okd_jax.data import PAD_ID, embedded, make_tokenizer, rows, train_loader
from okd_jax.data.sources import load_records
from okd_jax.errors import UserError
from okd_jax.run.data import Data, read_data
from okd_jax.run.outline import Outline
from okd_jax.runtime import cli, files

_LENGTH, _BATCH = 512, 32
_WORDS = (6, 24)  # of a prompt and of an answer, on average
_TOKENIZER = Path(__file__).parents[1].parent / "shared/tokenizers/gpt2"


def main(arguments: list[str]) -> None:
  """Measures all sizes, or one start of one size in this very process."""
  args = _parser().parse_args(arguments)
  if args.start:
    print(json.dumps(_start(args)))
    return
  sizes = sorted(int(size) for size in args.sizes.split(","))
  found = []
  for size in sizes:
    _make(Path(args.folder) / f"{size}.jsonl", size, args.seed)
    for processes in map(int, args.processes.split(",")):
      found += [_measured(args, size, processes, name) for name in ("first", "second")]
      print(json.dumps(found[-2:]), file=sys.stderr, flush=True)
  print(_table(found))
  if args.output:
    environment = measure.environment()
    files.write_json(args.output, {"environment": environment, "starts": found})


def _make(path: Path, size: int, seed: int) -> None:
  """Writes the file, unless it is there."""
  if path.exists():
    return
  path.parent.mkdir(parents=True, exist_ok=True)
  words = [w for row, _ in embedded.rows("train") for w in row["output"].split()]
  rng, some = random.Random(seed), path.with_suffix(".partial")
  with some.open("w", encoding="utf-8") as file:
    for _ in range(size):
      texts = []
      for mean in _WORDS:
        count, start = rng.randint(1, 2 * mean - 1), rng.randrange(len(words))
        texts.append(" ".join(words[start : start + count]))
      row = {"prompt": texts[0] + "\n", "completion": texts[1]}
      file.write(json.dumps(row) + "\n")
  some.rename(path)


def _measured(
  args: argparse.Namespace, size: int, processes: int, start: str
) -> dict[str, Any]:
  """What one start took, in a process of its own."""
  kept = Path(args.folder) / f"rows-{size}-{processes}"
  if start == "first":
    shutil.rmtree(kept, ignore_errors=True)
  command = [sys.executable, __file__, f"--start={start}", f"--folder={args.folder}"]
  command += [f"--sizes={size}", f"--processes={processes}", f"--seed={args.seed}"]
  command += [f"--tokenizer={args.tokenizer}"]
  env = {"PYTHONPATH": os.getcwd()} | os.environ | {"OKD_JAX_ROWS": str(kept)}
  done = subprocess.run(command, env=env, capture_output=True, text=True)
  if done.returncode:
    raise UserError(f"{' '.join(command)} failed: {done.stderr}")
  return json.loads(done.stdout.splitlines()[-1])


def _start(args: argparse.Namespace) -> dict[str, Any]:
  """One start here and now."""
  source = str(Path(args.folder) / f"{args.sizes}.jsonl")
  if args.tokenizer.startswith("bpe:"):
    tokenizer = make_tokenizer(args.tokenizer, load_records("embedded"))
  else:
    tokenizer = models.load_tokenizer(args.tokenizer)
  shape = models.preset(family="gpt2", vocab_size=len(tokenizer))
  outline = Outline(tokenizer, shape, {})
  config = read.defaults()
  data = config.data.to_dict() | {"train": [source], "num_proc": int(args.processes)}
  data |= {"max_length": _LENGTH, "overlong_prompt": "truncate", "pack": True}
  settings = DataSettings(**data), EvalSettings(**config.eval.to_dict())
  found, measures = _timed(lambda: _first_batch(read_data(*settings, outline)))
  told = {"start": args.start, "rows": int(args.sizes), "tokens": _tokens(found)}
  return told | {"processes": int(args.processes)} | measures


def _first_batch(found: Data) -> Data:
  """What `run.build` and `run.loop` do with rows until the first step."""
  rows.digest(found.train), rows.digest(found.eval)
  loader = train_loader(
    found.train,
    batch_size=_BATCH,
    length=_LENGTH,
    pad_id=PAD_ID,
    packs=found.packs,
    seed=0,
  )
  next(loader)
  return found


def _tokens(found: Data) -> float:
  return float(rows.column(found.train, "length").mean())


def _timed(work: Callable[[], Data]) -> tuple[Data, dict[str, float]]:
  """The result and seconds by the clock and by the CPUs, and the peak in MB."""
  begun, cpu = time.monotonic(), _cpu()
  found = work()
  wall, used = time.monotonic() - begun, _cpu() - cpu
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
  return found, {"wall_s": wall, "cpu_s": used, "peak_mb": peak}


def _cpu() -> float:
  """CPU seconds of this process and of those it has waited for."""
  who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
  return sum(u.ru_utime + u.ru_stime for u in map(resource.getrusage, who))


def _table(found: list[dict[str, Any]]) -> str:
  """Each start beside that of the fewest rows."""
  names = ["start", "rows", "tokens a row", "processes", "s", "CPU s", "rows a CPU s"]
  names += ["s more", "MB more"]
  lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
  for one in sorted(found, key=lambda x: (x["start"], x["processes"], x["rows"])):
    same = [x for x in found if x["start"] == one["start"]]
    least = min(
      (x for x in same if x["processes"] == one["processes"]), key=lambda x: x["rows"]
    )
    rate = f"{one['rows'] / one['cpu_s']:,.0f}" if one["start"] == "first" else "–"
    more = [f"{one[k] - least[k]:.{d}f}" for k, d in (("wall_s", 1), ("peak_mb", 0))]
    cells = [one["start"], f"{one['rows']:,}", f"{one['tokens']:.0f}"]
    cells += [one["processes"], f"{one['wall_s']:.1f}", f"{one['cpu_s']:.1f}", rate]
    lines.append(f"| {' | '.join(map(str, [*cells, *more]))} |")
  return "\n".join(lines)


def _parser() -> cli.Parser:
  parser = cli.Parser(
    prog="python benchmarks/rows.py",
    description="Measures how long rows keep a run from its first batch.",
  )
  add = parser.add_argument
  add("--folder", required=True, help="for the files and the tokenised rows")
  add("--sizes", default="1000,30000,1000000", help="rows of each file")
  add("--processes", default="1,2", help="that tokenise, as data.num_proc")
  own = str(_TOKENIZER) if _TOKENIZER.is_dir() else "bpe:8192"
  add("--tokenizer", default=own, help="a folder, or bpe:N, trained on our own texts")
  add("--seed", type=int, default=0, help="of the made rows")
  add("--output", default="", help="write the figures to this JSON file")
  add("--start", choices=("first", "second"), help="of one size, in this process")
  return parser


if __name__ == "__main__":
  cli.run(main)
