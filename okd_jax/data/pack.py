"""Rows of one fixed length, shifted for training; one text each, or packed."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from okd_jax.data.example import Example

# Fills rows up. Any legal id would do: what counts follows from lengths alone.
PAD_ID = 0


class Packs(Sequence[tuple[int, ...]]):
  """Which texts share a row, a few bytes a text.

  texts: their numbers, row after row.
  ends: where each row ends among them.
  """

  def __init__(self, texts: Int[np.ndarray, " N"], ends: Int[np.ndarray, " R"]):
    self._texts, self._ends = texts, ends

  @classmethod
  def alone(cls, count: int) -> "Packs":
    """So many texts, each in a row of its own."""
    return cls(np.arange(count), np.arange(1, count + 1))

  def __len__(self) -> int:
    return len(self._ends)

  def __getitem__(self, at: Any) -> Any:  # a row; of a slice, several
    if isinstance(at, slice):
      return [self[i] for i in range(len(self))[at]]
    at = range(len(self))[at]
    start = int(self._ends[at - 1]) if at else 0
    return tuple(self._texts[start : int(self._ends[at])].tolist())


def pad_row(
  example: Example, length: int, pad_id: int, teacher_length: int = 0
) -> dict[str, np.ndarray]:
  """`whole_row` of one text."""
  return whole_row([example], length, pad_id, teacher_length)


def whole_row(
  examples: Sequence[Example], length: int, pad_id: int, teacher_length: int = 0
) -> dict[str, np.ndarray]:
  """`pack_row`, and beside it what the teacher reads, if it has prompts of its own.

  Args:
    teacher_length: positions of the teacher's row; 0: it reads the same one.

  Returns:
    The row; with a teacher's length also `teacher_tokens` and `teacher_segments` int32
    [teacher_length] and `align` int32 [length]: for each position that counts the one
    at which the teacher predicts the same token of the same answer.

  Raises:
    ValueError: as `pack_row`.
  """
  row = pack_row(examples, length, pad_id)
  if not teacher_length:
    return row
  own = [example.for_teacher() for example in examples]
  other = pack_row(own, teacher_length, pad_id)
  align = np.zeros(length, np.int32)
  align[row["mask"]] = np.flatnonzero(other["mask"])
  return row | {
    "teacher_tokens": other["tokens"],
    "teacher_segments": other["segment_ids"],
    "align": align,
  }


def pack_row(
  examples: Sequence[Example], length: int, pad_id: int
) -> dict[str, np.ndarray]:
  """A row for next-token prediction: at position t, `labels[t]` follows `tokens[t]`.

  n tokens of a text make n - 1 predictions and take n - 1 positions, so no label is
  another text's token; in return shapes are round numbers.

  Returns:
    `tokens` and `labels` int32 [L], padded on the right with `pad_id`; `mask` bool
    [L], true where a token is predicted that is trained on (`Example.spans`): from the
    last position of a prompt to the last but one of its text; `segment_ids` int32 [L],
    1 for the first text, 2 for the second and so on, 0 where there is padding. Mask and
    segments come from places alone: the padding id may well be EOS, or a token of the
    text.

  Raises:
    ValueError: if a text has no prediction, or all together do not fit.
  """
  row = {
    "tokens": np.full(length, pad_id, np.int32),
    "labels": np.full(length, pad_id, np.int32),
    "mask": np.zeros(length, bool),
    "segment_ids": np.zeros(length, np.int32),
  }
  start = 0
  for segment, example in enumerate(examples, 1):
    stop = start + positions(example)
    _check_fits(example, length - start)
    row["tokens"][start:stop] = example.tokens[:-1]
    row["labels"][start:stop] = example.tokens[1:]
    for first, last in example.spans:
      row["mask"][start + max(first - 1, 0) : start + last - 1] = True
    row["segment_ids"][start:stop] = segment
    start = stop
  return row


def _check_fits(example: Example, room: int) -> None:
  """Raises a ValueError unless a text has predictions, and room for them."""
  count = len(example.tokens)
  least = 0 if count == example.prompt_length else 1  # 0: an answer will be sampled
  if not least <= positions(example) <= room:
    raise ValueError(
      f"{example.where}: {count} tokens do not make a row of length {room}"
    )


def positions(example: Example) -> int:
  """How many positions of a row a text takes."""
  return len(example.tokens) - 1


def pack(
  lengths: Sequence[int] | Int[np.ndarray, " N"], length: int
) -> list[tuple[int, ...]]:
  """Which texts share a row of `length` positions: each text once, in few rows.

  Best-fit decreasing: from the longest to the shortest, each text into the fullest row
  that has room for it. Like first-fit decreasing it needs at most 11/9 of the least
  number of rows and a few (Johnson et al. 1974), but one bit operation finds the row:
  bit r of `open_` is set where some row has r positions left.

  Raises:
    ValueError: if a text is longer than a row.
  """
  return list(packed(lengths, length))


def packed(lengths: Sequence[int] | Int[np.ndarray, " N"], length: int) -> Packs:
  """The rows of `pack`, for many texts: some bytes each.

  >>> list(packed([2, 1, 3], 3))
  [(2,), (0, 1)]
  """
  lengths = np.asarray(lengths, np.int64)
  order = np.argsort(-lengths, kind="stable")
  if len(order) and lengths[order[0]] > length:
    text, need = order[0], lengths[order[0]]
    raise ValueError(f"text {text} takes {need} positions of a row of {length}")
  row_of = np.empty(len(order), np.int64)  # of the texts in this order
  with_room: list[list[int]] = [[] for _ in range(length + 1)]
  open_ = count = 0
  # memoryview: plain numbers, one at a time.
  for i, need in enumerate(memoryview(lengths[order])):
    fitting = open_ >> need
    if fitting:
      room = need + (fitting & -fitting).bit_length() - 1
      row = with_room[room].pop()
      open_ ^= 0 if with_room[room] else 1 << room
    else:
      row, room = count, length
      count += 1
    row_of[i] = row
    with_room[room - need].append(row)
    open_ |= 1 << (room - need)
  texts = order[np.argsort(row_of, kind="stable")]
  return Packs(texts, np.cumsum(np.bincount(row_of, minlength=count)))
