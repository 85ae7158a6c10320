"""What a model of a run answers to every prompt before training, as token ids."""

import functools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int, Key

from okd_jax.errors import UserError
from okd_jax.text.answers_job import BATCHES, Job, answer, digest
from okd_jax.text.rollout import Completion, Sampling, generate
from okd_jax.text.source import Source


def answer_prompts(
  source: Source,
  variables: Any | Callable[[], Any],
  prompts: Sequence[Int[np.ndarray, " _"]],
  path: Path,
  *,
  key: Key[Array, ""],
  max_new_tokens: int,
  sampling: Sampling,
  eos_ids: Sequence[int],
  batch_size: int,
  sharding: jax.sharding.Sharding | None,
  about: Mapping[str, Any],
  heard: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> list[Int[np.ndarray, " _"]]:
  """One answer to each prompt, from `path` or sampled into it; row i draws from i.

  Every process calls it, and all of them answer every row together. The file has a
  line of token ids a prompt.

  variables: what `source` reads, or what makes them, called if an answer is missing.
  about: whatever else the answers depend on; heard: as in `rollout.generate`.

  Raises:
    UserError: if there are answers to something else, or a damaged file.
  """
  given = functools.cache(variables) if callable(variables) else lambda: variables
  settings = {"max_new_tokens": max_new_tokens, "sampling": sampling}
  settings |= {"eos_ids": eos_ids, "batch_size": batch_size, "sharding": sharding}
  generate(source, None, [], key, **settings)  # Refuses before anything is written.

  def ask(prompts: Sequence[np.ndarray], rows: Sequence[int]) -> list[Completion]:
    return generate(source, given(), prompts, key, rows=rows, heard=heard, **settings)

  asked = {"prompts": digest(prompts), "max_new_tokens": max_new_tokens}
  asked |= {name: float(value) for name, value in sampling._asdict().items()}
  asked |= {"eos_ids": [int(i) for i in eos_ids], **about}
  label, piece = f"{path.stem} answers", BATCHES * batch_size
  answer(Job(path, prompts, ask, _line, asked, piece, together=True, label=label))
  return _read(path, len(prompts))


def _line(_: int, completion: Completion) -> bytes:
  return json.dumps(completion.tokens.tolist()).encode() + b"\n"


def _read(path: Path, count: int) -> list[Int[np.ndarray, " _"]]:
  try:
    lines = path.read_text(encoding="utf8").splitlines()
    answers = [np.array(json.loads(line), np.int32) for line in lines]
  except (TypeError, ValueError) as error:
    raise UserError(f"{path} is damaged ({error}); delete it") from error
  if len(answers) != count:
    raise UserError(f"{path}: {len(answers)} answers to {count} prompts; delete it")
  return answers
