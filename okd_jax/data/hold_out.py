"""Which rows are held out for evaluation, where nobody has given others."""

import numpy as np
from jaxtyping import Bool, Int, Shaped

from okd_jax.data.rows import Rows

Numbers = Int[np.ndarray, " _"]


def hold_out(rows: Rows, count: int, seed: int) -> tuple[Numbers, Numbers, int]:
  """Draws rows of all sources, of each as many as its share of the whole.

  A text's windows stay together, but for a source that is one long text: of that it is
  the last windows.

  Args:
    count: how many rows; fewer than there are. Where texts stay together it may come to
      some more.

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
  """At least so many of the rows, of whole texts; texts: the number of each one's."""
  starts = np.flatnonzero(np.diff(texts, prepend=-1))
  if len(starts) == 1:
    return rows[len(rows) - count :]
  order, sizes = rng.permutation(len(starts)), np.diff([*starts, len(rows)])
  taken = order[: np.searchsorted(np.cumsum(sizes[order]), count) + 1] if count else []
  mine = np.zeros(len(starts), bool)
  mine[taken] = True
  return rows[np.repeat(mine, sizes)]
