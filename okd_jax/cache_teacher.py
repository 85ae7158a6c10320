"""Stores what a teacher says about a run's data, so that training needs no teacher.

    python -m okd_jax.cache_teacher --config=configs/X.py --output=DIR [--k=32]
    python -m okd_jax.main --config=configs/X.py --config.teacher.cache=DIR --workdir=W

Of each token that counts: the K likeliest ids, their log-probabilities and the mass of
the rest, at method.temperature; rows to train on in DIR/train, those held out in
DIR/eval. The configuration is the run's own; where it names stages, --workdir is the
run that has finished them. Stopped and run again, it goes on with the missing rows.
"""

from pathlib import Path

import jax

from okd_jax.config import read
from okd_jax.config.stages import stages
from okd_jax.errors import UserError
from okd_jax.run.build import Run, build
from okd_jax.run.stop import Signalled
from okd_jax.runtime import cli
from okd_jax.runtime.files import local
from okd_jax.runtime.workdir import Workdir
from okd_jax.teachers import record
from okd_jax.teachers.store import Store


def main(arguments: list[str]) -> None:
  """Stores as the arguments say; a UserError for whatever is wrong with them."""
  args, rest = _parser().parse_known_args(arguments)
  own = stages(read.read(rest), local(args.workdir or args.output))[-1]
  if own.config.teacher.cache:
    raise UserError("teacher.cache is what this command writes: name it by --output")
  with cli.devices(args), Signalled() as stop:
    run = build(own.config, Workdir(own.workdir), stop)
    write(run, local(args.output), args.k, args.dtype)


def write(run: Run, folder: Path, k: int, dtype: str) -> dict[str, Store]:
  """The teacher cache of a run that has one teacher; see `record.write`."""
  if run.method.several or run.data.other:
    raise UserError(
      "a store holds the words of one teacher in the student's own tokens; set "
      "method.name=kd and teacher.path, and leave out method.cross_tokenizer"
    )
  if run.data.stream or run.settings.teacher.itself or not run.cast.teachers:
    raise UserError("only another teacher's words on rows, no data.stream, are stored")
  [(name, teacher)] = run.cast.teachers.items()
  parts = {"train": run.data.train} | ({"eval": run.data.eval} if run.data.eval else {})
  size = min(run.cast.vocab_sizes)
  given = teacher, run.cast.frozen[name], run.settings, run.mesh
  options = {"k": k, "dtype": dtype, "vocab_size": size, "heard": run.stop.heard}
  with jax.set_mesh(run.mesh):
    return record.write(parts, *given, folder, **options)


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
