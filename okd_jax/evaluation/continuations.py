"""How likely a model finds continuations of contexts, in batches of few shapes."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from okd_jax.data.batch import Batch
from okd_jax.errors import UserError
from okd_jax.losses import cross_entropy, log_probs, per_token
from okd_jax.models import Decoder, output
from okd_jax.text.prompts import Tokens, bucket, in_batches, left_padded

Pair = tuple[Sequence[int], Sequence[int]]  # tokens of a context, of what follows it


def log_likelihoods(
  decoder: Decoder,
  variables: PyTree,
  pairs: Sequence[Pair],
  *,
  batch_size: int = 8,
  max_length: int = 0,
  progress: Callable[[int], object] = lambda count: None,
) -> list[tuple[float, bool]]:
  """(log p(continuation | context) in nats, whether greedy decoding writes it), each.

  Too long a pair loses the start of its context. Pairs that differ in their last token
  alone, as the letters of a multiple choice do, are read once. An empty continuation
  has log-probability 0.

  Args:
    variables: {'params': …}.
    max_length: tokens of a row; 0 is the model's context.
    progress: called with a number of pairs whenever so many more are done.

  Raises:
    UserError: a context is empty, or a continuation alone is too long.
  """
  max_length = max_length or decoder.config.max_length
  _check(pairs, max_length)
  rows = _shared_rows(pairs, max_length)
  read, sharing = [np.array(row, np.int32) for row in rows], list(rows.values())
  found = [(0.0, True)] * len(pairs)
  progress(len(pairs) - sum(map(len, sharing)))
  for chosen, size in in_batches(read, batch_size, None):
    longest = max(len(pairs[i][1]) for row in chosen for i in sharing[row])
    some = [read[row] for row in chosen]
    batch = _scores_of(decoder, variables, some, longest, size, max_length)
    for row, scores in zip(chosen, batch, strict=True):
      for i in sharing[row]:
        found[i] = _result(scores, pairs[i][1])
      progress(len(sharing[row]))
  return found


def _check(pairs: Sequence[Pair], max_length: int) -> None:
  for context, continuation in pairs:
    if not len(context):
      raise UserError("a context has no tokens: there must be at least one")
    if len(continuation) > max_length:
      raise UserError(
        f"a continuation has {len(continuation)} tokens, but the model reads only "
        f"{max_length}"
      )


def _shared_rows(
  pairs: Sequence[Pair], max_length: int
) -> Mapping[tuple[int, ...], list[int]]:
  """What the model reads, all but a pair's last token: which pairs read it."""
  rows: dict[tuple[int, ...], list[int]] = {}
  for i, (context, continuation) in enumerate(pairs):
    if len(continuation):
      row = [*context, *continuation][-(max_length + 1) : -1]
      rows.setdefault(tuple(row), []).append(i)
  return rows


class _Scores(NamedTuple):
  """Of the last C positions of each row, and of what follows a row.

  logprobs: log-probability of the row's next token; nothing at the last position.
  greedy: whether that token is the likeliest.
  after: log-probabilities of all tokens after the row.
  """

  logprobs: Float[Array | np.ndarray, "*B C"]
  greedy: Bool[Array | np.ndarray, "*B C"]
  after: Float[Array | np.ndarray, "*B V"]


def _scores_of(
  decoder: Decoder,
  variables: PyTree,
  rows: Sequence[Tokens],
  longest: int,
  size: int,
  max_length: int,
) -> Iterator[_Scores]:
  """Scores of each row of a batch of `size`, for continuations up to `longest`."""
  no_draws = np.zeros(len(rows), np.int32)
  tokens, lengths, _ = left_padded(rows, no_draws, size, max_length, None)
  last = min(bucket(longest), tokens.shape[1])
  scores = jax.device_get(_scores(decoder, variables, tokens, lengths, last=last))
  for i in range(len(rows)):
    yield _Scores(*(each[i] for each in scores))


@functools.partial(jax.jit, static_argnames=("decoder", "last"))
def _scores(
  decoder: Decoder,
  variables: PyTree,
  tokens: Int[Array, "B L"],
  lengths: Int[Array, " B"],
  *,
  last: int,
) -> _Scores:
  """Scores of left-padded rows; only the `last` positions have logits."""
  width = tokens.shape[1]
  real = jnp.arange(width)[None] >= width - lengths[:, None]
  following = jnp.roll(tokens, -1, axis=1)
  batch = Batch(tokens, following, real, real.astype(jnp.int32))
  whole = output(decoder, variables, batch)
  end = whole.replace(hidden=whole.hidden[:, -last:])
  logprobs, greedy = per_token(_figures, {"model": end}, following[:, -last:], chunk=0)
  after = whole.replace(hidden=whole.hidden[:, -1:]).logits()[:, 0]
  return _Scores(logprobs, greedy, log_probs(after))


def _figures(
  logits: Mapping[str, Float[Array, "B C V"]], labels: Int[Array, "B C"]
) -> tuple[Float[Array, "B C"], Bool[Array, "B C"]]:
  own = logits["model"]
  return -cross_entropy(own, labels), own.argmax(-1) == labels


def _result(scores: _Scores, continuation: Sequence[int]) -> tuple[float, bool]:
  *_, final = continuation
  count = len(scores.logprobs)
  before = slice(count - len(continuation), count - 1)
  # In float64: the sum of a whole window runs to thousands of nats.
  total = scores.logprobs[before].sum(dtype=np.float64) + float(scores.after[final])
  greedy = scores.greedy[before].all() and scores.after.argmax() == final
  return float(total), bool(greedy)
