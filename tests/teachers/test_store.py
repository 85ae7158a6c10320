"""Stored arrays: what was written comes back, and nothing foreign or damaged does."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from okd_jax.errors import UserError
from okd_jax.teachers import store

ABOUT = {"data": "abc", "k": 2}


def arrays(seed, tokens):
  rng = np.random.default_rng(seed)
  return {
    "ids": rng.integers(0, 1 << 16, (tokens, 2)).astype(np.uint16),
    "hidden": rng.normal(size=(tokens, 3)).astype(ml_dtypes.bfloat16),
    "tail": rng.normal(size=tokens).astype(np.float32),
  }


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(1, 5), min_size=1, max_size=9), data=st.data())
def test_what_was_written_comes_back(tmp_path_factory, lengths, data):
  folder = tmp_path_factory.mktemp("store") / "s"
  kept = store.begin(folder, len(lengths), ABOUT)
  order = data.draw(st.permutations(range(len(lengths))))
  cut = data.draw(st.integers(0, len(lengths)))
  for rows in filter(None, (order[:cut], order[cut:])):
    kept.write(rows, [arrays(row, lengths[row]) for row in rows])
    kept = store.Store(folder, len(lengths), ABOUT)
  assert kept.missing() == []
  where = np.zeros((len(lengths), 6), bool)
  for place, row in enumerate(order):
    where[place, 1 : 1 + lengths[row]] = True
  read = kept.read([[row] for row in order], where)
  for place, row in enumerate(order):
    for name, values in arrays(row, lengths[row]).items():
      assert read[name].dtype == values.dtype
      np.testing.assert_array_equal(read[name][place][where[place]], values)
      assert not read[name][place][~where[place]].any()


def test_several_texts_in_a_row(tmp_path):
  kept = store.begin(tmp_path / "s", 3, ABOUT)
  texts = [arrays(index, 2 + index) for index in range(3)]
  kept.write([0, 1, 2], texts)
  where = np.arange(8)[None] < [[6], [3]]
  read = kept.read([[2, 0], [1]], where)
  for name in texts[0]:
    both = np.concatenate([texts[2][name], texts[0][name]])
    np.testing.assert_array_equal(read[name][0, :6], both)
    np.testing.assert_array_equal(read[name][1, :3], texts[1][name])
    assert not read[name][~where].any()
  with pytest.raises(UserError, match="row 2, 0 has 6 tokens there, but 3 in this run"):
    kept.read([[2, 0], [2, 0]], where)


def test_a_writer_goes_on_with_what_is_missing(tmp_path):
  kept = store.begin(tmp_path / "s", 3, ABOUT)
  kept.write([1], [arrays(1, 2)])
  (tmp_path / "s" / ".00000000.safetensors.tmp").write_bytes(b"half of a fi")
  again = store.begin(tmp_path / "s", 3, ABOUT)
  assert again.missing() == [0, 2]
  with pytest.raises(UserError, match="lacks row 0"):
    again.read([[1], [0]], np.ones((2, 2), bool))


def test_a_store_begun_by_a_writer_that_was_killed(tmp_path):
  """What is left of a file that was never complete does not count."""
  (tmp_path / ".made_from.json.tmp").write_text("{")
  store.begin(tmp_path, 1, {"data": "a"})
  assert (tmp_path / "made_from.json").exists()


def test_a_damaged_file_is_refused(tmp_path):
  kept = store.begin(tmp_path / "s", 1, ABOUT)
  kept.write([0], [arrays(0, 4)])
  path = tmp_path / "s" / "00000000.safetensors"
  content = bytearray(path.read_bytes())
  content[-3] ^= 1
  path.write_bytes(content)
  with pytest.raises(UserError, match="00000000.safetensors is damaged"):
    store.Store(tmp_path / "s", 1, ABOUT)


@pytest.mark.parametrize(
  ("count", "key", "words"),
  [
    (1, {"data": "other"}, "data='abc' there, 'other' here"),
    (2, {"data": "abc"}, "rows=1 there, 2 here"),
  ],
)
def test_a_foreign_store_is_refused(count, key, words, tmp_path):
  store.begin(tmp_path / "s", 1, ABOUT)
  with pytest.raises(UserError, match=words):
    store.Store(tmp_path / "s", count, key)


def test_no_store_and_other_folders_are_refused(tmp_path):
  with pytest.raises(UserError, match="made_from.json does not exist"):
    store.Store(tmp_path, 1, ABOUT)
  (tmp_path / "thesis.txt").write_text("years of work")
  with pytest.raises(UserError, match="nothing says how it was made .*name another"):
    store.begin(tmp_path, 1, ABOUT)
  assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
  with pytest.raises(UserError, match="thesis.txt is a file"):
    store.begin(tmp_path / "thesis.txt", 1, ABOUT)
  with pytest.raises(UserError, match="missing does not exist"):
    store.Store(tmp_path / "missing", 1, ABOUT)


def test_a_row_of_another_length_is_refused(tmp_path):
  kept = store.begin(tmp_path / "s", 1, ABOUT)
  kept.write([0], [arrays(0, 4)])
  with pytest.raises(UserError, match="row 0 has 4 tokens there, but 3"):
    kept.read([[0]], np.ones((1, 3), bool))
