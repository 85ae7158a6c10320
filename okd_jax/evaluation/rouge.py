"""Answers against references: ROUGE-L and exact match."""

import functools
import logging
import re
import string
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

from okd_jax.errors import UserError

_log = logging.getLogger(__name__)
# Scripts that put no spaces between words: a character is a word. Thai, Lao, Tibetan,
# Burmese, Khmer, kana, Han.
_UNSPACED = re.compile(
  "[\u0e00-\u0eff\u0f00-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
  "\U00020000-\U0003ffff]"
)
# What punctuation means something: signs and points of numbers; A+, C++ and C#.
_LETTER = r"[^\W\d_]"
_MEANT = re.compile(
  rf"(?<!{_LETTER})-(?=\.?\d)|(?<!{_LETTER})\.(?=\d)|(?<={_LETTER})(\+{{1,2}}|#)(?!\w)"
  r"|(?<=\d),(?=\d)"
)
_PLACEHOLDERS = {
  "-": "\ue000",
  ".": "\ue001",
  "+": "\ue002",
  "#": "\ue003",
  ",": "\ue004",
}


def score(
  predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, float]:
  """Mean scores, times 100: `rougeL` and `exact_match`, and `n`, how many there are.

  ROUGE-L is the F1 of the longest common subsequence of stemmed words (ROUGE: A
  Package for Automatic Evaluation of Summaries, Lin, 2004), as the package
  rouge_score computes it, so that numbers can be compared with published ones: its
  words are of ASCII letters and digits, and others end a word. A warning says how many
  rows that touches. Where most letters of a reference are of other scripts, words are
  of any letters, and characters where a script has no spaces.

  Exact match ignores case, spacing and punctuation, but for what tells numbers and
  names apart: 1.0 is not 10, -5 not 5, C++ not C. An answer of nothing else equals
  itself alone.

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
  unseen = [any(map(_has_unseen_letters, row)) for row in references]
  _tell_of_unseen_letters(sum(unseen), len(rows))
  return {
    "n": len(rows),
    "rougeL": 100 * sum(_rouge_l(rows)) / len(rows),
    "exact_match": 100 * sum(_matches(*row) for row in rows) / len(rows),
  }


def _has_unseen_letters(text: str) -> bool:
  """Whether rouge_score's words lack some of its letters, and it is what counts."""
  return not text.isascii() and _other_letters(text) > 0 and not _is_other(text)


def _is_other(text: str) -> bool:
  """Whether most letters are of other scripts than Latin."""
  return _other_letters(text, "LATIN") > sum(c.isascii() and c.isalpha() for c in text)


def _other_letters(text: str, but: str = "none") -> int:
  """Letters and digits outside ASCII, but for those of one script."""
  if text.isascii():
    return 0
  others = (c for c in text if c.isalnum() and not c.isascii())
  return sum(but not in unicodedata.name(c, "") for c in others)


@functools.cache  # once for each set, however often a run scores it
def _tell_of_unseen_letters(count: int, rows: int) -> None:
  if count:
    _log.warning(
      "%d of %d rows have references with letters outside ASCII, which ROUGE-L does "
      "not see (as in rouge_score); exact match does",
      count,
      rows,
    )


def _rouge_l(rows: Sequence[tuple[str, Sequence[str]]]) -> list[float]:
  from rouge_score import rouge_scorer, tokenizers  # here: a second, for nltk

  ascii_words = tokenizers.DefaultTokenizer(use_stemmer=True)

  class Words(tokenizers.Tokenizer):
    """Those of any script; what is ASCII as rouge_score has it."""

    def tokenize(self, text: str) -> list[str]:
      return [w for word in _words(text) for w in _as_ascii(word, ascii_words)]

  plain, other = (
    rouge_scorer.RougeScorer(["rougeL"], tokenizer=own)
    for own in (ascii_words, Words())
  )

  def one(prediction: str, target: str) -> float:
    scorer = other if _is_other(target) else plain
    return scorer.score(target, prediction)["rougeL"].fmeasure

  return [max(one(prediction, x) for x in targets) for prediction, targets in rows]


def _as_ascii(word: str, words: Any) -> list[str]:
  return words.tokenize(word) if word.isascii() else [word]


def _words(text: str) -> Iterator[str]:
  """Runs of letters, digits and their marks; single characters of unspaced scripts."""
  word = ""
  for c in unicodedata.normalize("NFKC", text).lower():
    kind = unicodedata.category(c)[0]
    unspaced = _UNSPACED.match(c) and kind != "M"
    if word and (
      kind not in "LNM" or unspaced or _UNSPACED.match(word[0]) and kind != "M"
    ):
      yield word
      word = ""
    if kind in "LNM":
      word += c
  if word:
    yield word


def _matches(prediction: str, references: Sequence[str]) -> bool:
  own = _normalized(prediction)
  if own:
    return own in map(_normalized, references)
  return prediction.strip() in [reference.strip() for reference in references]


def _normalized(text: str) -> str:
  text = text.lower().replace("\u2212", "-")
  text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)  # thousands
  text = _MEANT.sub(lambda found: "".join(map(_PLACEHOLDERS.get, found[0])), text)
  return " ".join("".join(c for c in text if not _is_punctuation(c)).split())


def _is_punctuation(c: str) -> bool:
  return c in string.punctuation or unicodedata.category(c)[0] == "P"
