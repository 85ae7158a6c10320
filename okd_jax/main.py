"""Trains, evaluates and exports a student as a configuration says.

    python -m okd_jax.main --config=RECIPE --workdir=DIR [--config.key=value …] \\
        [--profile] [--coordinator=HOST:PORT --processes=N --process=I]

RECIPE is a file, configs/X.py, or the name of one that comes with the package; either
takes a variant: gpt2:base. The same command resumes a run that was stopped or killed.
DIR gets config.json, metrics.jsonl, checkpoints/, student/ (a Hugging Face folder),
adapter/ (PEFT format, if teachers adapt; teacher/ and blocks.json instead where blocks
of the teacher learned) and report.html. --profile adds profile/, a trace of the 3rd to
the 7th step from here on, to be opened at ui.perfetto.dev or in TensorBoard; the run's
results stay as they are. DIR may be on a store, gs://BUCKET/RUN or whatever fsspec
opens: the run then works in a copy under ~/.cache/okd_jax, kept equal to it.

Several processes, on one machine or many, make one run. On a TPU pod, under SLURM, in
an indexed Kubernetes job (with the extra k8s) and under Open MPI they find each other;
elsewhere say where process 0 is, how many there are, and which one this is, from 0.
--processes=1 joins nobody. All of them need the workdir and the models; launch/ has
scripts that start them.
"""

from okd_jax.config import read
from okd_jax.config.describe import help_page
from okd_jax.errors import UserError
from okd_jax.runtime import cli


def main(arguments: list[str]) -> None:
  """Runs the configuration that the arguments name; a UserError if it is wrong."""
  if page := help_page(__doc__, arguments):
    print(page, end="")
    return
  parser = cli.Parser(prog="okd_jax.main", add_help=False)
  parser.add_argument("--workdir", default="")
  parser.add_argument("--profile", action="store_true")
  cli.add_processes(parser)
  args, rest = parser.parse_known_args(arguments)
  config = read.read(rest)
  if not args.workdir:
    raise UserError("--workdir=DIR is needed: the folder of the run's results")
  # From here on all is needed, which takes seconds to import.
  from okd_jax.run import distill
  from okd_jax.run.stop import Signalled
  from okd_jax.runtime import mirror
  from okd_jax.runtime.workdir import writes

  with (
    cli.devices(args),
    Signalled() as stop,
    mirror.opened(args.workdir) as workdir,
  ):
    *_, result = distill.run(config, workdir, stop, args.profile)
    if writes():
      print(result, flush=True)


def command() -> None:
  """The console script."""
  cli.run(main)


if __name__ == "__main__":
  command()
