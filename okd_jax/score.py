"""Scores answers against references: ROUGE-L and exact match.

  python -m okd_jax.score --predictions=P.jsonl --references=F.jsonl [--output=O.json]

Line i of the predictions is `{"text": ...}` and answers row i of the references,
whose `output` is a string or a list of acceptable ones (`completion` and `messages`
work too). Of several references the best one counts, for either measure.
"""

import json
import string
from collections.abc import Sequence

from okd_jax import cli, files
from okd_jax.data import sources
from okd_jax.errors import UserError

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def score(
  predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, float]:
  """Mean scores, times 100: `rougeL` and `exact_match`, and `n`, how many there are.

  ROUGE-L is the F1 of the longest common subsequence of stemmed words (ROUGE: A
  Package for Automatic Evaluation of Summaries, Lin, 2004), as the package
  rouge_score computes it. Exact match ignores case, punctuation and spacing.

  Raises:
    UserError: if the lengths differ, nothing is given, or a row has no reference.
  """
  if len(predictions) != len(references):
    raise UserError(
      f"{len(predictions)} predictions do not match {len(references)} rows of "
      "references; give one prediction a row"
    )
  if not predictions:
    raise UserError("there is nothing to score; give at least one prediction")
  if any(isinstance(row, str) for row in references):
    raise TypeError("references must be a list of strings for every prediction")
  for i, row in enumerate(references, 1):
    if not row:
      raise UserError(f"row {i} has no reference; give at least one")
  rows = list(zip(predictions, references, strict=True))
  return {
    "n": len(rows),
    "rougeL": 100 * sum(_rouge_l(rows)) / len(rows),
    "exact_match": 100 * sum(_matches(*row) for row in rows) / len(rows),
  }


def main(arguments: list[str]) -> None:
  """Scores two files."""
  parser = cli.Parser(prog="python -m okd_jax.score", description=_first_line())
  parser.add_argument(
    "--predictions", required=True, metavar="P.jsonl", help='{"text": ...} a line'
  )
  parser.add_argument(
    "--references",
    required=True,
    metavar="F.jsonl",
    help="data with 'output' (a string or a list), 'completion' or 'messages'",
  )
  parser.add_argument("--output", metavar="O.json", help="also write the scores here")
  flags = parser.parse_args(arguments)
  result = score(
    read_predictions(flags.predictions), sources.read_references(flags.references)
  )
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


def read_predictions(path: str) -> list[str]:
  """The `text` of every line; an empty answer is an answer, and scores nothing."""
  predictions = []
  for row, where in sources.read_rows(path):
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
      raise UserError(f'{where}: a prediction must look like {{"text": "..."}}')
    predictions.append(row["text"])
  return predictions


def _rouge_l(rows: Sequence[tuple[str, Sequence[str]]]) -> list[float]:
  from rouge_score import rouge_scorer  # here: it takes a second, for nltk

  scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
  return [
    max(scorer.score(target, prediction)["rougeL"].fmeasure for target in targets)
    for prediction, targets in rows
  ]


def _matches(prediction: str, references: Sequence[str]) -> bool:
  return _normalized(prediction) in map(_normalized, references)


def _normalized(text: str) -> str:
  return " ".join(text.lower().translate(_PUNCTUATION).split())


def _first_line() -> str:
  return __doc__.partition("\n")[0]


if __name__ == "__main__":
  cli.run(main)
