"""The command `python -m okd_jax.bench`."""

import json

import jax

from okd_jax.bench import compilation, generate, loss, speculate, step
from okd_jax.bench.measure import Command, describe, environment
from okd_jax.config import read, schema
from okd_jax.runtime import cli
from okd_jax.runtime.files import write_text

COMMANDS = {
  "generate": Command("tokens/s of the sampler", generate.add_flags, generate.run),
  "speculate": Command(
    "a model's text with a smaller one that writes ahead",
    speculate.add_flags,
    speculate.run,
  ),
  "step": Command(
    "a training step beside its arithmetic", step.add_flags, step.run, True
  ),
  "loss": Command(
    "the chunked loss beside a dense one", loss.add_flags, loss.run, True
  ),
  "compile": Command(
    "time to compile a step, by depth", compilation.add_flags, compilation.run, True
  ),
}


def main(arguments: list[str]) -> None:
  """Runs the benchmark that the arguments name."""
  parser = _parser()
  flags, rest = parser.parse_known_args(arguments)
  command = COMMANDS[flags.command]
  foreign = [a for a in rest if not (command.configured and a.startswith("--config"))]
  if foreign:
    parser.error(f"unrecognized arguments: {' '.join(foreign)}")
  if command.configured:
    if not any(argument.startswith("--config=") for argument in rest):
      rest = ["--config=default", *rest]
    flags.config = read.read(rest)
    schema.check_values(flags.config)
  # A program read from the cache has no time of compilation.
  jax.config.update("jax_enable_compilation_cache", False)
  results, rows = command.measure(flags)
  where = environment()
  results = {"benchmark": flags.command} | where | results
  rows = {"machine": describe(where), **rows}
  width = max(map(len, rows))
  print(
    "\n".join(f"{name:<{width}}  {text}" for name, text in rows.items()), flush=True
  )
  if flags.output:
    write_text(flags.output, json.dumps(results, indent=2) + "\n")


def _parser() -> cli.Parser:
  parser = cli.Parser(
    prog="python -m okd_jax.bench",
    description="Measures the speed of one part of the package on this machine.",
  )
  commands = parser.add_subparsers(dest="command", required=True, metavar="BENCHMARK")
  for name, command in COMMANDS.items():
    part = commands.add_parser(name, help=command.help, description=command.help)
    command.add_flags(part)
    part.add_argument("--output", default="", help="write the results to this JSON")
  return parser


def command() -> None:
  """The console script."""
  cli.run(main)
