"""Held-out rows: of all sources, none of them trained on, the same for every seed."""

import dataclasses

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from okd_jax.data import Example
from okd_jax.data import hold_out as module
from okd_jax.data import rows as in_rows


def row(where, *tokens, prompt=1):
  return Example(np.array(tokens, np.int32), prompt, ("x",), where)


def hold_out(examples, count, seed):
  """Of examples whose files and lines are in their places."""
  files, texts = [e.where.rpartition(":")[0] for e in examples], []
  for e in examples:
    texts += [] if e.where in texts else [e.where]
  numbered = [dataclasses.replace(e, number=texts.index(e.where)) for e in examples]
  found = in_rows.of(numbered, [sorted({*files}).index(file) for file in files])
  train, held_out, same = module.hold_out(found, count, seed)
  return train.tolist(), held_out.tolist(), same


def rows(source, count, start):
  return [row(f"{source}:{i + 1}", start + i, start + i + 1) for i in range(count)]


@given(
  sizes=st.lists(st.integers(2, 30), min_size=1, max_size=4),
  share=st.floats(0.05, 0.7),
  seed=st.integers(0, 5),
)
def test_each_row_is_on_one_side_and_each_source_on_both(sizes, share, seed):
  examples = [x for i, n in enumerate(sizes) for x in rows(f"f{i}.jsonl", n, 100 * i)]
  count = min(max(1, int(share * len(examples))), len(examples) - 1)
  train, held_out, same = hold_out(examples, count, seed)
  assert sorted(train + held_out) == [*range(len(examples))] and not same
  assert len(held_out) == count and train == sorted(train)
  start = 0
  for size in sizes:
    own = sum(start <= i < start + size for i in held_out)
    assert abs(own - size * count / len(examples)) < 1
    start += size
  assert (train, held_out, same) == hold_out(examples, count, seed)


def test_another_seed_draws_others():
  examples = rows("a.jsonl", 50, 0)
  draws = {tuple(sorted(hold_out(examples, 10, seed)[1])) for seed in range(5)}
  assert len(draws) == 5
  assert (*range(40, 50),) not in draws


def test_a_twin_of_a_held_out_row_is_not_trained_on():
  """The same tokens with another prompt are another row."""
  examples = [
    *rows("a.jsonl", 8, 0),
    *rows("c.jsonl", 8, 0),
    row("b:1", 0, 1, prompt=0),
  ]
  train, held_out, same = hold_out(examples, 4, seed=0)
  tokens = [tuple(examples[i].tokens) for i in held_out if i < 16]
  twins = [i for i in range(16) if tuple(examples[i].tokens) in tokens]
  assert not {*twins} & {*train}
  assert same == len({*twins} - {*held_out}) > 0
  assert len(train) + len(held_out) + same == len(examples)


def test_where_all_are_twins_they_stay():
  examples = [row(f"a:{i}", 1, 2) for i in range(6)]
  train, held_out, same = hold_out(examples, 2, seed=0)
  assert len(train) == same == 4 and not {*train} & {*held_out}


def test_windows_of_a_text_stay_together():
  texts = [row(f"a.jsonl:{t}", t, w) for t in range(10) for w in range(5)]
  train, held_out, _ = hold_out(texts, 10, seed=0)
  sides = [{texts[i].where for i in side} for side in (train, held_out)]
  assert not sides[0] & sides[1] and len(held_out) == 10
  one = [row("book.txt", 0, w) for w in range(20)]
  train, held_out, _ = hold_out(one, 5, seed=0)
  assert train == [*range(15)] and sorted(held_out) == [*range(15, 20)]


def test_the_first_ones_are_of_all_sources():
  """As eval.limit takes them."""
  examples = [x for i in range(4) for x in rows(f"f{i}", 100, 1000 * i)]
  _, held_out, _ = hold_out(examples, 80, seed=0)
  assert {i // 100 for i in held_out[:20]} == {0, 1, 2, 3}
