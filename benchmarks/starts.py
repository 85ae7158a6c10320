"""Where a student of stories260K starts: KL to the teacher at once, and after training.

    python -m configs.stories                    # once: the data
    python benchmarks/starts.py --folder=runs/starts

Each start is a run of configs/stories.py in a folder of its own: what was interrupted
goes on, and what is finished is not run again. Keys of the configuration are set as for
okd_jax.main. Prints a section of BENCHMARKS.md.
"""

import json
from pathlib import Path

from command import call, rows

from okd_jax.bench import measure
from okd_jax.runtime import cli

_RANDOM = {"layers": 0, "model.hidden_size": 64, "model.num_heads": 8}
STARTS = {
  "2 layers, evenly spaced": {"layers": 2},
  "2 layers, the top": {"layers": 2, "which_layers": "top"},
  "2 layers, the bottom": {"layers": 2, "which_layers": "bottom"},
  "3 layers, evenly spaced": {"layers": 3},
  "3 layers: 0, 1, 4": {"layers": 0, "which_layers": "0,1,4"},
  "5 layers, width 0.75": {"layers": 0, "width": 0.75},
  "5 layers, width 0.5": {"layers": 0, "width": 0.5},
  "5 layers, width 0.25": {"layers": 0, "width": 0.25},
  "3 layers, width 0.75": {"layers": 3, "width": 0.75},
  "3 layers at random": _RANDOM
  | {"model.num_layers": 3, "model.num_kv_heads": 4, "model.mlp_size": 172},
}


def main(arguments: list[str]) -> None:
  """Runs what has not been run, then prints the table."""
  args, changes = _parser().parse_known_args(arguments)
  changes = ["--config.method.name=kd", *changes]
  folder = Path(args.folder)
  for name, start in STARTS.items():
    own = [f"--config.student.{key}={value}" for key, value in start.items()]
    log = folder / f"{_file(name)}.log"
    where = f"--workdir={folder / _file(name)}"
    call("main", log, "--config=configs/stories.py", *own, *changes, where)
  print(_section(folder))


def _file(name: str) -> str:
  return name.replace(",", "").replace(":", "").replace(" ", "_")


def _section(folder: Path) -> str:
  names = [
    "start",
    "parameters",
    "KL(teacher‖student), step 0",
    "after the run",
    "loss",
  ]
  lines = [
    "## Starting points",
    "",
    measure.describe(measure.environment()),
    "",
    f"| {' | '.join(names)} |",
    "|---" * len(names) + "|",
  ]
  for name in STARTS:
    workdir = folder / _file(name)
    about = json.loads((workdir / "about.json").read_text(encoding="utf8"))
    size, scores = about["models"]["student"]["parameters"], rows(workdir, "eval")
    kl = [f"{row['forward_kl']:.3f}" for row in (scores[0], scores[-1])]
    cells = [name, f"{size:,}", *kl, f"{scores[-1]['loss']:.3f}"]
    lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines)


def _parser() -> cli.Parser:
  parser = cli.Parser(
    prog="python benchmarks/starts.py",
    description="Trains students by KD from different parts of their teacher.",
    epilog="--config.key=value changes a key of the configuration.",
  )
  parser.add_argument("--folder", required=True, help="holds a run's folder a start")
  return parser


if __name__ == "__main__":
  cli.run(main)
