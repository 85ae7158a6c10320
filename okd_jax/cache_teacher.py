"""Stores what a teacher says about a run's data, so that training needs no teacher.

    python -m okd_jax.cache_teacher --config=configs/X.py --output=DIR [--k=32]
    python -m okd_jax.main --config=configs/X.py --config.teacher.cache=DIR --workdir=W

Of each token that counts: the K likeliest ids, their log-probabilities and the mass of
the rest, at method.temperature; rows to train on in DIR/train, those held out in
DIR/eval. The configuration is the run's own; where it names stages, --workdir is the
run that has finished them. Stopped and run again, it goes on with the missing rows.
"""

from okd_jax.config import read
from okd_jax.config.stages import stages
from okd_jax.errors import UserError
from okd_jax.runtime import cli
from okd_jax.runtime.files import local


def main(arguments: list[str]) -> None:
  """Stores as the arguments say; a UserError for whatever is wrong with them."""
  args, rest = _parser().parse_known_args(arguments)
  own = stages(read.read(rest), local(args.workdir or args.output))[-1]
  if own.config.teacher.cache:
    raise UserError("teacher.cache is what this command writes: name it by --output")
  # From here on all is needed, which takes seconds to import.
  from okd_jax.run import stored
  from okd_jax.run.build import build
  from okd_jax.run.stop import Signalled
  from okd_jax.runtime.workdir import Workdir

  with cli.devices(args), Signalled() as stop:
    run = build(own.config, Workdir(own.workdir), stop)
    stored.write(run, local(args.output), args.k, args.dtype)


def _parser() -> cli.Parser:
  parser = cli.Parser(
    prog="okd_jax.cache_teacher",
    description="Stores a teacher's likeliest tokens for the data of a run. Also takes "
    "--config=RECIPE and --config.key=value, as okd_jax.main does.",
  )
  add = parser.add_argument
  add("--output", required=True, help="folder of the store; gone on with if it is one")
  k = cli.number(int, "at least 0", lambda k: k >= 0)
  add("--k", type=k, default=32, help="tokens kept a position; 0 is all of them")
  kinds = dict(default="float16", choices=["float32", "float16", "bfloat16"])
  add("--dtype", help="of the log-probabilities", **kinds)
  add("--workdir", default="", help="a run whose finished stages the paths mean")
  cli.add_processes(parser)
  return parser


def command() -> None:
  """The console script."""
  cli.run(main)


if __name__ == "__main__":
  command()
