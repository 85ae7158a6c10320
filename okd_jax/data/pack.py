"""Rows of one fixed length, shifted for training."""

import numpy as np
from jaxtyping import Bool, Int, Int32

from okd_jax.data.encode import Example

# Fills rows up. Any legal id would do: what counts follows from lengths alone.
PAD_ID = 0


def pad_row(example: Example, length: int, pad_id: int) -> dict[str, np.ndarray]:
  """A row for next-token prediction: at position t, `labels[t]` follows `tokens[t]`.

  n tokens make n - 1 predictions, so a row of `length` tokens leaves the last
  position empty; in return shapes are round numbers.

  Returns:
    `tokens` and `labels` int32 [L], padded on the right with `pad_id`; `mask` bool
    [L], true from the position that predicts the first response token (the last of
    the prompt) to the one that predicts the last; `segment_ids` int32 [L], 1 where
    there is a token and 0 where there is padding. Mask and segments come from the
    lengths alone: the padding id may well be EOS, or a token of the text.
  """
  count = len(example.tokens) - 1
  if not 0 < count <= length:
    raise ValueError(
      f"{example.where}: {count + 1} tokens do not make a row of length {length}"
    )
  position = np.arange(length)
  return {
    "tokens": _padded(example.tokens[:-1], length, pad_id),
    "labels": _padded(example.tokens[1:], length, pad_id),
    "mask": _mask(position, example.prompt_length, count),
    "segment_ids": (position < count).astype(np.int32),
  }


def _mask(
  position: Int[np.ndarray, " L"], prompt_length: int, count: int
) -> Bool[np.ndarray, " L"]:
  return (position >= prompt_length - 1) & (position < count)


def _padded(
  tokens: Int32[np.ndarray, " _"], length: int, pad_id: int
) -> Int32[np.ndarray, " L"]:
  row = np.full(length, pad_id, np.int32)
  row[: len(tokens)] = tokens
  return row
