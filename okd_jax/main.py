"""Trains, evaluates and exports a student as a configuration file says.

    python -m okd_jax.main --config=configs/X.py --workdir=DIR [--config.key=value …] \\
        [--profile]

The same command resumes a run that was stopped or killed. Every key is listed, with
its meaning, in configs/default.py. DIR gets config.json, metrics.jsonl, checkpoints/,
student/ (a Hugging Face folder), adapter/ (PEFT format, if there is an online module;
teacher/ and blocks.json instead where it is blocks of the teacher) and report.html.
--profile adds profile/, a trace of the 3rd to the 7th step from here on, to be opened
at ui.perfetto.dev or in TensorBoard; the run's results stay as they are.
"""

from pathlib import Path

from okd_jax.config import read as configuration
from okd_jax.errors import UserError
from okd_jax.run import loop as train
from okd_jax.runtime import cli


def main(arguments: list[str]) -> None:
  """Runs the configuration that the arguments name; a UserError if it is wrong."""
  if {"--help", "-h", "--helpfull"} & set(arguments):
    print(f"{__doc__}\nKeys and defaults:\n{_default_keys()}", end="")
    return
  parser = cli.Parser(prog="okd_jax.main", add_help=False)
  parser.add_argument("--workdir", default="")
  parser.add_argument("--profile", action="store_true")
  args, rest = parser.parse_known_args(arguments)
  config = configuration.read(rest)
  if not args.workdir:
    raise UserError("--workdir=DIR is needed: the folder of the run's results")
  cli.use_compilation_cache()
  train.run(config, Path(args.workdir), args.profile)


def _default_keys() -> str:
  """configs/default.py as the list of its keys."""
  if not configuration.DEFAULTS.exists():
    return "  see configs/default.py in the repository\n"
  lines = configuration.DEFAULTS.read_text(encoding="utf8").splitlines()
  wanted = [line.strip() for line in lines if line.startswith(("  config.", "  # "))]
  return "".join(
    f"  {line}\n" if line.startswith("#") else f"  --{line}\n"
    for line in wanted
    if "= ConfigDict(" not in line and "lock(" not in line
  )


if __name__ == "__main__":
  cli.run(main)
