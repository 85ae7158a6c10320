"""Text from language models: one compiled loop over a cache, whatever the model.

Notable features:
  a `Source` says what comes next and remembers what it has read, so a teacher, its
    adapted form, a mixture or two models side by side are sources too, and `choose`
    turns what a source says into a token;
  a row draws from its own key and its own index, so its text depends neither on the
    batch it sits in nor on its place there;
  lengths are explicit: padding may be any token, EOS included;
  log-probabilities are those of the source itself, at temperature 1 and unfiltered;
  one program a bucket of prompt lengths; temperature, top_k and top_p are traced.
"""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PyTree, UInt32

from okd_jax.errors import UserError
from okd_jax.text.filters import ban_repeats, keep_top_k, keep_top_p
from okd_jax.text.prompts import Tokens, in_batches, left_padded
from okd_jax.text.source import Source

_SMALLEST_TEMPERATURE = 1e-6


class Sampling(NamedTuple):
  """How to draw: `temperature` 0 is greedy, `top_k` 0 and `top_p` 1 filter nothing.

  The temperature comes first, then the k most likely tokens stay, then of these the
  fewest that hold `top_p` of the mass. Tokens tied with the last that stays stay too.
  """

  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0


Settings = tuple[Any, ...]  # `Sampling`, or whichever NamedTuple `choose` reads


class Rollout(NamedTuple):
  """Generated tokens; what follows a row's end is `pad_id`, its log-probability 0.

  lengths: tokens up to the end, the EOS among them.
  logprobs: log-probability of each token under the source, whatever the sampling.
  ended: whether the row reached an EOS before the limit.
  """

  tokens: Int[Array, "B T"]
  lengths: Int[Array, " B"]
  logprobs: Float[Array, "B T"]
  ended: Bool[Array, " B"]


_Picked = tuple[Int[Array, " B"], Float[Array, " B"]]  # tokens, log-probabilities
# (keys, what the source says, settings) -> what is chosen
Choose = Callable[[Key[Array, " B"], PyTree, Settings], _Picked]


class Completion(NamedTuple):
  """One row of a `Rollout` in host memory, cut to its length."""

  tokens: Int[np.ndarray, " T"]
  logprobs: Float[np.ndarray, " T"]
  ended: bool


def draw(
  keys: Key[Array, " B"], logits: Float[Array, "B V"], sampling: Sampling
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
  """One token a row and its log-probability under the logits as they are."""
  logits = logits.astype(jnp.float32)
  token = jax.lax.cond(
    sampling.temperature > 0,
    lambda: jax.vmap(jax.random.categorical)(keys, warp(logits, sampling)),
    lambda: logits.argmax(-1),
  )
  return token, _logprob(logits, token)


def _logprob(
  logits: Float[Array, "B V"], token: Int[Array, " B"]
) -> Float[Array, " B"]:
  logits = logits.astype(jnp.float32)
  chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
  return chosen - jax.nn.logsumexp(logits, axis=-1)


def warp(logits: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
  """Logits over the temperature, -inf where top_k or top_p filter a token out."""
  # From the maximum down, so that no temperature overflows what matters.
  logits = logits.astype(jnp.float32)
  logits -= logits.max(-1, keepdims=True)
  logits /= jnp.maximum(sampling.temperature, _SMALLEST_TEMPERATURE)
  # Real branches: who does not filter does not pay for the search.
  logits = jax.lax.cond(
    sampling.top_k > 0, lambda x: keep_top_k(x, sampling.top_k), lambda x: x, logits
  )
  return jax.lax.cond(
    sampling.top_p < 1, lambda x: keep_top_p(x, sampling.top_p), lambda x: x, logits
  )


_STATIC = ("source", "max_new_tokens", "choose", "no_repeat_ngram")


@functools.partial(jax.jit, static_argnames=_STATIC)
def sample(
  source: Source,
  variables: PyTree,
  tokens: Int[Array, "B L"],
  lengths: Int[Array, " B"],
  rows: UInt32[Array, " B"],
  key: Key[Array, ""],
  sampling: Settings,
  eos_ids: Int[Array, " E"],
  pad_id: Int[Array, ""],
  *,
  max_new_tokens: int,
  choose: Choose = draw,
  no_repeat_ngram: int = 0,
) -> Rollout:
  """Continues left-padded prompts until every row has ended or is full.

  lengths: real tokens of each prompt; 0 marks a row that only fills the batch.
  rows: each row's own number; its token t is drawn with
    `fold_in(fold_in(key, row), t)`.
  choose: `(keys, logits, sampling) -> (token [B], logprob [B])`.
  no_repeat_ngram: `n` of `ban_repeats`, of sources that say logits; 0 bans nothing.

  Nothing is donated: the cache is made, written in place and dropped in here.
  """
  keys = jax.vmap(jax.random.fold_in, (None, 0))(key, rows)
  loop = _Loop(
    step=jnp.zeros((), jnp.int32),
    token=tokens[:, -1],
    state=_read_prompts(source, variables, tokens, lengths, max_new_tokens),
    done=lengths == 0,
    out=_nothing(len(tokens), max_new_tokens),
  )
  pick = _picking(choose, sampling, tokens, lengths, no_repeat_ngram)
  loop = jax.lax.while_loop(
    lambda loop: (loop.step < max_new_tokens) & ~loop.done.all(),
    lambda loop: _advance(loop, source, variables, lengths, keys, eos_ids, pick),
    loop,
  )
  return _everywhere(_mask(loop.out, pad_id))


def generate(
  source: Source,
  variables: PyTree,
  prompts: Sequence[Sequence[int] | Tokens],
  key: Key[Array, ""],
  *,
  max_new_tokens: int,
  sampling: Settings = Sampling(),  # noqa: B008 (immutable)
  eos_ids: Sequence[int] | Int[np.ndarray, " E"] = (),
  pad_id: int = 0,
  batch_size: int = 32,
  rows: Sequence[int] | Int[np.ndarray, " N"] | None = None,
  choose: Choose = draw,
  no_repeat_ngram: int = 0,
  sharding: jax.sharding.Sharding | None = None,
  heard: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> list[Completion]:
  """Continues every prompt; the results are in the prompts' order.

  variables: what `source.apply` reads; no_repeat_ngram: as in `sample`.
  rows: what sets a prompt's draws apart from another's under the same key; by
    default its index. Give the global index where the prompts are a part of a whole.
  sharding: of a batch's leading axis, where the batch is to be spread over devices.
  heard: what the batches pass through; it may raise before any of them.

  Raises:
    UserError: a prompt is empty or too long for the model, or a setting is unusable.
  """
  prompts = [np.asarray(prompt, np.int32) for prompt in prompts]
  limits = {"max_new_tokens": max_new_tokens, "no_repeat_ngram": no_repeat_ngram}
  _check(prompts, limits, batch_size, source.max_length, sampling)
  rows = np.arange(len(prompts)) if rows is None else np.asarray(rows)
  ends = np.asarray(eos_ids, np.int32).reshape(-1)
  settings, completions = (key, traced(sampling), ends, np.int32(pad_id)), {}
  for chosen, size in heard(in_batches(prompts, batch_size, sharding)):
    some, room = [prompts[i] for i in chosen], source.max_length - max_new_tokens
    inputs = left_padded(some, rows[chosen], size, room, sharding)
    out = sample(source, variables, *inputs, *settings, choose=choose, **limits)
    completions.update(zip(chosen, _rows(out), strict=False))  # no rows that only fill
  return [completions[i] for i in range(len(prompts))]


class _Loop(NamedTuple):
  step: Int[Array, ""]
  token: Int[Array, " B"]
  state: PyTree
  done: Bool[Array, " B"]
  out: Rollout


def _read_prompts(
  source: Source,
  variables: PyTree,
  tokens: Int[Array, "B L"],
  lengths: Int[Array, " B"],
  max_new_tokens: int,
) -> PyTree:
  """The source's state before the last prompt token, which the loop itself reads.

  So the loop's body is all there is to choosing a token, and it is traced once.
  """
  batch, width = tokens.shape
  state = source.init(batch, width + max_new_tokens - 1)  # The last one is never read.
  if width == 1:
    return state
  start = width - lengths[:, None]
  index = jnp.arange(width - 1)[None]
  segment_ids = (index >= start).astype(jnp.int32)
  positions = jnp.maximum(index - start, 0)
  _, state = source.apply(variables, tokens[:, :-1], segment_ids, positions, state)
  return state


def _picking(
  choose: Choose,
  sampling: Settings,
  tokens: Int[Array, "B L"],
  lengths: Int[Array, " B"],
  no_repeat_ngram: int,
) -> Callable[[_Loop, Key[Array, " B"], PyTree], _Picked]:
  """`(loop, keys, what the source says) -> what is chosen`, the ban kept."""

  def pick(loop: _Loop, keys: Key[Array, " B"], said: PyTree) -> _Picked:
    """The next token of each row [B], and its log-probability where it is known."""
    if not no_repeat_ngram:
      return choose(keys, said, sampling)
    before = jnp.concatenate([tokens, loop.out.tokens], axis=1)
    first, stop = tokens.shape[1] - lengths, tokens.shape[1] + loop.step
    allowed = ban_repeats(said, before, first, stop, no_repeat_ngram)
    token, _ = choose(keys, allowed, sampling)
    return token, _logprob(said, token)

  return pick


def _nothing(batch: int, max_new_tokens: int) -> Rollout:
  return Rollout(
    tokens=jnp.zeros((batch, max_new_tokens), jnp.int32),
    lengths=jnp.zeros(batch, jnp.int32),
    logprobs=jnp.zeros((batch, max_new_tokens)),
    ended=jnp.zeros(batch, bool),
  )


def _advance(
  loop: _Loop,
  source: Source,
  variables: PyTree,
  lengths: Int[Array, " B"],
  keys: Key[Array, " B"],
  eos_ids: Int[Array, " E"],
  pick: Callable[[_Loop, Key[Array, " B"], PyTree], _Picked],
) -> _Loop:
  """Reads the newest token, chooses the next one and writes it down."""
  positions = jnp.maximum(lengths - 1 + loop.step, 0)[:, None]
  logits, state = source.apply(
    variables, loop.token[:, None], jnp.ones_like(positions), positions, loop.state
  )
  token_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, loop.step)
  token, logprob = pick(loop, token_keys, logits)
  ended = ~loop.done & (token[:, None] == eos_ids[None]).any(-1)
  out = Rollout(
    tokens=loop.out.tokens.at[:, loop.step].set(token),
    lengths=loop.out.lengths + ~loop.done,
    logprobs=loop.out.logprobs.at[:, loop.step].set(logprob),
    ended=loop.out.ended | ended,
  )
  return _Loop(loop.step + 1, token, state, loop.done | ended, out)


def _mask(out: Rollout, pad_id: Int[Array, ""]) -> Rollout:
  """Hides what rows went on to draw after their end."""
  own = jnp.arange(out.tokens.shape[1])[None] < out.lengths[:, None]
  return out._replace(
    tokens=jnp.where(own, out.tokens, pad_id),
    logprobs=jnp.where(own, out.logprobs, 0.0),
  )


def _everywhere(tree: PyTree) -> PyTree:
  """Replicates the results, so that every process can read all of them."""
  if jax.sharding.get_abstract_mesh().empty:
    return tree
  return jax.lax.with_sharding_constraint(tree, jax.P())


def _rows(out: Rollout) -> Iterator[Completion]:
  out = jax.device_get(out)
  for tokens, length, logprobs, ended in zip(*out, strict=True):
    yield Completion(tokens[:length], logprobs[:length], bool(ended))


def traced(sampling: Settings) -> Settings:
  """Numbers of one type, so that an int where a float was is no new program."""
  if not isinstance(sampling, Sampling):
    return sampling
  temperature, top_k, top_p = sampling
  return Sampling(np.float32(temperature), np.int32(top_k), np.float32(top_p))


def _check(
  prompts: Sequence[Int[np.ndarray, "..."]],
  limits: Mapping[str, int],
  batch_size: int,
  max_length: int,
  sampling: Settings,
) -> None:
  """Raises a UserError that lists everything wrong with the request."""
  max_new_tokens = limits["max_new_tokens"]
  problems = [
    f"{name}={value} must be at least {least}"
    for name, value, least in (
      ("max_new_tokens", max_new_tokens, 1),
      ("batch_size", batch_size, 1),
      ("no_repeat_ngram", limits["no_repeat_ngram"], 0),
    )
    if value < least
  ]
  if isinstance(sampling, Sampling):
    problems += _sampling_problems(sampling)
  for i, prompt in enumerate(prompts):
    where = f"prompt {i + 1} of {len(prompts)}" if len(prompts) > 1 else "the prompt"
    if prompt.ndim != 1 or not prompt.size:
      problems.append(f"{where} is empty: there must be at least one token to continue")
    elif prompt.size + max_new_tokens > max_length:
      problems.append(
        f"{where} has {prompt.size} tokens and {max_new_tokens} new ones are asked "
        f"for, but the model takes at most {max_length} in all"
      )
  if problems:
    more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
    raise UserError("cannot generate: " + "; ".join(problems[:5]) + more)


def _sampling_problems(sampling: Sampling) -> Iterator[str]:
  temperature, top_k, top_p = sampling
  if not (temperature >= 0 and math.isfinite(temperature)):
    yield f"temperature={temperature} must be a number of at least 0"
  if top_k < 0:
    yield f"top_k={top_k} must be at least 0, where 0 means no limit"
  if not 0 < top_p <= 1:
    yield f"top_p={top_p} must be above 0 and at most 1"
