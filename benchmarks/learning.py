"""Every method for a few hundred steps from one SFT start: what each of them learns.

    python -m configs.stories                    # once: the data
    python benchmarks/learning.py --config=configs/stories.py --folder=runs/learning

Each method is a run of okd_jax.main in a folder of its own, so that what was
interrupted goes on, and what is finished is not run again. Shows whether a method
lowers its own objective, and what that does to the held-out measures. Keys of the
configuration are set as for okd_jax.main. Prints a section of BENCHMARKS.md.
"""

import statistics
from pathlib import Path

from command import call, rows

from okd_jax import METHODS
from okd_jax.bench import measure
from okd_jax.errors import UserError
from okd_jax.runtime import cli

HELD_OUT = {
  "loss": "loss",
  "KL(teacher‖student)": "forward_kl",
  "KL(student‖teacher)": "reverse_kl",
  "ROUGE-L": "rougeL",
}


def main(arguments: list[str]) -> None:
  """Runs what has not been run, then prints the table."""
  args, changes = _parser().parse_known_args(arguments)
  if unknown := sorted(set(args.names) - set(METHODS)):
    raise UserError(
      f"--names={unknown[0]} is unknown; use {', '.join(sorted(METHODS))}"
    )
  folder = Path(args.folder)
  start = folder / "start"
  sft = ["--config.method.name=sft", f"--config.train.steps={args.start_steps}"]
  _train(args.config, start, [*changes, *sft])
  changes += ["--config.student.layers=0", f"--config.student.path={start}"]
  changes += ["--config.train.log_every=1"]
  for name in args.names:
    _train(args.config, folder / name, [*changes, f"--config.method.name={name}"])
  print(_section(args, folder))


def _train(config: str, workdir: Path, changes: list[str]) -> None:
  log = workdir.parent / f"{workdir.name}.log"
  call("main", log, f"--config={config}", *changes, f"--workdir={workdir}")


def _section(args, folder: Path) -> str:
  names = ["method", f"first {args.window}", f"last {args.window}"]
  names += ["lower by", *HELD_OUT]
  lines = [
    "### Learning",
    "",
    measure.describe(measure.environment()),
    "",
    f"| {' | '.join(names)} |",
    "|---" * len(names) + "|",
  ]
  start = rows(folder / args.names[0], "eval")[0]
  lines.append(_line("start", "–", "–", "–", *_held_out(start)))
  for name in args.names:
    losses = [row["loss"] for row in rows(folder / name, "train")]
    first, last = losses[: args.window], losses[-args.window :]
    before, after = statistics.fmean(first), statistics.fmean(last)
    cells = f"{before:.4f}", f"{after:.4f}", f"{before - after:.4f}"
    lines.append(_line(name, *cells, *_held_out(rows(folder / name, "eval")[-1])))
  return "\n".join(lines)


def _held_out(row: dict) -> list[str]:
  return [f"{row[key]:.3f}" if key in row else "–" for key in HELD_OUT.values()]


def _line(*cells: str) -> str:
  return f"| {' | '.join(cells)} |"


def _parser() -> cli.Parser:
  parser = cli.Parser(
    prog="python benchmarks/learning.py",
    description="Trains a student by every method and compares what they learn.",
    epilog="--config.key=value changes a key of the configuration.",
  )
  add = parser.add_argument
  add("--config", required=True, help="configuration file of the runs")
  add("--folder", required=True, help="holds a run's folder for every method")
  add(
    "--names",
    type=lambda text: text.split(","),
    default=sorted(METHODS),
  )
  add("--start_steps", type=measure.at_least(1), default=100, help="of the SFT start")
  add("--window", type=measure.at_least(1), default=20, help="steps that are averaged")
  return parser


if __name__ == "__main__":
  cli.run(main)
