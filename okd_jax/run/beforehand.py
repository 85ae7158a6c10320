"""Answers to every training prompt, written before training and read again after."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Int, PyTree

from okd_jax.data import Example
from okd_jax.models import Decoder
from okd_jax.run.batches import end_ids, room, text_source
from okd_jax.run.build import Run
from okd_jax.runtime import sharding
from okd_jax.runtime.workdir import Workdir
from okd_jax.text.answers_beforehand import answer_prompts
from okd_jax.text.rollout import Sampling

_log = logging.getLogger(__name__)

# Branches of the seed's key, apart from each other and from those of `batches`.
_BRANCH = {"teacher": 2**31, "student": 2**31 + 1}


def answers(run: Run, workdir: Workdir) -> dict[str, list[Example]]:
  """What the models that the method asks answered to each prompt, as examples."""
  return {
    name: answers_of(run, name, workdir) for name in run.method.sequences.beforehand
  }


def with_answers(run: Run, workdir: Workdir) -> Run:
  """The run, the teacher's greedy answers to held-out prompts that have none beside.

  They are what the student is then compared with, in samples/held_out.jsonl.

  Raises:
    UserError: as `answers_of`.
  """
  held_out = list(run.data.eval)
  bare = [i for i, example in enumerate(held_out) if example.bare]
  if not bare:
    return run
  _log.info("the teacher answers %d held-out prompts that have no answer", len(bare))
  asked = [held_out[i] for i in bare]
  found = _asked(run, "teacher", asked, workdir.samples("held_out"), Sampling(0.0))
  decode = functools.partial(run.data.tokenizer.decode, skip_special_tokens=True)
  for i, tokens in zip(bare, found, strict=True):
    own = held_out[i].answered(tokens)
    held_out[i] = dataclasses.replace(own, references=(decode(tokens),))
  return dataclasses.replace(run, data=dataclasses.replace(run.data, eval=held_out))


def answers_of(run: Run, name: str, workdir: Workdir) -> list[Example]:
  """One answer to each training prompt, by 'teacher' or the untrained 'student'.

  Sampled into samples/NAME.jsonl, and read from there where it is done already;
  interrupted, it goes on after the last whole line.

  Raises:
    UserError: if the file holds answers to other prompts, or is damaged.
    Stopped: if the run is to stop; what is whole in the file stays.
  """
  sampling = run.method.sequences.student
  found = _asked(run, name, run.data.train, workdir.samples(name), sampling)
  return [
    example.answered(tokens)
    for example, tokens in zip(run.data.train, found, strict=True)
  ]


def _asked(
  run: Run,
  name: str,
  examples: Sequence[Example],
  path: Path,
  sampling: Sampling,
) -> list[Int[np.ndarray, " _"]]:
  """The answers of 'teacher' or 'student', in tokens, each to the prompt it reads."""
  settings, teacher = run.settings, name == "teacher"
  decoder, variables, model = _author(run, name)
  return answer_prompts(
    text_source(run, decoder),
    variables,
    [(e.for_teacher() if teacher else e).prompt for e in examples],
    path,
    key=jax.random.fold_in(jax.random.key(settings.train.seed), _BRANCH[name]),
    max_new_tokens=room(run),
    sampling=sampling,
    eos_ids=end_ids(run),
    batch_size=settings.eval.batch_size,
    sharding=sharding.batch_sharding(run.mesh),
    about={"model": model, "seed": settings.train.seed},
    heard=run.stop.heard,
  )


def _author(run: Run, name: str) -> tuple[Decoder, Callable[[], PyTree], str]:
  """(decoder, what makes its variables, what it was made of) of who answers."""
  if name == "student":
    return (
      run.cast.student,
      lambda: run.cast.student_variables(run.init().params),
      run.settings.student.path,
    )
  [(only, decoder)] = run.cast.teachers.items()
  if run.settings.teacher.itself:
    own = lambda: run.cast.teacher_params(only, run.init().params)  # noqa: E731
    return decoder, lambda: {"params": own()}, run.settings.student.path
  return decoder, lambda: {"params": run.cast.frozen[only]}, run.settings.teacher.path
