"""Compares methods over several seeds: one process a run, one table of all.

  python -m okd_jax.study --config=configs/studies/X.py --workdir=DIR \\
      [--arms='kd; okd'] [--seeds=N] [--jobs=N] [--config.key=value …]

Trains what all runs share once (DIR/stages), then every arm with every seed (DIR/runs),
measures each, and writes DIR/table.md, table.csv, study.json and report.html. The same
command goes on after it was stopped or killed; what is finished is not run again.
--run=NAME does one run alone and writes no table: for several machines that share DIR.
"""

import sys

from okd_jax.runtime import cli
from okd_jax.runtime.files import local


def main(arguments: list[str]) -> None:
  """Runs what is missing of a study and writes its table."""
  flags, keys = _parser().parse_known_args(arguments)
  # From here on all is needed, which takes seconds to import.
  from okd_jax.analysis import comparison, study_report, tables
  from okd_jax.config import study as studies
  from okd_jax.run import study as runs
  from okd_jax.run.stop import Signalled

  whole = studies.load(flags.config, keys)
  study = studies.select(whole, flags.arms, flags.seeds)
  jobs = studies.jobs(study, local(flags.workdir))
  cli.use_compilation_cache()
  with Signalled() as stop:
    if flags.run:
      runs.run(study, studies.named(jobs, flags.run), stop)
      return
    command = [sys.executable, "-m", "okd_jax.study", *arguments]
    runs.run_all(jobs, command, stop, flags.jobs)
  results = {job.name: runs.measured(job) for job in jobs if job.arm}
  found = comparison.compare(study, results)
  study_report.write(study, found, local(flags.workdir))
  print(tables.text(found))
  print(f"\nreport  {local(flags.workdir) / 'report.html'}")


def _parser() -> cli.Parser:
  parser = cli.Parser(
    prog="okd_jax.study",
    description="Compares methods over several seeds, each run in its own process.",
    epilog="--config.key=value sets a key in what all runs share, as in okd_jax.main.",
  )
  add = parser.add_argument
  add(
    "--config", required=True, help="a study: FILE.py, or studies/NAME of a shipped one"
  )
  add("--workdir", required=True, help="folder of all runs and of the table")
  add("--arms", default="", help="only these, by semicolons; all by default")
  count = cli.number(int, "at least 1", lambda n: n >= 1)
  add("--seeds", type=count, default=0, help="so many instead of the study's own")
  add("--jobs", type=count, default=1, help="runs at once; their times then tell less")
  add("--run", default="", help="one run alone, such as kd:0 or stage:teacher")
  return parser


def command() -> None:
  """The console script."""
  cli.run(main)


if __name__ == "__main__":
  command()
