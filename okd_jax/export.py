"""Exports the student of one checkpoint; needs no data and hardly any other weights.

python -m okd_jax.export --workdir=DIR --output=OUT [--step=N]
"""

from okd_jax.config import read
from okd_jax.errors import UserError
from okd_jax.runtime import cli
from okd_jax.runtime.files import local

FOLDERS = {
  "adapter": "the adapter, or the trained teacher",
  "merge": "the teacher with its adapter merged in",
  "student_adapter": "the LoRA of the student",
}


def main(arguments: list[str]) -> None:
  """Exports as the arguments say; a UserError if there is no such checkpoint."""
  args = _parser().parse_args(arguments)
  # From here on all is needed, which takes seconds to import.
  import jax

  from okd_jax import models
  from okd_jax.run import card, export, identity
  from okd_jax.run.build import build_shapes
  from okd_jax.runtime import mirror
  from okd_jax.runtime.workdir import Workdir

  card.check_name(args.push_to_hub, args.public)
  workdir = Workdir(mirror.fetched(args.workdir))
  if not workdir.checkpoints.is_dir() or not workdir.config.exists():
    raise UserError(f"{workdir.path} is no run: no checkpoints/ or no config.json")
  identity.growth(read.saved(workdir.config).to_dict(), workdir)  # is it that run's?
  shapes = build_shapes(read.saved(workdir.config), workdir)
  with jax.set_mesh(shapes.mesh):
    state, output = export.restored(shapes, workdir, args.step), local(args.output)
    exported = workdir.student.exists()
    template = models.template_of(workdir.student) if exported else None
    about = card.of_student(shapes.job.settings, workdir.path, int(state.step))
    export.export_student(shapes, state.params, output, template, about)
    for flag in FOLDERS:
      if folder := getattr(args, flag):
        export.WRITERS[flag](shapes, state.params, local(folder))
  if args.push_to_hub:
    print(card.push(output, args.push_to_hub, args.public))


def _parser() -> cli.Parser:
  parser = cli.Parser(
    prog="okd_jax.export",
    description="Writes the student of one checkpoint as a Hugging Face folder.",
  )
  add = parser.add_argument
  add("--workdir", required=True, help="of the run")
  output = "the folder to write, or a file: S.gguf (float16), S.q8_0.gguf, S.f32.gguf"
  add("--output", required=True, help=output)
  for flag, what in FOLDERS.items():
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
