"""Rows that fit: cut, dropped or windowed as the limits say, trained parts marked."""

import collections
import dataclasses

import numpy as np
from transformers import PreTrainedTokenizerBase

from okd_jax.data import turns
from okd_jax.data.example import Example, Span
from okd_jax.data.limits import Form
from okd_jax.data.sources import Record
from okd_jax.errors import UserError

Tally = collections.Counter
Ids = list[int]


@dataclasses.dataclass(frozen=True)
class Fitter:
  """Makes rows of records whose prompts and responses are tokens already."""

  tokenizer: PreTrainedTokenizerBase
  form: Form

  def too_long(self, record: Record, prompt: Ids, response: Ids) -> bool:
    """Whether a conversation must lose its first turn, if it has several."""
    over = len(prompt) > self.form.max_prompt_length
    return record.is_chat and (
      over or len(prompt) + len(response) > self.form.max_length
    )

  def fit(
    self, record: Record, prompt: Ids, response: Ids, teacher: Ids | None
  ) -> tuple[list[Example], list[int], Tally]:
    """(rows, earlier turns that lie in none of them, what became of the record).

    teacher: what the teacher reads in place of the prompt; None for the same.

    Raises:
      UserError: for a record without a token to give, or to train on.
    """
    tally = Tally()
    if record.is_text:
      return self._windows(record, response, tally), [], tally
    cut = self._cut(record, prompt, response, teacher, tally)
    if cut is None:
      return [], [], tally
    kept, response, teacher = cut
    trained, lost = self._trained(record, prompt, response, teacher is not None)
    if teacher is not None and self._several(record) and turns.earlier(record):
      tally["last_alone"] += 1
    if not trained and record.references:
      tally["untrained"] += 1
      return [], lost, tally
    gone = len(prompt) - len(kept)
    trained = [(a - gone, b - gone) for a, b in trained if a - gone > 0 or not gone]
    example = Example(
      np.array(kept + response, np.int32),
      len(kept),
      record.references,
      record.where,
      trained=_unless_plain(trained, len(kept), len(kept) + len(response)),
      teacher_prompt=None if teacher is None else np.array(teacher, np.int32),
      asked=record.asked,
      kind=record.kind,
    )
    return [example], lost, tally

  def _cut(
    self,
    record: Record,
    prompt: Ids,
    response: Ids,
    teacher: Ids | None,
    tally: Tally,
  ) -> tuple[Ids, Ids, Ids | None] | None:
    """(prompt, response, teacher's prompt) within the limits; None drops the row."""
    form = self.form
    if not prompt:
      raise UserError(f"{record.where}: the prompt has no tokens; give it some text")
    if not response and record.references:
      raise UserError(
        f"{record.where}: 'ended' is false, but the response has no tokens; give it "
        "some text, or remove the record"
      )
    over = len(prompt) > form.max_prompt_length
    teacher_over = teacher is not None and len(teacher) > form.most_teacher_prompt
    if over or teacher_over:
      kind = "prompts" if over else "teacher_prompts"
      if form.overlong_prompt == "drop":
        tally[f"dropped_{kind}"] += 1
        return None
      tally[f"truncated_{kind}"] += 1
      prompt = self._last(prompt, form.max_prompt_length)
      teacher = teacher and self._last(teacher, form.most_teacher_prompt)
    room = form.max_length - len(prompt)
    if teacher is not None:
      room = min(room, form.teacher_length - len(teacher))
    if len(response) > room:
      if form.overlong_row == "drop" or room <= 0:
        tally["dropped_rows"] += 1
        return None
      tally["truncated_rows"] += 1
    return prompt, response[:room], teacher

  def _last(self, prompt: Ids, length: int) -> Ids:
    """The end of a prompt, where the question is; a BOS stays, for it is no text."""
    if len(prompt) <= length:
      return prompt
    if length > 1 and prompt[0] == self.tokenizer.bos_token_id:
      return prompt[:1] + prompt[1 - length :]
    return prompt[-length:]

  def _trained(
    self, record: Record, prompt: Ids, response: Ids, privileged: bool
  ) -> tuple[list[Span], list[int]]:
    """(what is trained on, earlier turns that the row does not hold as they were)."""
    last = (len(prompt), len(prompt) + len(response))
    own = [last] if turns.last_counts(record) else []
    if not (self._several(record) and record.references) or privileged:
      return own, []
    if (spans := turns.marked(record, prompt + response, self.tokenizer)) is not None:
      return spans, []
    if not turns.earlier(record):
      return own, []
    spans, lost = turns.find(record, prompt, self.tokenizer)
    return spans + own, lost

  def _several(self, record: Record) -> bool:
    """Whether more answers than the last are trained on, if there are any."""
    form = self.form
    return form.turns == "all" and form.template == "chat" and record.is_chat

  def _windows(self, record: Record, tokens: Ids, tally: Tally) -> list[Example]:
    """A text in consecutive pieces, none of which repeats another's tokens."""
    if len(tokens) < 2:
      raise UserError(f"{record.where}: the text has no tokens; give it some text")
    size = self.form.max_length
    pieces = [tokens[i : i + size] for i in range(0, len(tokens), size)]
    # The first token of a piece is given and not predicted, so a last piece of one
    # token holds nothing to train on.
    pieces = [piece for piece in pieces if len(piece) > 1]
    if len(tokens) > size:
      tally["windows"] += len(pieces)
    return [
      Example(np.array(piece, np.int32), 0, (), record.where, kind=record.kind)
      for piece in pieces
    ]


def _unless_plain(
  trained: list[Span], prompt: int, length: int
) -> tuple[Span, ...] | None:
  """None where it is the whole response, which is what a row says without it."""
  spans = tuple((a, min(b, length)) for a, b in trained if a < length)
  return spans if trained and spans != ((prompt, length),) else None
