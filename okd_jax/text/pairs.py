"""Text that two models write together, both reading all of it.

Sources for `rollout`: each step both caches advance by the same token. What differs is
who chooses it. Variables are a pair, the student's and the teacher's.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree

from okd_jax.text.rollout import Sampling, Source, draw

Logits = tuple[Float[Array, "B V"], Float[Array, "B V"]]  # the student's, the teacher's
Drawn = tuple[Int[Array, " B"], Float[Array, " B"]]  # tokens, log-probabilities


class Mixed(NamedTuple):
  """How a mixture draws: `weight` is the teacher's share of each distribution."""

  sampling: Sampling
  weight: float


class Interleaved(NamedTuple):
  """How interleaving draws: the student's token stays among the teacher's `top`."""

  student: Sampling
  teacher: Sampling
  top: int


@functools.cache
def pair_source(student: Source, teacher: Source) -> Source:
  """The two as one source, whose logits are a pair; made once for the same two."""

  def init(batch: int, slots: int) -> tuple[PyTree, PyTree]:
    return student.init(batch, slots), teacher.init(batch, slots)

  def apply(
    variables: tuple[PyTree, PyTree],
    tokens: Int[Array, "B L"],
    segment_ids: Int[Array, "B L"],
    positions: Int[Array, "B L"],
    states: tuple[PyTree, PyTree],
  ) -> tuple[Logits, tuple[PyTree, PyTree]]:
    outputs = [
      source.apply(own, tokens, segment_ids, positions, state)
      for source, own, state in zip((student, teacher), variables, states, strict=True)
    ]
    logits, states = zip(*outputs, strict=True)
    # Vocabularies may be padded differently: ids beyond the shorter are no tokens.
    size = min(x.shape[-1] for x in logits)
    return tuple(x[..., :size] for x in logits), states

  return Source(init, apply, min(student.max_length, teacher.max_length))


@functools.cache
def cut_source(source: Source, size: int) -> Source:
  """A source that says only the first `size` ids, those that every model can read.

  Vocabularies may be padded differently, and to read an id beyond its embedding gives
  a model NaN.
  """

  def apply(
    variables: PyTree,
    tokens: Int[Array, "B L"],
    segment_ids: Int[Array, "B L"],
    positions: Int[Array, "B L"],
    state: PyTree,
  ) -> tuple[Float[Array, "B V"], PyTree]:
    logits, state = source.apply(variables, tokens, segment_ids, positions, state)
    return logits[..., :size], state

  return source._replace(apply=apply)


def draw_mixed(keys: Key[Array, " B"], logits: Logits, settings: Mixed) -> Drawn:
  """A token of weight * p + (1 - weight) * q, and its log-probability under that.

  MiniLLM's teacher-mixed sampling, Gu et al. 2023, arXiv 2306.08543, Section 2.2.
  """
  log_q, log_p = (jax.nn.log_softmax(x.astype(jnp.float32)) for x in logits)
  weight = settings.weight
  mixture = jnp.logaddexp(log_p + jnp.log(weight), log_q + jnp.log1p(-weight))
  return draw(keys, mixture, settings.sampling)


def draw_interleaved(
  keys: Key[Array, " B"], logits: Logits, settings: Interleaved
) -> Drawn:
  """The student's token if the teacher ranks it in its `top`, else the teacher's own.

  Speculative knowledge distillation, Xu et al. 2024, arXiv 2410.11325, Algorithm 1.
  Ranks are those of the teacher's distribution as it is, before its temperature and
  top_p, and ties count for the student. The log-probability is that of whoever wrote
  the token.
  """
  student, teacher = logits
  own = jax.vmap(jax.random.fold_in, (0, None))(keys, 1)
  drafted, logprob = draw(keys, student, settings.student)
  instead, other = draw(own, teacher, settings.teacher)
  score = jnp.take_along_axis(teacher, drafted[:, None], axis=-1)
  keep = jnp.sum(teacher > score, axis=-1) < settings.top
  return jnp.where(keep, drafted, instead), jnp.where(keep, logprob, other)
