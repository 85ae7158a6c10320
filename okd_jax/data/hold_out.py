"""Which rows are held out for evaluation, where nobody has given others."""

import numpy as np
from jaxtyping import Bool, Int, Shaped

from okd_jax.data.rows import Rows

Numbers = Int[np.ndarray, " _"]


def hold_out(rows: Rows, count: int, seed: int) -> tuple[Numbers, Numbers, int]:
  """Draws rows of all sources, of each as many as its share of the whole.

  A text's windows stay together where that gives so many; else they are the last ones
  of one text beside whole ones.

  Args:
    count: how many rows; fewer than there are.

  Returns:
    (rows to train on, in their order; rows held out, in any, so that the first ones are
    of all sources; how many of the others are the same as one held out). Those are left
    out of the first, unless nothing else is there.

  >>> from okd_jax.data import Example, rows
  >>> texts = [Example(np.arange(i, i + 3), 1, (), "a", number=i) for i in range(6)]
  >>> train, held_out, same = hold_out(rows.of(texts), 2, seed=0)
  >>> len(train), len(held_out), same, sorted([*train.tolist(), *held_out.tolist()])
  (4, 2, 0, [0, 1, 2, 3, 4, 5])
  """
  source, keys = rows.column("source"), rows.column("key")
  names, first = np.unique(source, return_index=True)
  names = names[np.argsort(first)]  # in the order in which they come
  sizes = [int((source == name).sum()) for name in names]
  rng, held = np.random.default_rng(seed), np.zeros(len(rows), bool)
  for name, share in zip(names, _shares(sizes, count), strict=True):
    own = np.flatnonzero(source == name)
    held[_drawn(own, rows.column("number")[own], share, rng)] = True
  out, rest = rng.permutation(np.flatnonzero(held)), np.flatnonzero(~held)
  same = _among(keys[rest], keys[out])
  train = rest if same.all() else rest[~same]
  return train, out, int(same.sum())


def _among(
  keys: Shaped[np.ndarray, " N"], known: Shaped[np.ndarray, " M"]
) -> Bool[np.ndarray, " N"]:
  """Which of the 16-byte keys are known, bool [N]."""
  # By half a key first: numpy can sort numbers, but no bytes.
  found = np.isin(*(x.view("<u8")[::2] for x in (keys, known)))
  exact = set(known.tolist())
  for i in np.flatnonzero(found):
    found[i] = bytes(keys[i]) in exact
  return found


def _shares(sizes: list[int], count: int) -> list[int]:
  """How many rows of each source: in proportion, the largest remainders rounded up."""
  exact = np.array(sizes) * count / sum(sizes)
  shares = np.floor(exact).astype(int)
  for i in np.argsort(shares - exact, kind="stable")[: count - shares.sum()]:
    shares[i] += 1
  return shares.tolist()


def _drawn(
  rows: Numbers, texts: Numbers, count: int, rng: np.random.Generator
) -> Numbers:
  """So many of the rows; texts: the number of each one's.

  Whole texts while they fit; what is missing then are the last windows of one more.
  """
  starts = np.flatnonzero(np.diff(texts, prepend=-1))
  order, sizes = rng.permutation(len(starts)), np.diff([*starts, len(rows)])
  mine = np.zeros(len(rows), bool)
  split = None
  for text in order:
    size = int(sizes[text])
    if size <= count and size < len(rows):
      mine[starts[text] : starts[text] + size] = True
      count -= size
    elif split is None:
      split = int(starts[text]) + size
    if not count:
      break
  if count and split is not None:
    mine[split - count : split] = True
  return rows[mine]
