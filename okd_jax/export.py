"""A trained student as a Hugging Face folder, its online module as a PEFT folder.

A teacher whose own blocks learned is no PEFT adapter; it becomes a folder like the
student's.

python -m okd_jax.export --workdir=DIR --output=OUT [--step=N]
"""

from pathlib import Path

import jax
from ml_collections import ConfigDict

from okd_jax.config import read as configuration
from okd_jax.errors import UserError
from okd_jax.run import build as setup
from okd_jax.run import checkpoint
from okd_jax.run.export import export_run
from okd_jax.runtime import cli
from okd_jax.runtime.metrics import score_by


def main(arguments: list[str]) -> None:
  """Exports as the arguments say; a UserError if there is no such checkpoint."""
  args = _parser().parse_args(arguments)
  workdir = Path(args.workdir)
  path = workdir / "config.json"
  if not (workdir / "checkpoints").is_dir() or not path.exists():
    raise UserError(f"{workdir} is no run: it has no checkpoints/ or no config.json")
  config = ConfigDict(configuration.saved(path))
  parts = setup.build(config, workdir)
  keep = config.checkpoint.keep
  with (
    jax.set_mesh(parts.mesh),
    checkpoint.opened(
      workdir / "checkpoints", keep, score_by(config.eval.best), read_only=True
    ) as checkpoints,
  ):
    steps = checkpoints.steps()
    if not steps:
      raise UserError(f"{workdir}/checkpoints holds no whole checkpoint yet")
    step = args.step if args.step is not None else checkpoints.best_step()
    if step not in steps:
      raise UserError(f"--step={step}: the checkpoints at hand are {steps}")
    state = checkpoints.restore_step(step, parts.abstract, None, parts.mesh)
  export_run(
    parts, state.params, Path(args.output), Path(args.adapter) if args.adapter else None
  )


def _parser() -> cli.Parser:
  parser = cli.Parser(
    prog="okd_jax.export",
    description="Writes the student of one checkpoint as a Hugging Face folder.",
  )
  parser.add_argument("--workdir", required=True, help="of the run")
  parser.add_argument("--output", required=True, help="the folder to write")
  parser.add_argument(
    "--adapter",
    default="",
    help="a folder for the online module or the teacher whose own blocks learned",
  )
  parser.add_argument(
    "--step",
    type=int,
    default=None,
    help="default: the best by eval.best, else the newest",
  )
  return parser


if __name__ == "__main__":
  cli.run(main)
