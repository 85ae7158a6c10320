"""A table of BENCHMARKS.md from what `python -m okd_jax.plan --output=O.json` wrote.

python benchmarks/planned.py plans/*.json
"""

import argparse

from okd_jax.runtime import cli
from okd_jax.runtime.files import read_json

HEADS = (
  "weights",
  "devices",
  "rows x length",
  "best layout",
  "GB, of",
  "ms: compute, memory, links",
  "MFU overlapped, as scheduled, in turn",
  "tokens/s",
  "GB sent: in loops, once",
  "compiled, s",
)


def main(arguments: list[str]) -> None:
  """Prints a row for each plan, by what its compiler said."""
  parser = argparse.ArgumentParser()
  parser.add_argument("plans", nargs="+")
  files = parser.parse_args(arguments).plans
  print("| " + " | ".join(HEADS) + " |")
  print("|---" * len(HEADS) + "|")
  for file in files:
    print("| " + " | ".join(row(read_json(file))) + " |")


def row(plan: dict) -> list[str]:
  """The figures of one plan, in words."""
  best = plan["best"]
  times, layout = best["roofline"], best["layout"]
  sizes = ", ".join(f"{n} {s / 1e9:.2f} B" for n, s in plan["models"].items())
  mesh = " ".join(
    f"{a}{layout[a]}" for a in ("data", "fsdp", "tensor") if layout[a] > 1
  )
  parts = f" x{layout['microbatches']}" if layout["microbatches"] > 1 else ""
  remat = ", remat" if layout["remat"] else ""
  loops, once = (
    sum(s["bytes"] * s["times"] for s in best["sent"] if s["in_loop"] == loop) / 1e9
    for loop in (True, False)
  )
  total, room = best["memory"]["total"] / 1e9, plan["chip"]["hbm"] / 1e9
  ms = ", ".join(f"{1e3 * times[f'{n}_s']:.0f}" for n in ("compute", "hbm", "link"))
  ways = ("overlapped", "scheduled", "in_turn")
  mfu = ", ".join(
    f"{times[f'mfu_{way}']:.2f}" if f"mfu_{way}" in times else "–" for way in ways
  )
  return [
    sizes,
    plan["topology"],
    f"{plan['rows']} x {plan['length']}",
    f"{mesh or 'one'}, teacher {layout['teacher']}{remat}{parts}",
    f"{total:.1f}, {room:.1f}" + ("" if best["fits"] else " (does not fit)"),
    ms,
    mfu,
    f"{times['tokens_per_s_in_turn']:,.0f} to {times['tokens_per_s_overlapped']:,.0f}",
    f"{loops:.2f}, {once:.2f}",
    f"{best['compile_s']:.0f}",
  ]


if __name__ == "__main__":
  cli.run(main)
