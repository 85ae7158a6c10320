"""Which rows are held out for evaluation, where nobody has given others."""

import collections
import re
from collections.abc import Hashable, Sequence

import numpy as np

from okd_jax.data.encode import Example

_PLACE = re.compile(r"(:| row |: record )\d+$")  # of a row in its source


def hold_out(
  examples: Sequence[Example], count: int, seed: int
) -> tuple[list[int], list[int], int]:
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

  >>> rows = [Example(np.arange(i, i + 3), 1, (), f"a:{i}") for i in range(6)]
  >>> train, held_out, same = hold_out(rows, 2, seed=0)
  >>> len(train), len(held_out), same, sorted(train + held_out)
  (4, 2, 0, [0, 1, 2, 3, 4, 5])
  """
  sources: dict[str, dict[str, list[int]]] = collections.defaultdict(dict)
  for i, example in enumerate(examples):
    texts = sources[_PLACE.sub("", example.where)]
    texts.setdefault(example.where, []).append(i)
  sizes = [sum(map(len, texts.values())) for texts in sources.values()]
  rng, held = np.random.default_rng(seed), set()
  for texts, share in zip(sources.values(), _shares(sizes, count), strict=True):
    held |= _drawn(list(texts.values()), share, rng)
  out = rng.permutation(sorted(held)).tolist()
  known = {_key(examples[i]) for i in out}
  rest = [i for i in range(len(examples)) if i not in held]
  train = [i for i in rest if _key(examples[i]) not in known]
  return train or rest, out, len(rest) - len(train)


def _shares(sizes: Sequence[int], count: int) -> list[int]:
  """How many rows of each source: in proportion, the largest remainders rounded up."""
  exact = np.array(sizes) * count / sum(sizes)
  shares = np.floor(exact).astype(int)
  for i in np.argsort(shares - exact, kind="stable")[: count - shares.sum()]:
    shares[i] += 1
  return shares.tolist()


def _drawn(texts: list[list[int]], count: int, rng: np.random.Generator) -> set[int]:
  """At least so many rows of whole texts."""
  if len(texts) == 1:
    return set(texts[0][len(texts[0]) - count :])
  found: set[int] = set()
  for i in rng.permutation(len(texts)):
    if len(found) >= count:
      break
    found |= set(texts[i])
  return found


def _key(example: Example) -> Hashable:
  return example.prompt_length, example.tokens.tobytes()
