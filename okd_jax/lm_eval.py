"""Scores a model on tasks of lm-evaluation-harness, run by this package's decoder.

python -m okd_jax.lm_eval --model=M --tasks=arc_easy,gsm8k [--limit=N] [--output=O.json]
python -m okd_jax.lm_eval --model=M --tasks=my_task.yaml [--data=F.jsonl]
"""

import logging

from okd_jax.runtime import cli
from okd_jax.runtime.files import write_json

_log = logging.getLogger("okd_jax.lm_eval")  # a command's __name__ is __main__


def main(arguments: list[str]) -> None:
  """Runs the tasks and prints the harness's table."""
  parser = _parser()
  args = vars(parser.parse_args(arguments))
  names = ("model", "tasks", "include_path", "data", "output")
  path, tasks, include_path, data, output = (args.pop(name) for name in names)
  data = data or []
  cli.check_places(parser, {"output": output}, {}, data)
  if args["log_samples"] and not output:
    parser.error("--log_samples needs an --output to be kept in")
  cli.need("lm_eval", extra="lm-eval")
  # Only now the harness is known to be there; all this takes seconds to import.
  from okd_jax.evaluation.harness_tasks import Options, find_tasks, run, table
  from okd_jax.models import load

  cli.use_compilation_cache()
  options = Options(**args)
  found = find_tasks(tasks, include_path, data)
  _log.info("loading %s", path)
  model = load(path, dtype=options.dtype)
  _log.info("running %s", ", ".join(tasks))
  results = run(model, found, options, path)
  print(table(results))
  if output:
    write_json(output, results)


def _parser() -> cli.Parser:
  about = __doc__.partition("\n")[0]
  parser = cli.Parser(prog="python -m okd_jax.lm_eval", description=about)
  add = parser.add_argument
  add("--model", required=True, help="HF folder, hub id, .gguf file or run's workdir")
  names = "of the harness, by commas (* and ? too), or yaml files of tasks, or folders"
  add("--tasks", required=True, nargs="+", metavar="TASK", help=names)
  data = "of yaml tasks with dataset_path: json, in the place of their own data_files"
  add("--data", nargs="+", metavar="[SPLIT=]F.jsonl", help=data)
  add("--include_path", default="", help="folder of yaml tasks that have names, too")
  add("--limit", type=int, default=0, help="first so many rows of a task; 0 is all")
  shots = "solved examples before each question; by default the task's own number"
  add("--num_fewshot", type=int, metavar="N", help=shots)
  add("--batch_size", type=int, default=8, help="rows at once")
  add("--max_length", type=int, help="tokens of a row; by default the whole context")
  answers = "of answers, before the task's own: max_gen_toks=64,temperature=0.8"
  add("--gen_kwargs", default="", metavar="NAME=VALUE,…", help=answers)
  chat = "prompts are turns of a chat, in the tokenizer's template"
  add("--apply_chat_template", action="store_true", help=chat)
  bos = "texts begin with BOS, whatever the tokenizer does"
  add("--add_bos_token", action="store_const", const=True, help=bos)
  cli.add_dtype(parser)
  add("--output", default="", help="write the results to this JSON file")
  add("--log_samples", action="store_true", help="every prompt and answer there, too")
  add("--seed", type=int, help="of examples and sampling; by default the harness's")
  return parser


def command() -> None:
  """The console script."""
  cli.run(main)


if __name__ == "__main__":
  command()
