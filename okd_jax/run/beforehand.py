"""Answers to every training prompt, written before training and read again after."""

from collections.abc import Callable

import jax
from jaxtyping import PyTree

from okd_jax.data import Example
from okd_jax.models import Decoder
from okd_jax.run.batches import end_ids, room, text_source
from okd_jax.run.build import Run
from okd_jax.runtime import sharding
from okd_jax.runtime.workdir import Workdir
from okd_jax.text.answers_beforehand import answer_prompts

# Branches of the seed's key, apart from each other and from those of `batches`.
_BRANCH = {"teacher": 2**31, "student": 2**31 + 1}


def answers(run: Run, workdir: Workdir) -> dict[str, list[Example]]:
  """What the models that the method asks answered to each prompt, as examples."""
  return {
    name: answers_of(run, name, workdir) for name in run.method.sequences.beforehand
  }


def answers_of(run: Run, name: str, workdir: Workdir) -> list[Example]:
  """One answer to each training prompt, by 'teacher' or the untrained 'student'.

  Sampled into samples/NAME.jsonl, and read from there where it is done already;
  interrupted, it goes on after the last whole line.

  Raises:
    UserError: if the file holds answers to other prompts, or is damaged.
  """
  settings, teacher = run.settings, name == "teacher"
  read = [e.for_teacher() if teacher else e for e in run.data.train]
  decoder, variables, model = _author(run, name)
  found = answer_prompts(
    text_source(run, decoder),
    variables,
    [example.prompt for example in read],
    workdir.samples(name),
    key=jax.random.fold_in(jax.random.key(settings.train.seed), _BRANCH[name]),
    max_new_tokens=room(run),
    sampling=run.method.sequences.student,
    eos_ids=end_ids(run),
    batch_size=settings.eval.batch_size,
    sharding=sharding.batch_sharding(run.mesh),
    about={"model": model, "seed": settings.train.seed},
  )
  return [
    example.answered(tokens)
    for example, tokens in zip(run.data.train, found, strict=True)
  ]


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
