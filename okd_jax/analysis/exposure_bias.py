"""How much worse a student is on its own text than on its teacher's: ExAccErr.

Arora et al. 2022, arXiv 2204.01171, as OKD (arXiv 2409.12512, Eqs. 5 to 7, Tables I and
IV) reads it. p is the teacher, q the student:

    R(l) = sum over t <= l of E[KL(p || q) at token t], the tokens before it from q
    l e(l) = the same sum, the tokens before it from p
    ExAccErr(l) = (R(l) - l e(l)) / (l e(l)), in per cent

0 means that errors do not accumulate; below 0 the student is closer to its teacher on
its own text. The expectation over the next token is exact; that over the text is a mean
over prompts with one continuation each, at temperature 1, from the first token after
the prompt on and without a ban on repeated n-grams. (LMOps' script begins one token
late and samples under its 6-gram ban.)
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Key

from okd_jax import losses
from okd_jax.analysis.positions import at_positions
from okd_jax.data import Example
from okd_jax.errors import UserError
from okd_jax.text.rollout import generate
from okd_jax.text.source import Side, decoder_source

LENGTH = 16  # new tokens: what a single number is quoted at
_RESAMPLES = 1000


@dataclasses.dataclass(frozen=True)
class Errors:
  """KL(p || q) at the tokens of some continuations, and which of them there are."""

  kl: Float[np.ndarray, "N T"]
  live: Bool[np.ndarray, "N T"]

  def cumulated(self, weights: Float[np.ndarray, " N"]) -> Float[np.ndarray, " T"]:
    """The sum over t <= l of the mean over live rows, for every l.

    weights: how often each row counts.
    """
    count = weights @ self.live
    total = weights @ np.where(self.live, self.kl, 0.0)
    # Where every row has ended, nothing is added.
    return np.cumsum(np.divide(total, count, out=np.zeros_like(total), where=count > 0))


def excess(
  own: Errors,
  teachers: Errors,
  own_weights: Float[np.ndarray, " N"] | None = None,
  teacher_weights: Float[np.ndarray, " N"] | None = None,
) -> Float[np.ndarray, " T"]:
  """ExAccErr(l) in per cent for l = 1 … T.

  Args:
    own: errors on the student's continuations.
    teachers: errors on the teacher's.
    own_weights, teacher_weights: how often each row counts; once by default.
  """
  r = own.cumulated(_once(own) if own_weights is None else own_weights)
  weights = _once(teachers) if teacher_weights is None else teacher_weights
  e = teachers.cumulated(weights)
  return 100 * np.divide(r - e, e, out=np.full_like(r, np.nan), where=e > 0)


def _once(errors: Errors) -> Float[np.ndarray, " N"]:
  return np.ones(len(errors.kl))


def interval(
  own: Errors, teachers: Errors, seed: int = 0
) -> tuple[Float[np.ndarray, " T"], Float[np.ndarray, "2 T"]]:
  """(standard error, 95 % interval) of `excess` by a bootstrap over the prompts.

  A prompt's two continuations are drawn together.
  """
  generator, count = np.random.default_rng(seed), len(own.kl)
  draws = generator.multinomial(count, np.full(count, 1 / count), size=_RESAMPLES)
  found = np.array([excess(own, teachers, w, w) for w in draws.astype(float)])
  return found.std(axis=0, ddof=1), np.percentile(found, [2.5, 97.5], axis=0)


def measure(
  teacher: Side,
  student: Side,
  prompts: Sequence[Example],
  *,
  eos_ids: Sequence[int],
  length: int = LENGTH,
  seed: int = 0,
  batch_size: int = 32,
) -> dict[str, Any]:
  """ExAccErr over `length` new tokens: figures that go into JSON.

  Args:
    teacher: p, the frozen one or an adapted one.
    student: q.
    prompts: texts whose first `prompt_length` tokens are continued.
    eos_ids: tokens that end a text.
    length: l, the longest.
    seed: of the continuations and of the bootstrap.

  Returns:
    {'prompts', 'length', 'excess', 'std', 'low', 'high'}, in per cent at `length`, and
    the 'curve' {'excess', 'low', 'high', 'own', 'teachers'} over l = 1 … length: the
    last two are R(l) and l e(l) in nats.

  Raises:
    UserError: for fewer than two prompts.
  """
  prompts = [example for example in prompts if example.prompt_length]
  if len(prompts) < 2:
    raise UserError("exposure bias needs at least two rows with a prompt")
  sides = {"teacher": teacher, "student": student}
  both = {
    name: _errors(sides, name, prompts, eos_ids, length, seed, batch_size)
    for name in sides
  }
  found = _figures(both["student"], both["teacher"], seed)
  return {"prompts": len(prompts), "length": length} | found


def _figures(own: Errors, theirs: Errors, seed: int) -> dict[str, Any]:
  curve, (std, (low, high)) = excess(own, theirs), interval(own, theirs, seed)
  return {
    "excess": float(curve[-1]),
    "std": float(std[-1]),
    "low": float(low[-1]),
    "high": float(high[-1]),
    "curve": {
      "excess": curve.tolist(),
      "low": low.tolist(),
      "high": high.tolist(),
      "own": own.cumulated(_once(own)).tolist(),
      "teachers": theirs.cumulated(_once(theirs)).tolist(),
    },
  }


def _errors(
  sides: Mapping[str, Side],
  writer: str,
  prompts: Sequence[Example],
  eos_ids: Sequence[int],
  length: int,
  seed: int,
  batch_size: int,
) -> Errors:
  """The errors on what one of the two writes."""
  key = jax.random.fold_in(jax.random.key(seed), sorted(sides).index(writer))
  texts = continued(sides[writer], prompts, eos_ids, length, key, batch_size)
  values, mask = at_positions(
    sides,
    texts,
    lambda logits, _: {"kl": losses.forward_kl(logits["teacher"], logits["student"])},
    batch_size=batch_size,
  )
  return _aligned(values["kl"], mask, length)


def continued(
  writer: Side,
  prompts: Sequence[Example],
  eos_ids: Sequence[int],
  length: int,
  key: Key[Array, ""],
  batch_size: int,
) -> list[Example]:
  """The prompts, each with an answer that the writer draws at temperature 1."""
  heads = [example.prompt for example in prompts]
  completions = generate(
    decoder_source(writer.decoder),
    writer.variables,
    heads,
    key,
    max_new_tokens=length,
    eos_ids=eos_ids,
    batch_size=batch_size,
  )
  return [
    dataclasses.replace(
      example, tokens=np.concatenate([head, completion.tokens]).astype(np.int32)
    )
    for example, head, completion in zip(prompts, heads, completions, strict=True)
  ]


def _aligned(
  kl: Float[np.ndarray, "N L"], mask: Bool[np.ndarray, "N L"], length: int
) -> Errors:
  """The masked values of every row, moved to its front."""
  found, live = np.zeros((len(kl), length)), np.zeros((len(kl), length), bool)
  for i, (row, own) in enumerate(zip(kl, mask, strict=True)):
    some = row[own][:length]
    found[i, : len(some)], live[i, : len(some)] = some, True
  return Errors(found, live)
