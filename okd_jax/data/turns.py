"""Conversations of several turns: where each answer lies, and shortening long ones.

A turn is found by writing the conversation twice: up to it with the opening of an
answer, and through it. Where both are the beginning of the row's own prompt, the turn
lies between their ends, in tokens as in text. Templates that leave earlier thoughts out
write such turns anew; these become rows of their own, as a model would be asked.
"""

import bisect
import dataclasses
from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase

from okd_jax.data import chat
from okd_jax.data.example import Span
from okd_jax.data.sources import Record
from okd_jax.data.tokens import ids_of, special_ids

_SYSTEM = ("system", "developer")


def earlier(record: Record) -> list[int]:
  """The numbers of the messages before the last that are the assistant's.

  Those that weigh 0 are not trained on, so they are not among them.
  """
  return [
    i
    for i, message in enumerate(record.messages)
    if message["role"] == "assistant" and i > 0 and not _silent(message.get("weight"))
  ]


def last_counts(record: Record) -> bool:
  """Whether the answer is trained on: unless its message weighs 0."""
  return not _silent(record.final.get("weight"))


def _silent(weight: object) -> bool:
  return weight is not None and not weight


def find(
  record: Record, prompt: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Span], list[int]]:
  """(where the earlier turns lie in the prompt's tokens, turns that do not)."""
  wanted, messages = earlier(record), chat.as_messages(record)
  texts = []
  for i in wanted:
    texts.append(chat.write(tokenizer, messages[:i], record, record.tools, prompt=True))
    texts.append(chat.write(tokenizer, messages[: i + 1], record, record.tools))
  ids, special = ids_of(texts, tokenizer), special_ids(tokenizer)
  spans, lost = [], []
  for i, before, through in zip(wanted, ids[::2], ids[1::2], strict=True):
    begins = through[: len(before)] == before
    if begins and list(prompt[: len(through)]) == through:
      said = through_end(through[len(before) :], tokenizer, special)
      spans.append((len(before), len(before) + len(said)))
    else:
      lost.append(i)
  return spans, lost


def through_end(
  response: list[int], tokenizer: PreTrainedTokenizerBase, special: frozenset[int]
) -> list[int]:
  """An answer without what its template writes after the end of turn.

  The newline that ChatML puts there, say, is part of the next turn: a model that has
  said `<|im_end|>` is never asked for it.
  """
  ends = [i for i, token in enumerate(response) if token in special]
  if ends and not tokenizer.decode(response[ends[-1] + 1 :]).strip():
    return response[: ends[-1] + 1]
  return response


def marked(
  record: Record, row: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> list[Span] | None:
  """What the template itself marks as the model's words, in the tokens of a row.

  None where it marks nothing, or writes other tokens than the row's.
  """
  if any(_silent(m.get("weight")) for m in (*record.messages, record.final)):
    return None
  found = chat.marked(tokenizer, record)
  if found is None or found[0][: len(row)] != list(row):
    return None
  mask = [0, *found[1][: len(row)], 0]
  edges = [i for i in range(len(row) + 1) if mask[i] != mask[i + 1]]
  return list(zip(edges[::2], edges[1::2], strict=True))


def shortened(record: Record, fits: Callable[[Record], bool]) -> Record | None:
  """The conversation without as few of its first turns as make it fit.

  What a system says first stays; a turn goes on to before the next user's. Where even
  the last turn alone is too long, it is that; None if there is but one.
  """
  messages = record.messages
  start = next((i for i, m in enumerate(messages) if m["role"] not in _SYSTEM), 0)
  stops = [i for i in range(start + 1, len(messages)) if messages[i]["role"] == "user"]
  if not stops:
    return None

  def without(stop: int) -> Record:
    return dataclasses.replace(record, messages=messages[:start] + messages[stop:])

  first = bisect.bisect_left(stops, True, key=lambda stop: fits(without(stop)))
  return without(stops[min(first, len(stops) - 1)])


def ending_at(record: Record, turn: int) -> Record:
  """The conversation up to an earlier turn of the assistant, which answers it."""
  final = record.messages[turn]
  return dataclasses.replace(
    record,
    messages=record.messages[:turn],
    final={k: v for k, v in final.items() if k not in ("role", "content")},
    references=(final.get("content", ""),),
    ended=True,
  )
