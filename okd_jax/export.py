"""Exports the student of one checkpoint; needs no data and hardly any other weights.

python -m okd_jax.export --workdir=DIR --output=OUT [--step=N]
"""

import jax

from okd_jax import models
from okd_jax.config import read
from okd_jax.errors import UserError
from okd_jax.evaluation.figures import score_by
from okd_jax.run import card, checkpoint, export, identity
from okd_jax.run.build import Shapes, build_shapes
from okd_jax.run.state import TrainState
from okd_jax.runtime import cli, mirror
from okd_jax.runtime.files import local
from okd_jax.runtime.workdir import Workdir


def main(arguments: list[str]) -> None:
  """Exports as the arguments say; a UserError if there is no such checkpoint."""
  args = _parser().parse_args(arguments)
  card.check_name(args.push_to_hub, args.public)
  workdir = Workdir(mirror.fetched(args.workdir))
  if not workdir.checkpoints.is_dir() or not workdir.config.exists():
    raise UserError(f"{workdir.path} is no run: no checkpoints/ or no config.json")
  identity.growth(read.saved(workdir.config).to_dict(), workdir)  # is it that run's?
  shapes = build_shapes(read.saved(workdir.config), workdir)
  with jax.set_mesh(shapes.mesh):
    state, output = _restored(shapes, workdir, args.step), local(args.output)
    exported = workdir.student.exists()
    template = models.template_of(workdir.student) if exported else None
    about = card.of_student(shapes.job.settings, workdir.path, int(state.step))
    export.export_student(shapes, state.params, output, template, about)
    for flag, (write, _) in export.FOLDERS.items():
      if folder := getattr(args, flag):
        write(shapes, state.params, local(folder))
  if args.push_to_hub:
    print(card.push(output, args.push_to_hub, args.public))


def _restored(shapes: Shapes, workdir: Workdir, step: int | None) -> TrainState:
  settings = shapes.job.settings
  best, keep = score_by(settings.eval.best), settings.checkpoint.keep
  with checkpoint.opened(workdir.checkpoints, keep, best, read_only=True) as found:
    if not (steps := found.steps()):
      raise UserError(f"{workdir.checkpoints} holds no whole checkpoint yet")
    if step is None:
      return found.best(shapes.plan.abstract, shapes.mesh)[0]
    if step not in steps:
      raise UserError(f"--step={step}: the checkpoints at hand are {steps}")
    return found.restore_step(step, shapes.plan.abstract, shapes.mesh)


def _parser() -> cli.Parser:
  parser = cli.Parser(
    prog="okd_jax.export",
    description="Writes the student of one checkpoint as a Hugging Face folder.",
  )
  add = parser.add_argument
  add("--workdir", required=True, help="of the run")
  output = "the folder to write, or a file: S.gguf (float16), S.q8_0.gguf, S.f32.gguf"
  add("--output", required=True, help=output)
  for flag, (_, what) in export.FOLDERS.items():
    add(f"--{flag}", default="", metavar="DIR", help=f"a folder for {what}")
  repository = {"default": "", "metavar": "OWNER/NAME"}
  add("--push_to_hub", **repository, help="where --output goes, too")
  add("--public", action="store_true", help="for all to see; private otherwise")
  step = "default: the best by eval.best, else the newest"
  add("--step", type=int, default=None, help=step)
  return parser


def command() -> None:
  """The console script."""
  cli.run(main)


if __name__ == "__main__":
  command()
