"""How many rows a dataset takes packed and unpacked, and what they hold.

    python benchmarks/packing.py --tokenizer=../shared/tokenizers/gpt2 \\
      ../shared/data/train/*.jsonl

Prints a table of BENCHMARKS.md. What a step gains by it is measured by
`benchmarks/methods.py --names=okd,okd@data.pack=True`.
"""

import argparse
import time
from pathlib import Path

import numpy as np

from okd_jax import models
from okd_jax.data import load_records, pack, positions, prepare
from okd_jax.runtime import cli


def main(arguments: list[str]) -> None:
  """Packs each file at each length."""
  args = _parser().parse_args(arguments)
  tokenizer = models.load_tokenizer(args.tokenizer)
  print("| data | row | texts | packed rows | padding | packed | trained | packing |")
  print("|---|---|---|---|---|---|---|---|")
  for path in args.files:
    records = load_records([path])
    for length in args.lengths:
      print(_line(Path(path).name, records, tokenizer, length), flush=True)


def _line(name: str, records, tokenizer, length: int) -> str:
  texts, _ = prepare(
    records,
    tokenizer,
    name=name,
    template="default",
    max_length=length,
    max_prompt_length=length // 2,
    overlong_prompt="drop",
    overlong_row="truncate",
  )
  lengths = np.array([positions(text) for text in texts])
  start = time.perf_counter()
  rows = pack(lengths, length)
  elapsed = time.perf_counter() - start
  tokens = lengths.sum()
  trained = sum(len(text.tokens) - max(text.prompt_length, 1) for text in texts)
  return (
    f"| {name} | {length} | {len(texts)} | {len(rows)} | "
    f"{100 * (1 - tokens / (length * len(texts))):.1f} % | "
    f"{100 * (1 - tokens / (length * len(rows))):.1f} % | "
    f"{100 * trained / tokens:.0f} % | {1e3 * elapsed:.0f} ms |"
  )


def _parser() -> argparse.ArgumentParser:
  parser = cli.Parser(
    prog="python benchmarks/packing.py",
    description="Counts the rows that a dataset takes, packed and unpacked.",
  )
  add = parser.add_argument
  add("files", nargs="+", help="jsonl or txt files, or ids of datasets")
  add("--tokenizer", required=True, help="model or folder with a tokenizer")
  add("--lengths", type=int, nargs="+", default=[256, 512], help="tokens of a row")
  return parser


if __name__ == "__main__":
  cli.run(main)
