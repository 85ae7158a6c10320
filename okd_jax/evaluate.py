"""How good is a student? Loss, distance to its teacher, and answers scored by ROUGE-L.

python -m okd_jax.evaluate --model=M --data=F.jsonl [--teacher=T]
python -m okd_jax.evaluate --model=M --sets NAME=F.jsonl … --protocol --answers=DIR
"""

import dataclasses
from pathlib import Path

from okd_jax.runtime import cli
from okd_jax.runtime.files import write_json


def main(arguments: list[str]) -> None:
  """Evaluates as the arguments say; a UserError for whatever is wrong with them."""
  parser = _parser()
  args = vars(parser.parse_args(arguments))
  names = ("model", "teacher", "data", "sets", "output", "template")
  path, teacher, data, sets, output, template = (args.pop(name) for name in names)
  # From here on all is needed, which takes seconds to import.
  from okd_jax.data import load_records
  from okd_jax.data.sources import source_list
  from okd_jax.evaluation.figures import table
  from okd_jax.evaluation.held_out import Options
  from okd_jax.evaluation.sets import beside_greedy, evaluate_sets, read_sets
  from okd_jax.models import load, template_of

  options = Options(**args, template=template or "default")
  if sets and options.predictions:
    parser.error("--predictions is for --data; --answers keeps those of all sets")
  files = {"output": output, "predictions": options.predictions}
  read = source_list(data) if data else []
  cli.check_places(parser, files, {"answers": options.answers}, read)
  named = read_sets(sets) if sets else {"": data}
  records = {name: load_records(source_list(x)) for name, x in named.items()}
  if not template:
    options = dataclasses.replace(options, template=template_of(path) or "default")
  cli.use_compilation_cache()
  model = load(path, dtype=options.dtype)
  beside = load(teacher, dtype=options.dtype) if teacher else None
  found = {}
  for name, results in evaluate_sets(model, records, options, beside, path):
    found[name or Path(path).name or path] = results
    if output:  # after every set, so that none is lost
      write_json(output, found if sets else results)
  print(table(beside_greedy(found)))


def _parser() -> cli.Parser:
  parser = cli.Parser(
    prog="okd_jax.evaluate",
    description="Scores a model on held-out data: loss, perplexity and ROUGE-L; "
    "beside a teacher also the KL divergences and how often their first choices agree.",
  )
  add = parser.add_argument
  add("--model", required=True, help="HF folder, hub id, .gguf file or run's workdir")
  data = parser.add_mutually_exclusive_group(required=True).add_argument
  data("--data", help="as data.train")
  several = "in the place of --data: named sets, each with its own scores"
  data("--sets", nargs="+", metavar="NAME=F", action="extend", help=several)
  add("--teacher", default="", help="a model to compare with token by token")
  add("--limit", type=int, default=0, help="first so many rows; 0 is all")
  add("--output", default="", help="write the results to this JSON file")
  add("--template", help="as data.template; by default the run's own, or 'default'")
  add("--max_length", type=int, help="tokens of a row; by default 1024 or what fits")
  prompt = "longer prompts lose their start; by default 512 or what fits"
  add("--max_prompt_length", type=int, help=prompt)
  add("--batch_size", type=int, default=8, help="rows at once")
  cli.add_dtype(parser)
  cli.add_answers(parser)
  return parser


def command() -> None:
  """The console script."""
  cli.run(main)


if __name__ == "__main__":
  command()
