"""The same records read by two tokenizers, row beside row."""

import logging
from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from okd_jax.data.encode import clean
from okd_jax.data.rows import Rows
from okd_jax.data.sources import Record
from okd_jax.errors import UserError

_log = logging.getLogger(__name__)


def pair(first: Rows, second: Rows) -> tuple[Rows, Rows]:
  """The rows of those records that both hold, in their order; of each one row.

  Either tokenizer may have found a record too long; paired are the records' numbers,
  never places in a list.

  Raises:
    UserError: if no record is left.
  """
  numbers = first.column("number"), second.column("number")
  _, ours, theirs = np.intersect1d(*numbers, return_indices=True)
  if not len(ours):
    raise UserError(
      "no record fits data.max_length and data.max_prompt_length in the tokens of both "
      "tokenizers; raise them or set data.overlong_prompt=truncate"
    )
  if len(ours) < max(len(first), len(second)):
    _log.info("%d rows are left that fit in the tokens of both tokenizers", len(ours))
  return first.take(ours), second.take(theirs)


def cleaned(record: Record, tokenizers: Sequence[PreTrainedTokenizerBase]) -> Record:
  """The record as every tokenizer reads it: nobody's literal end token is text.

  Raises:
    UserError: for plain text, which has no answer whose tokens could be numbered.
  """
  if record.is_text:
    raise UserError(
      f"{record.where}: method.cross_tokenizer pairs the tokens of answers, but this "
      "row is text without a prompt"
    )
  while True:
    before = record
    for tokenizer in tokenizers:
      record = clean(record, tokenizer)
    if record is before:
      return record
