"""Text that goes on until one of several strings comes up in it."""

import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jaxtyping import Array, Int, Key

from okd_jax.text.prompts import Tokens
from okd_jax.text.rollout import Completion

_FIRST_PART = 32  # tokens


def generate_until(
  generate: Callable[..., list[Completion]],
  prompts: Sequence[Sequence[int] | Tokens],
  key: Key[Array, ""],
  *,
  stopped: Callable[[Int[np.ndarray, " T"]], bool],
  max_new_tokens: int,
  rows: Sequence[int],
  batch_size: int = 8,
  progress: Callable[[int], object] = lambda count: None,
) -> list[Int[np.ndarray, " T"]]:
  """The new tokens of each prompt, up to an EOS, a stop or `max_new_tokens`.

  Only the host can search for strings: texts grow by 32, 64, 128 … tokens, each part
  with those before it as its prompt. None is cut where it stops.

  Args:
    generate: `rollout.generate` of a source, its variables, a sampling and EOS.
    stopped: whether new tokens hold what ends a text.
    rows: of each prompt, what sets its draws apart.
    progress: called with how many tokens more are written, or never will be.

  Raises:
    UserError: as `generate`.
  """
  write = functools.partial(generate, batch_size=batch_size)
  new = [np.zeros(0, np.int32) for _ in prompts]
  left = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
  for part, (done, size) in enumerate(_parts(max_new_tokens)):
    going, own = [], {"key": jax.random.fold_in(key, part), "max_new_tokens": size}
    for some in _batches(left, batch_size):
      texts = [np.concatenate([prompts[i], new[i]]).astype(np.int32) for i in some]
      found = write(texts, rows=[rows[i] for i in some], **own)
      for i, more in zip(some, found, strict=True):
        new[i] = np.concatenate([new[i], more.tokens])
        ended = more.ended or stopped(new[i])
        progress(max_new_tokens - done if ended else size)
        going += [] if ended else [i]
    left = going
  return new


def _batches(order: Sequence[int], size: int) -> Iterator[Sequence[int]]:
  for first in range(0, len(order), size):
    yield order[first : first + size]


def _parts(total: int) -> Iterator[tuple[int, int]]:
  """(tokens before, tokens) of each part."""
  done, size = 0, _FIRST_PART
  while done < total:
    yield done, min(size, total - done)
    done, size = done + size, 2 * size
