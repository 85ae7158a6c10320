"""Fixed-length rows: the shift, and masks that come from lengths."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from okd_jax.data import Example, pack, pack_row, pad_row, positions

PAD = 7


def example(tokens, prompt_length):
  return Example(np.array(tokens, np.int32), prompt_length, (), "here:1")


def test_known_row():
  row = pad_row(example([5, 6, 0, 8, 9], prompt_length=2), 6, PAD)
  assert row["tokens"].tolist() == [5, 6, 0, 8, PAD, PAD]
  assert row["labels"].tolist() == [6, 0, 8, 9, PAD, PAD]
  # From the last prompt token (6), which predicts the first of the response (0).
  assert row["mask"].tolist() == [False, True, True, True, False, False]
  assert row["segment_ids"].tolist() == [1, 1, 1, 1, 0, 0]
  assert {name: value.dtype for name, value in row.items()} == {
    "tokens": np.int32,
    "labels": np.int32,
    "mask": np.bool_,
    "segment_ids": np.int32,
  }


def test_text_trains_every_prediction():
  row = pad_row(example([5, 6, 8], prompt_length=0), 4, PAD)
  assert row["mask"].tolist() == [True, True, False, False]


def test_a_prompt_of_one_token_trains_everything_after_it():
  row = pad_row(example([5, 6, 8], prompt_length=1), 4, PAD)
  assert row["mask"].tolist() == [True, True, False, False]


def test_padding_with_eos_keeps_eos_trained():
  """Guards B3: a mask made of ids erases EOS (maxtext)."""
  eos = 9
  row = pad_row(example([5, 6, eos], prompt_length=1), 5, pad_id=eos)
  assert row["labels"].tolist() == [6, eos, eos, eos, eos]
  assert row["mask"].tolist() == [True, True, False, False, False]


def test_a_full_row_leaves_one_position():
  row = pad_row(example(range(8), prompt_length=3), 8, PAD)
  assert row["segment_ids"].sum() == 7
  assert row["tokens"].tolist() == [*range(7), PAD]


@pytest.mark.parametrize("count", [1, 6])
def test_rows_that_do_not_fit(count):
  with pytest.raises(ValueError, match=f"here:1: {count} tokens do not make a row"):
    pad_row(example(range(count), 0), 4, PAD)


def test_a_prompt_alone_is_a_row_without_targets():
  """Its answer is sampled; of one token there is nothing to predict at all."""
  for count in (1, 3):
    row = pad_row(example(range(count), count), 4, PAD)
    assert not row["mask"].any() and row["segment_ids"].sum() == count - 1


tokens = st.lists(st.integers(0, 9), min_size=1, max_size=12)


@given(prompt=st.lists(st.integers(0, 9), max_size=12), response=tokens, data=st.data())
def test_trained_labels_are_the_response(prompt, response, data):
  """Whatever the ids, the padding id and the width: exactly the response is trained."""
  ids = prompt + response
  if len(ids) < 2:
    ids = [0, *ids]
    prompt = prompt and [0, *prompt]
  length = data.draw(st.integers(len(ids) - 1, 40))
  pad_id = data.draw(st.integers(0, 9))
  row = pad_row(example(ids, len(prompt)), length, pad_id)
  trained = row["labels"][row["mask"]].tolist()
  assert trained == (ids[len(prompt) :] if prompt else ids[1:])
  assert row["segment_ids"].tolist() == [1] * (len(ids) - 1) + [0] * (
    length - len(ids) + 1
  )
  assert not row["mask"][row["segment_ids"] == 0].any()
  real = row["segment_ids"] == 1
  assert row["tokens"][real].tolist() == ids[:-1]
  assert row["labels"][real].tolist() == ids[1:]
  assert set(row["tokens"][~real].tolist()) <= {pad_id}


@given(response=tokens, lengths=st.tuples(st.integers(16, 40), st.integers(16, 40)))
def test_padding_changes_nothing_real(response, lengths):
  ids = [3, *response]
  rows = [
    pad_row(example(ids, 1), length, pad)
    for length, pad in zip(lengths, (0, 9), strict=True)
  ]
  for name in ("tokens", "labels", "mask", "segment_ids"):
    a, b = (row[name][: len(ids) - 1].tolist() for row in rows)
    assert a == b


def test_texts_in_one_row():
  """Guards B6: no label is the next text's token (torchtune shifted packed labels)."""
  texts = [example([5, 6, 7, 8], 2), example([1, 2], 1), example([3, 4, 9], 0)]
  row = pack_row(texts, 8, PAD)
  assert {name: values.astype(int).tolist() for name, values in row.items()} == {
    "tokens": [5, 6, 7, 1, 3, 4, PAD, PAD],
    "labels": [6, 7, 8, 2, 4, 9, PAD, PAD],
    "mask": [0, 1, 1, 1, 1, 1, 0, 0],
    "segment_ids": [1, 1, 1, 2, 3, 3, 0, 0],
  }
  assert row["mask"].dtype == bool
  with pytest.raises(ValueError, match="3 tokens do not make a row of length 1"):
    pack_row(texts, 5, PAD)


def test_the_fullest_row_with_room():
  # 9 6 5 3 3 2 into rows of 10: the 3s go beside the 6 and the 5, the 2 beside 5 + 3.
  assert pack([3, 9, 5, 2, 6, 3], 10) == [(1,), (4, 0), (2, 5, 3)]
  with pytest.raises(ValueError, match="text 1 takes 11 positions of a row of 10"):
    pack([3, 11], 10)


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=60))
def test_rows_are_few(lengths):
  """Each text once, no row too long, and no two rows that could have been one."""
  rows = pack(lengths, 30)
  assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
  sums = sorted(sum(lengths[i] for i in row) for row in rows)
  assert sums[-1] <= 30
  assert len(sums) == 1 or sums[0] + sums[1] > 30


@given(prompts=st.lists(st.integers(0, 4), min_size=1, max_size=5))
def test_a_packed_row_is_its_texts_rows(prompts):
  texts = [example(range(i, i + 5), prompt) for i, prompt in enumerate(prompts)]
  row = pack_row(texts, 30, PAD)
  for i, text in enumerate(texts):
    alone = pad_row(text, positions(text), PAD)
    mine = row["segment_ids"] == i + 1
    for name in ("tokens", "labels", "mask"):
      np.testing.assert_array_equal(row[name][mine], alone[name])
