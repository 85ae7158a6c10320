"""Answers against references: ROUGE-L and exact match."""

import functools
import logging
import string
from collections.abc import Sequence

from okd_jax.errors import UserError

_log = logging.getLogger(__name__)
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def score(
  predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, float]:
  """Mean scores, times 100: `rougeL` and `exact_match`, and `n`, how many there are.

  ROUGE-L is the F1 of the longest common subsequence of stemmed words (ROUGE: A
  Package for Automatic Evaluation of Summaries, Lin, 2004), as the package
  rouge_score computes it, so that numbers can be compared with published ones: its
  words are of ASCII letters and digits, and others end a word. A warning says how many
  rows that touches. Exact match ignores case, punctuation and spacing.

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
  _tell_of_other_letters(sum(map(_has_other_letters, references)), len(rows))
  return {
    "n": len(rows),
    "rougeL": 100 * sum(_rouge_l(rows)) / len(rows),
    "exact_match": 100 * sum(_matches(*row) for row in rows) / len(rows),
  }


def _has_other_letters(references: Sequence[str]) -> bool:
  return any(
    not text.isascii() and any(c.isalnum() and not c.isascii() for c in text)
    for text in references
  )


@functools.cache  # once for each set, however often a run scores it
def _tell_of_other_letters(count: int, rows: int) -> None:
  if count:
    _log.warning(
      "%d of %d rows have references with letters outside ASCII, which ROUGE-L does "
      "not see (as in rouge_score); exact match does",
      count,
      rows,
    )


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
