"""Answers against references: ROUGE-L and exact match."""

import string
from collections.abc import Sequence

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
