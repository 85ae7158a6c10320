"""Phase 2, the outline: shapes of the models and the tokens they share; no weights."""

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterable, Mapping

from transformers import PreTrainedTokenizerBase

from okd_jax import models
from okd_jax.config.players import RandomModel
from okd_jax.config.schema import Settings
from okd_jax.data import Record, compare_tokenizers, make_tokenizer
from okd_jax.data.format import read_template
from okd_jax.errors import UserError
from okd_jax.models import Model, ModelConfig
from okd_jax.run.job import Job
from okd_jax.runtime.workdir import Workdir
from okd_jax.teachers.load import ONLY

_MADE = re.compile(r"bytes|bpe:.*")


@dataclasses.dataclass(frozen=True)
class Outline:
  """What is known of a run's models before their weights are read.

  tokenizer: the one that all models share; None where no text is read (`ahead`).
  student: the student's shape.
  teachers: theirs, by name; none where there is no teacher, or what one said is read.
  teacher_tokenizer: the teacher's own, where it does not share the run's.
  """

  tokenizer: PreTrainedTokenizerBase | None
  student: ModelConfig
  teachers: Mapping[str, ModelConfig]
  teacher_tokenizer: PreTrainedTokenizerBase | None = None


def outline(
  job: Job, workdir: Workdir, records: Callable[[], Iterable[Record]]
) -> Outline:
  """Reads configurations and tokenizers of the models that the settings name.

  Args:
    records: gives the training data; asked only where a tokenizer is trained on it.

  Raises:
    UserError: for a model that cannot be read, tokenizers that differ, or none at all.
  """
  settings, apart = job.settings, job.method.sequences.own_tokens
  start = None
  if settings.student.path:
    start = models.load(settings.student.path, params=False)
  teachers = {
    name: models.load(path, params=False)
    for name, path in teacher_paths(settings).items()
  }
  own = {} if apart else {f"teacher {name}": m for name, m in teachers.items()}
  tokenizer = _tokenizer(settings, workdir, own | {"student": start}, records)
  if file := settings.data.chat_template:
    tokenizer.chat_template = read_template(file)
  shapes = {name: teacher.config for name, teacher in teachers.items()}
  random = settings.teacher.model
  if random.wanted and not (settings.teacher.cache or settings.teachers):
    shapes = {ONLY: _random(random, _ids(tokenizer), tokenizer)}
  student = _student(settings, {} if apart else shapes, start, tokenizer)
  if settings.teacher.itself:
    shapes = {ONLY: student}
  return Outline(
    tokenizer,
    student,
    {} if settings.teacher.cache else shapes,
    _teacher_tokenizer(settings, teachers) if apart else None,
  )


def _teacher_tokenizer(
  settings: Settings, teachers: Mapping[str, Model]
) -> PreTrainedTokenizerBase:
  teacher = teachers.get(ONLY)
  if teacher is None or teacher.tokenizer is None:
    path = settings.teacher.path
    raise UserError(f"method.cross_tokenizer: teacher.path={path} brings no tokenizer")
  return teacher.tokenizer


def _tokenizer(
  settings: Settings,
  workdir: Workdir,
  loaded: Mapping[str, Model | None],
  records: Callable[[], Iterable[Record]],
) -> PreTrainedTokenizerBase:
  """The one tokenizer of the run, on which all models must agree."""
  spec = settings.data.tokenizer
  own = {
    name: model.tokenizer
    for name, model in loaded.items()
    if model is not None and model.tokenizer is not None
  }
  for one, other in itertools.pairwise(own.values()):
    compare_tokenizers(one, other)
  if not spec:
    if not own:
      raise UserError(
        "neither teacher nor student brings a tokenizer; set data.tokenizer to a "
        "model, to 'bytes' or to 'bpe:N'"
      )
    return next(iter(own.values()))
  if workdir.tokenizer.exists():  # kept by the run that is resumed here
    return models.load_tokenizer(workdir.tokenizer)
  made = _MADE.fullmatch(spec)
  tokenizer = make_tokenizer(spec, records()) if made else models.load_tokenizer(spec)
  for name in own:
    compare_tokenizers(own[name], tokenizer)
  return tokenizer


def _student(
  settings: Settings,
  teachers: Mapping[str, ModelConfig],
  start: Model | None,
  tokenizer: PreTrainedTokenizerBase,
) -> ModelConfig:
  if start is not None:
    return start.config
  first = next(iter(teachers.values()), None)
  if settings.student.from_teacher:
    taken = first.of_layers(settings.student.taken(first.num_layers))
    width = settings.student.width
    return models.narrow_config(taken, width) if settings.student.narrow else taken
  size = first.vocab_size if first else _ids(tokenizer)
  return _random(settings.student.model, size, tokenizer)


def _ids(tokenizer: PreTrainedTokenizerBase) -> int:
  """One more than the largest id: there may be holes below it."""
  return max(tokenizer.get_vocab().values()) + 1


def _random(
  dimensions: RandomModel, vocab_size: int, tokenizer: PreTrainedTokenizerBase
) -> ModelConfig:
  return models.preset(
    **dataclasses.asdict(dimensions),
    vocab_size=vocab_size,
    bos_id=tokenizer.bos_token_id,
    eos_ids=(tokenizer.eos_token_id,),
    pad_id=tokenizer.pad_token_id,
  )


def teacher_paths(settings: Settings) -> dict[str, str]:
  """The paths of the teachers that are models of their own, by name."""
  teacher = settings.teacher
  if settings.teachers:
    return dict(settings.teachers)
  return {ONLY: teacher.path} if teacher.path and not teacher.itself else {}
