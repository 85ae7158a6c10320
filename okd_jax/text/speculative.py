"""Speculative decoding: a small model drafts, a large one reads the draft in one pass.

Fast Inference from Transformers via Speculative Decoding, Leviathan et al. 2023, arXiv
2211.17192. With p what the large model's tokens are drawn from and q the same of the
small one, a drafted token x is kept with probability min(1, p(x) / q(x)); the first
that is not is drawn anew from max(p - q, 0), normalised, and after a draft that was
kept whole one more token is drawn from p. What comes out is distributed exactly as p,
greedy text too, but for the rounding of a pass over several tokens. A drafted token is
kept with probability sum min(p, q), `losses.acceptance`.

One text at a time: that is where a model waits for its own weights, and where each row
of a batch would keep another number of tokens.

Both caches go back by their `length` alone: what was read of a rejected draft stays in
its slots, behind the newest token, where attention does not look, until it is
overwritten.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from okd_jax.errors import UserError
from okd_jax.models import Cache, Decoder, init_cache
from okd_jax.models import logits as logits_of
from okd_jax.text.defaults import DRAFT_TOKENS
from okd_jax.text.prompts import bucket
from okd_jax.text.rollout import Sampling, traced, warp
from okd_jax.text.source import Side


class Drafted(NamedTuple):
  """A text, and how its drafts fared.

  tokens: the new ones, an EOS that ends them included.
  passes: of the large model, the reading of the prompt left out.
  judged: drafted tokens that were looked at: up to the first that was rejected.
  kept: those of them that were kept.
  expected: the sum over them of sum min(p, q), so what `kept` is on average.
  """

  tokens: Int[np.ndarray, " T"]
  passes: int
  judged: int
  kept: int
  expected: float


class Loop(NamedTuple):
  """Where a text stands.

  count: new tokens so far, the first of `tokens`.
  recent: the newest two tokens of prompt and text.
  model_cache: of all tokens but the newest.
  draft_cache: of all but the newest two.
  passes, judged, kept, expected: as in `Drafted`.
  """

  count: Int[Array, ""]
  ended: Bool[Array, ""]
  tokens: Int[Array, " T"]
  recent: Int[Array, " 2"]
  model_cache: Cache
  draft_cache: Cache
  passes: Int[Array, ""]
  judged: Int[Array, ""]
  kept: Int[Array, ""]
  expected: Float[Array, ""]


def generate(
  model: Side,
  draft: Side,
  prompt: Sequence[int] | Int[np.ndarray, " L"],
  key: Key[Array, ""],
  *,
  max_new_tokens: int,
  sampling: Sampling = Sampling(),  # noqa: B008 (immutable)
  eos_ids: Sequence[int] = (),
  draft_tokens: int = DRAFT_TOKENS,
) -> Drafted:
  """Continues a prompt as `model` would.

  Args:
    draft: the small model; what one of the two has no id for is never drafted.
    draft_tokens: how many are drafted before each pass of the large model.

  Raises:
    UserError: for an empty prompt, or one that is too long for a model.
  """
  prompt = np.asarray(prompt, np.int32)
  most = min(side.decoder.config.max_length for side in (model, draft))
  _check(prompt, most, max_new_tokens, draft_tokens)
  # A place before the first token, where the draft's first step finds nothing.
  width = bucket(prompt.size + 1)
  tokens = np.zeros(width, np.int32)
  tokens[width - prompt.size :] = prompt
  loop = speculate(
    (model.decoder, draft.decoder),
    (model.variables, draft.variables),
    tokens,
    np.int32(prompt.size),
    key,
    traced(sampling),
    np.asarray(eos_ids, np.int32).reshape(-1),
    max_new_tokens=max_new_tokens,
    draft_tokens=draft_tokens,
  )
  return _drafted(loop, max_new_tokens, eos_ids)


def _check(
  prompt: Int[np.ndarray, " L"], most: int, max_new_tokens: int, draft_tokens: int
) -> None:
  """Raises a UserError for a request that cannot be met."""
  problem = ""
  if not prompt.size:
    problem = "the prompt is empty"
  elif min(max_new_tokens, draft_tokens) < 1:
    problem = "there must be a token to draft and one to keep"
  elif prompt.size + max_new_tokens > most:
    problem = (
      f"the prompt has {prompt.size} tokens and {max_new_tokens} new ones are asked "
      f"for, but model and draft take at most {most} in all; shorten it, or do "
      "without --draft where the model alone takes more"
    )
  if problem:
    raise UserError(f"cannot generate: {problem}")


def _drafted(loop: Loop, max_new_tokens: int, eos_ids: Sequence[int]) -> Drafted:
  """In host memory, cut after the limit and after an EOS."""
  text = loop.count, loop.tokens, loop.passes, loop.judged, loop.kept, loop.expected
  count, tokens, *figures, expected = jax.device_get(text)
  new = tokens[: min(int(count), max_new_tokens)]
  ends = np.flatnonzero(np.isin(new, np.asarray(eos_ids, np.int32)))
  new = new[: ends[0] + 1] if ends.size else new
  return Drafted(new, *map(int, figures), float(expected))


_STATIC = ("decoders", "max_new_tokens", "draft_tokens")


@functools.partial(jax.jit, static_argnames=_STATIC)
def speculate(
  decoders: tuple[Decoder, Decoder],
  variables: tuple[PyTree, PyTree],
  tokens: Int[Array, " L"],
  length: Int[Array, ""],
  key: Key[Array, ""],
  sampling: Sampling,
  eos_ids: Int[Array, " E"],
  *,
  max_new_tokens: int,
  draft_tokens: int,
) -> Loop:
  """The loop of `generate`, over a prompt that is left-padded by a place or more.

  decoders, variables: of the large model and of the small one.
  length: real tokens of the prompt.

  Returns:
    Its last state; `tokens` may hold more than were asked for, and go on after an end.
  """
  model, draft = map(Side, decoders, variables)
  loop = _begin(model, draft, tokens, length, max_new_tokens + draft_tokens)

  def advance(loop: Loop) -> Loop:
    own_key = jax.random.fold_in(key, loop.passes)
    newest = length - 1 + loop.count
    return _advance(
      loop, model, draft, newest, own_key, sampling, eos_ids, draft_tokens
    )

  return jax.lax.while_loop(
    lambda loop: (loop.count < max_new_tokens) & ~loop.ended, advance, loop
  )


def _advance(
  loop: Loop,
  model: Side,
  draft: Side,
  newest: Int[Array, ""],
  key: Key[Array, ""],
  sampling: Sampling,
  eos_ids: Int[Array, " E"],
  draft_tokens: int,
) -> Loop:
  """A draft, one pass of the large model over it, and what is kept of it.

  newest: the place of the newest token.
  """
  size = model.decoder.config.vocab_size
  draft_key, judge_key = jax.random.split(key)
  drafted, q, draft_cache = _draft(
    draft, loop, newest, draft_key, sampling, draft_tokens, size
  )
  row = jnp.concatenate([loop.recent[1:], drafted])
  places = newest + jnp.arange(len(row))
  logits, model_cache = _logits(model, row, places, loop.model_cache, size)
  p = distribution(logits, sampling)
  kept, token, expected = _judged(p, q, drafted, judge_key)
  k = jnp.arange(len(row))
  new = jnp.where(k == kept, token, jnp.pad(drafted, (0, 1)))
  return Loop(
    count=loop.count + kept + 1,
    ended=jnp.any((k <= kept) & jnp.isin(new, eos_ids)),
    tokens=jax.lax.dynamic_update_slice(loop.tokens, new, (loop.count,)),
    recent=jnp.stack([row[kept], token]),
    model_cache=model_cache._replace(length=loop.model_cache.length + kept + 1),
    draft_cache=draft_cache._replace(length=loop.draft_cache.length + kept + 1),
    passes=loop.passes + 1,
    judged=loop.judged + jnp.minimum(kept + 1, len(drafted)),
    kept=loop.kept + kept,
    expected=loop.expected + expected,
  )


def _begin(
  model: Side, draft: Side, tokens: Int[Array, " L"], length: Int[Array, ""], room: int
) -> Loop:
  """The prompt read, and room for so many tokens more."""
  zero = jnp.zeros((), jnp.int32)
  slots = len(tokens) + room
  return Loop(
    count=zero,
    ended=jnp.zeros((), bool),
    tokens=jnp.zeros(room, jnp.int32),
    recent=tokens[-2:],
    model_cache=_read(model, tokens[:-1], length - 1, slots),
    draft_cache=_read(draft, tokens[:-2], length - 2, slots),
    passes=zero,
    judged=zero,
    kept=zero,
    expected=jnp.zeros(()),
  )


def _read(
  side: Side, tokens: Int[Array, " L"], length: Int[Array, ""], slots: int
) -> Cache:
  """The cache after so many tokens, left-padded."""
  decoder = side.decoder
  cache = init_cache(decoder.config, 1, slots, decoder.dtype)
  places = jnp.arange(len(tokens)) - (len(tokens) - length)
  _, cache = decoder.apply(side.variables, *_row(side, tokens, places), cache)
  return cache._replace(length=jnp.int32(len(tokens)))


def _row(
  side: Side, tokens: Int[Array, " L"], places: Int[Array, " L"]
) -> tuple[Int[Array, "1 L"], Int[Array, "1 L"], Int[Array, "1 L"]]:
  """(tokens, segments, positions) of a row: before place 0 there is padding.

  Beyond the model's context, where only what is cut off can lie, the last place stands.
  """
  last = side.decoder.config.max_length - 1
  segments = (places >= 0).astype(jnp.int32)
  return tokens[None], segments[None], jnp.clip(places, 0, last)[None]


def _logits(
  side: Side,
  tokens: Int[Array, " L"],
  places: Int[Array, " L"],
  cache: Cache,
  vocab_size: int,
) -> tuple[Float[Array, "L V"], Cache]:
  """What follows each token, over so many ids; those the model lacks are at -inf."""
  decoder, variables = side
  hidden, cache = decoder.apply(variables, *_row(side, tokens, places), cache)
  logits = logits_of(hidden[0], variables["params"], decoder.config)
  missing = max(0, vocab_size - logits.shape[-1])
  logits = jnp.pad(logits, ((0, 0), (0, missing)), constant_values=-jnp.inf)
  return logits[:, :vocab_size], cache


def distribution(
  logits: Float[Array, "L V"], sampling: Sampling
) -> Float[Array, "L V"]:
  """What `rollout.draw` draws from; at temperature 0 the likeliest token alone."""
  return jax.lax.cond(
    sampling.temperature > 0,
    lambda: jax.nn.softmax(warp(logits, sampling)),
    lambda: jax.nn.one_hot(logits.argmax(-1), logits.shape[-1]),
  )


def _draft(
  draft: Side,
  loop: Loop,
  newest: Int[Array, ""],
  key: Key[Array, ""],
  sampling: Sampling,
  count: int,
  vocab_size: int,
) -> tuple[Int[Array, " G"], Float[Array, "G V"], Cache]:
  """(tokens, what each was drawn from, the cache after all but the last).

  newest: the place of the newest token. It and the one before are read at once.
  """

  def step(
    tokens: Int[Array, " L"],
    places: Int[Array, " L"],
    cache: Cache,
    own_key: Key[Array, ""],
  ) -> tuple[Int[Array, ""], Float[Array, " V"], Cache]:
    """(a drawn token, the probabilities behind it, the cache after `tokens`)."""
    logits, cache = _logits(draft, tokens, places, cache, vocab_size)
    q = distribution(logits[-1:], sampling)[0]
    token = jax.random.categorical(own_key, jnp.log(q))
    return token.astype(jnp.int32), q, cache

  def body(
    carry: tuple[Int[Array, ""], Cache], inputs: tuple[Int[Array, ""], Key[Array, ""]]
  ) -> tuple[tuple[Int[Array, ""], Cache], tuple[Int[Array, ""], Float[Array, " V"]]]:
    (token, cache), (i, own_key) = carry, inputs
    token, q, cache = step(token[None], (newest + i)[None], cache, own_key)
    return (token, cache), (token, q)

  keys = jax.random.split(key, count)
  places = newest - 1 + jnp.arange(2)
  first, q, cache = step(loop.recent, places, loop.draft_cache, keys[0])
  later = jnp.arange(1, count), keys[1:]
  (_, cache), (tokens, qs) = jax.lax.scan(body, (first, cache), later)
  return jnp.append(first, tokens), jnp.concatenate([q[None], qs]), cache


def _judged(
  p: Float[Array, "G_1 V"],
  q: Float[Array, "G V"],
  drafted: Int[Array, " G"],
  key: Key[Array, ""],
) -> tuple[Int[Array, ""], Int[Array, ""], Float[Array, ""]]:
  """(how many are kept, the token after them, how many would be on average).

  The average is over the draws of those that were looked at.
  """
  accept_key, rest_key = jax.random.split(key)
  i = jnp.arange(len(drafted))
  uniform = jax.random.uniform(accept_key, i.shape)
  keeps = uniform * q[i, drafted] < p[i, drafted]
  kept = jnp.cumprod(keeps).sum(dtype=jnp.int32)
  own = p[kept]
  rest = jnp.maximum(own - jnp.pad(q, ((0, 1), (0, 0)))[kept], 0)
  rest = jnp.where(rest.sum() > 0, rest, own)  # all 0 by rounding alone
  token = jax.random.categorical(rest_key, jnp.log(rest)).astype(jnp.int32)
  shares = jnp.minimum(p[:-1], q).sum(-1)
  return kept, token, jnp.sum(jnp.where(i <= kept, shares, 0))
