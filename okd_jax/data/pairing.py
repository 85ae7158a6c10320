"""The same records read by two tokenizers, row beside row."""

import logging
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from okd_jax.data.encode import Example, clean
from okd_jax.data.sources import Record
from okd_jax.errors import UserError

_log = logging.getLogger(__name__)


def shared_text(
  records: Sequence[Record], tokenizers: Sequence[PreTrainedTokenizerBase]
) -> list[Record]:
  """The records as every tokenizer reads them: nobody's literal end token is text.

  Raises:
    UserError: for plain text, which has no answer whose tokens could be numbered.
  """
  for record in records:
    if record.is_text:
      raise UserError(
        f"{record.where}: method.cross_tokenizer pairs the tokens of answers, but this "
        "row is text without a prompt"
      )
  return [_cleaned(record, tokenizers) for record in records]


def pair(
  first: Sequence[Example], second: Sequence[Example]
) -> tuple[list[Example], list[Example]]:
  """The rows of those records that both lists hold, in the first one's order.

  Either tokenizer may have found a record too long; paired are the records themselves
  (those of `shared_text`), never places in a list.

  Raises:
    UserError: if no record is left.
  """
  other = {id(example.record): example for example in second}
  pairs = [(e, other[id(e.record)]) for e in first if id(e.record) in other]
  if not pairs:
    raise UserError(
      "no record fits data.max_length and data.max_prompt_length in the tokens of both "
      "tokenizers; raise them or set data.overlong_prompt=truncate"
    )
  if len(pairs) < max(len(first), len(second)):
    _log.info("%d rows are left that fit in the tokens of both tokenizers", len(pairs))
  ours, theirs = zip(*pairs, strict=True)
  return list(ours), list(theirs)


def _cleaned(record: Record, tokenizers: Sequence[PreTrainedTokenizerBase]) -> Record:
  """`clean` by every tokenizer, until none has anything to take off."""
  while True:
    before = record
    for tokenizer in tokenizers:
      record = clean(record, tokenizer)
    if record is before:
      return record
