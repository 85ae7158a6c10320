"""Stores what a teacher says about a run's data, so that training needs no teacher.

    python -m okd_jax.cache_teacher --config=configs/X.py --output=DIR [--k=32]
    python -m okd_jax.main --config=configs/X.py --config.teacher.cache=DIR --workdir=W

Of each token that counts: the K likeliest ids, their log-probabilities and the mass of
the rest, of the distribution at method.temperature; the rows to train on in DIR/train,
those held out in DIR/eval. The configuration is the run's own; where it names stages,
--workdir is the run that has finished them. Killed and run again, the command goes on
with the rows that are missing. Each folder's about.json says what it was made of
(`okd_jax.store`).
"""

from pathlib import Path

import jax

from okd_jax.config import read as configuration
from okd_jax.errors import UserError
from okd_jax.run import build as setup
from okd_jax.run import loop as train
from okd_jax.runtime import cli
from okd_jax.teachers import record


def main(arguments: list[str]) -> None:
  """Stores as the arguments say; a UserError for whatever is wrong with them."""
  args, rest = _parser().parse_known_args(arguments)
  cli.use_compilation_cache()
  config = configuration.read(rest)
  *_, (_, config, workdir) = train.stages(config, Path(args.workdir or args.output))
  if args.k < 0:
    raise UserError(f"--k={args.k} must be at least 0")
  if config.teacher.cache:
    raise UserError("teacher.cache is what this command writes: name it by --output")
  run = setup.build(config, workdir)
  if run.method.teacher == "several" or run.reading:
    raise UserError(
      "a store holds the words of one teacher in the student's own tokens; set "
      "method.name=kd and teacher.path, and leave out method.cross_tokenizer"
    )
  if "teacher" not in run.decoders:
    raise UserError("the configuration names no teacher")
  with jax.set_mesh(run.mesh):
    record.write(run, Path(args.output), args.k, args.dtype)


def _parser() -> cli.Parser:
  parser = cli.Parser(
    prog="okd_jax.cache_teacher",
    description="Stores a teacher's likeliest tokens for the data of a run. Also takes "
    "--config=FILE and --config.key=value, as okd_jax.main does.",
  )
  add = parser.add_argument
  add("--output", required=True, help="folder of the store; gone on with if it is one")
  add("--k", type=int, default=32, help="tokens kept a position; 0 is all of them")
  add(
    "--dtype",
    default="float16",
    choices=("float32", "float16", "bfloat16"),
    help="of the log-probabilities",
  )
  add("--workdir", default="", help="a run whose finished stages the paths mean")
  return parser


if __name__ == "__main__":
  cli.run(main)
