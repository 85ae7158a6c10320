"""How good is a student? Loss, distance to its teacher, and answers scored by ROUGE-L.

python -m okd_jax.evaluate --model=M --data=F.jsonl [--teacher=T]
"""

from pathlib import Path

from okd_jax.data import load_records
from okd_jax.data.sources import source_list
from okd_jax.evaluation.figures import table
from okd_jax.evaluation.held_out import Options, evaluate
from okd_jax.models import load, template_of
from okd_jax.runtime import cli
from okd_jax.runtime.files import write_json
from okd_jax.runtime.metrics import finite_or_null


def main(arguments: list[str]) -> None:
  """Evaluates as the arguments say; a UserError for whatever is wrong with them."""
  args = vars(_parser().parse_args(arguments))
  path, teacher, data, output = (
    args.pop(name) for name in ("model", "teacher", "data", "output")
  )
  cli.use_compilation_cache()
  model = load(path, dtype=args["dtype"])
  beside = load(teacher, dtype=args["dtype"]) if teacher else None
  if args["template"] is None:
    args["template"] = template_of(path) or "default"
  options, records = Options(**args), load_records(source_list(data))
  results = evaluate(model, records, options, beside, name=path)
  print(table({Path(path).name or path: results}))
  if output:
    write_json(output, finite_or_null(results))


def _parser() -> cli.Parser:
  parser = cli.Parser(
    prog="okd_jax.evaluate",
    description="Scores a model on held-out data: loss, perplexity and ROUGE-L; "
    "beside a teacher also the KL divergences and how often their first choices agree.",
  )
  add = parser.add_argument
  add("--model", required=True, help="HF folder, hub id, .gguf file or run's workdir")
  add("--data", required=True, help="jsonl(.gz), .txt or dataset id; several by commas")
  add("--teacher", default="", help="a model to compare with token by token")
  add("--temperature", type=float, default=0.0, help="of the answers; 0 is greedy")
  add(
    "--seeds",
    type=lambda text: [int(seed) for seed in text.split(",")],
    default="10,20,30,40,50",
    help="sample the answers once a seed; greedy answers need one only",
  )
  new = "of an answer, 0: none; by default 256 or fewer"
  add("--max_new_tokens", type=int, help=new)
  add("--limit", type=int, default=0, help="first so many rows; 0 is all")
  add("--predictions", default="", help="write the first seed's answers to this jsonl")
  add("--output", default="", help="write the results to this JSON file")
  add("--template", help="as data.template; by default the run's own, or 'default'")
  add("--max_length", type=int, help="tokens of a row; by default 1024 or what fits")
  prompt = "longer prompts lose their start; by default 512 or what fits"
  add("--max_prompt_length", type=int, help=prompt)
  add("--batch_size", type=int, default=8, help="rows at once")
  cli.add_dtype(parser)
  return parser


def command() -> None:
  """The console script."""
  cli.run(main)


if __name__ == "__main__":
  command()
