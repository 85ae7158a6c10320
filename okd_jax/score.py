"""Scores answers against references: ROUGE-L and exact match.

  python -m okd_jax.score --predictions=P.jsonl --references=F.jsonl [--output=O.json]

Line i of the predictions is `{"text": ...}` and answers row i of the references,
whose `output` is a string or a list of acceptable ones (`completion` and `messages`
work too). Of several references the best one counts, for either measure.
"""

import json

from okd_jax.errors import UserError
from okd_jax.runtime import cli, files


def main(arguments: list[str]) -> None:
  """Scores two files."""
  flags = _parser().parse_args(arguments)
  # From here on all is needed, which takes seconds to import.
  from okd_jax.data import read_predictions, read_references
  from okd_jax.evaluation.rouge import score

  references = read_references(flags.references)
  result = score(read_predictions(flags.predictions), references)
  print(
    f"n {result['n']}   ROUGE-L {result['rougeL']:.2f}   "
    f"exact match {result['exact_match']:.2f}"
  )
  if flags.output:
    try:
      files.write_text(flags.output, json.dumps(result, indent=2) + "\n")
    except OSError as error:
      raise UserError(
        f"{flags.output}: cannot be written ({error.strerror})"
      ) from error


def _parser() -> cli.Parser:
  parser = cli.Parser(
    prog="python -m okd_jax.score", description=__doc__.partition("\n")[0]
  )
  add = parser.add_argument
  add("--predictions", required=True, metavar="P.jsonl", help='{"text": ...} a line')
  add(
    "--references",
    required=True,
    metavar="F.jsonl",
    help="data with 'output' (a string or a list), 'completion' or 'messages'",
  )
  add("--output", metavar="O.json", help="also write the scores here")
  return parser


def command() -> None:
  """The console script."""
  cli.run(main)


if __name__ == "__main__":
  command()
