"""Where and how does a student differ from its teacher?

  python -m okd_jax.analyze --student=RUN --teacher=T --data=F.jsonl --output=DIR

Writes DIR/analysis.json and pictures: agreement and KL by the difficulty of a token,
exposure bias, calibration, and the likeliest tokens at a few places.
"""

from okd_jax.runtime import cli
from okd_jax.runtime.files import local, write_json


def main(arguments: list[str]) -> None:
  """Analyses as the arguments say."""
  args = vars(_parser().parse_args(arguments))
  # From here on all is needed, which takes seconds to import.
  import jax.numpy as jnp

  from okd_jax.analysis import pictures
  from okd_jax.analysis.pair import Options, analyse, places
  from okd_jax.data import load_records
  from okd_jax.data.sources import source_list
  from okd_jax.models import load, template_of
  from okd_jax.run import distill

  student, teacher, adapter, data, output = (
    args.pop(name) for name in ("student", "teacher", "adapter", "data", "output")
  )
  cli.use_compilation_cache()
  if args["template"] is None:
    args["template"] = template_of(student) or "default"
  args["positions"] = places(args["positions"])
  options, dtype = Options(**args), jnp.dtype(args["dtype"])
  found = analyse(
    load(student, dtype=dtype),
    load(teacher, dtype=dtype),
    adapter or distill.Result(local(student), {}).adapter,
    load_records(source_list(data)),
    options,
  )
  folder = local(output)
  write_json(folder / "analysis.json", found)
  pictures.draw(found, folder)
  print(pictures.table(found))
  print(f"\nfigures and pictures  {folder}")


def _parser() -> cli.Parser:
  parser = cli.Parser(prog="okd_jax.analyze", description=__doc__.partition("\n")[0])
  add = parser.add_argument
  add("--student", required=True, help="HF folder, hub id, .gguf file or run's workdir")
  add("--teacher", required=True, help="likewise; frozen, without its module")
  module = "PEFT folder of its online module; by default that of the student's run"
  add("--adapter", default="", help=module)
  add("--data", required=True, help="as data.train")
  add("--output", required=True, help="folder of the results")
  add("--template", help="as data.template; by default the run's own, or 'default'")
  add("--max_length", type=int, default=512, help="tokens of a row")
  add("--max_prompt_length", type=int, default=256, help="longer ones lose their start")
  add("--limit", type=int, default=0, help="first so many rows; 0 is all")
  add("--length", type=int, default=16, help="new tokens for exposure bias; 0: none")
  add("--seed", type=int, default=0, help="of the sampled text")
  where = "where the likeliest tokens are listed, ROW:POSITION by commas"
  add("--positions", type=str, default="", help=where)
  add("--batch_size", type=int, default=8, help="rows at once")
  cli.add_dtype(parser)
  return parser


def command() -> None:
  """The console script."""
  cli.run(main)


if __name__ == "__main__":
  command()
