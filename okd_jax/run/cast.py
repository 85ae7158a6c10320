"""Phase 4, the cast: student, teachers, their adapters, and the teachers' weights."""

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree
from transformers import PreTrainedTokenizerBase

from okd_jax import models
from okd_jax.config.players import StudentSettings
from okd_jax.config.schema import Settings
from okd_jax.data import PAD_ID, Example, eval_batches
from okd_jax.data.batch import Batch
from okd_jax.errors import UserError
from okd_jax.methods.base import STUDENT
from okd_jax.models import (
  Decoder,
  Kept,
  ModelConfig,
  adapters,
  kernels,
  parameter_shapes,
)
from okd_jax.models.adapters import Adapter, Part
from okd_jax.run.data import Data
from okd_jax.run.job import Job
from okd_jax.run.outline import Outline
from okd_jax.run.stop import Stop
from okd_jax.runtime import sharding
from okd_jax.runtime.workdir import Workdir
from okd_jax.teachers import activity, load, saliency
from okd_jax.teachers.saliency import Choice
from okd_jax.teachers.store import Store

_log = logging.getLogger(__name__)

_ACTIVE_ROWS = 64  # of the training data, that heads and channels are chosen by


@dataclasses.dataclass(frozen=True)
class Cast:
  """Who takes part in a run.

  student: its decoder, without dropout; with an adapter if it is trained in part.
  teachers: their decoders, by name.
  adapted: those of the teachers that carry an adapter.
  frozen: the teachers' parameters, by name, but of one that is the student itself; and
    as 'student' what is not trained of that, if anything (`run.student`). Empty where
    only shapes are wanted.
  stored: what the teacher said about the rows, by part, 'train' and 'eval', in place
    of the teacher; empty where there is one.
  choice: which of the teacher's blocks learn, where these are the adapter.
  kept: which of its heads and channels a narrower student starts from.
  """

  student: Decoder
  teachers: Mapping[str, Decoder]
  adapted: Mapping[str, Decoder]
  frozen: Mapping[str, PyTree] = dataclasses.field(default_factory=dict)
  stored: Mapping[str, Store] = dataclasses.field(default_factory=dict)
  choice: Choice | None = None
  kept: Kept | None = None

  @property
  def adapter(self) -> Adapter | None:
    """What the adapted teachers carry, all of them the same."""
    return next((decoder.adapter for decoder in self.adapted.values()), None)

  def student_variables(self, params: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """What the student's decoder reads, `params` being the trees that are trained."""
    own, adapter = params[STUDENT], self.student.adapter
    if adapter is None:
      return {"params": own}
    return adapter.variables(own, self.frozen[STUDENT])

  def teacher_params(self, name: str, params: Mapping[str, PyTree]) -> PyTree:
    """A teacher's own weights; of one that is the student itself those of now."""
    if name in self.frozen:
      return self.frozen[name]
    return self.student_variables(params)["params"]

  @property
  def decoders(self) -> dict[str, Decoder]:
    """All of them, by what a message calls them."""
    found = {"student": self.student}
    for kind, part in (("teacher", self.teachers), ("adapted teacher", self.adapted)):
      alone = len(self.teachers) == 1
      found |= {kind if alone else f"{kind} {name}": d for name, d in part.items()}
    return found

  @property
  def vocab_sizes(self) -> set[int]:
    """Of all models: vocabularies may be padded differently."""
    return {decoder.config.vocab_size for decoder in self.decoders.values()}


def make_cast(
  job: Job,
  outline: Outline,
  data: Data,
  mesh: Mesh,
  workdir: Workdir,
  stop: Stop,
) -> Cast:
  """The whole cast, weights of the teachers or what is stored of them included.

  Raises:
    UserError: for weights that cannot be read, an adapter that does not fit its
      teacher, or a store of something else.
    Stopped: if the run is to stop.
  """
  settings = job.settings
  frozen = load.load_teachers(settings, outline.teachers, mesh)
  plain = shapes(job, outline, None)
  choice = saliency.read(workdir.blocks)
  if job.adapter_kind == adapters.Blocks.kind and choice is None:
    choice = _choose(settings, plain.teachers, frozen, data, mesh, stop)
  stored = {}
  if settings.teacher.cache:
    size = outline.student.vocab_size
    stored = load.open_stored(settings, data.train, data.eval, size)
  whole = shapes(job, outline, choice)
  kept = activity.read(workdir.width)
  if settings.student.narrow and kept is None:
    kept = _choose_kept(
      settings, plain.teachers, frozen, data, mesh, outline.student, stop
    )
  return dataclasses.replace(whole, frozen=frozen, stored=stored, kept=kept)


def shapes(job: Job, outline: Outline, choice: Choice | None) -> Cast:
  """The cast without any weights.

  choice: the blocks that learn; without it, where they are the adapter, nobody adapts.

  Raises:
    UserError: for an adapter that does not fit its teacher.
  """
  train = job.settings.train
  common = dict(
    dtype=jnp.dtype(train.dtype), remat=train.remat, attention=train.attention
  )
  frozen = not job.settings.teacher.itself
  teachers = {
    name: Decoder(shape, frozen=frozen, **common)
    for name, shape in outline.teachers.items()
  }
  adapter = make_adapter(job, outline.tokenizer, choice)
  wanted = job.settings.adapter.teachers
  adapted = {}
  for name, decoder in teachers.items():
    if adapter and (not wanted or name in wanted):
      adapter.check(decoder.config)
      adapted[name] = decoder.clone(adapter=adapter)
  student = Decoder(outline.student, **common)
  student = student.clone(adapter=_student_adapter(job.settings.student, student))
  return Cast(student, teachers, adapted, choice=choice)


def _student_adapter(settings: StudentSettings, student: Decoder) -> Adapter | None:
  """What is trained of the student, None if all of it is.

  Raises:
    UserError: for what does not fit the student.
  """
  if settings.frozen:
    part = Part(settings.frozen)
    part.check_names(parameter_shapes(student.config))
    return part
  if not settings.adapter.kind:
    return None
  try:
    adapter = adapters.make(**vars(settings.adapter))
    adapter.check(student.config)
  except UserError as error:
    raise UserError(str(error).replace("adapter.", "student.adapter.")) from error
  return adapter


def make_adapter(
  job: Job, tokenizer: PreTrainedTokenizerBase | None, choice: Choice | None
) -> Adapter | None:
  """What the settings put into teachers that learn; None where none does.

  Raises:
    UserError: if the settings make no sense.
  """
  kind, settings = job.adapter_kind, job.settings.adapter
  if not kind or (kind == adapters.Blocks.kind and choice is None):
    return None
  fields: dict[str, Any] = dict(vars(settings)) | {"kind": kind}
  fields["blocks"] = choice.blocks if choice else ()
  fields["ids"] = _prompt_ids(settings.text, kind, tokenizer)
  return adapters.make(**fields)


def _prompt_ids(
  text: str, kind: str, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[int, ...]:
  """The tokens whose embeddings a prompt starts from, none if there is no text."""
  if not text:
    return ()
  if kind != adapters.Prompt.kind:
    raise UserError(
      f"adapter.text={text!r} starts a prompt, but the teacher's adapter is "
      f"{kind!r}; set adapter.kind=prompt or leave adapter.text empty"
    )
  ids = tokenizer.encode(text, add_special_tokens=False)
  if not ids:
    raise UserError(f"adapter.text={text!r} has no token")
  return tuple(ids)


def _choose(
  settings: Settings,
  teachers: Mapping[str, Decoder],
  frozen: Mapping[str, PyTree],
  data: Data,
  mesh: Mesh,
  stop: Stop,
) -> Choice:
  [(name, decoder)] = teachers.items()
  batches = stop.heard(_batches(settings, data.eval, mesh))
  with jax.set_mesh(mesh):
    found = saliency.block_saliency(
      decoder, frozen[name], batches, mesh, settings.train.loss_chunk
    )
  return saliency.choose(np.asarray(found), settings.adapter.share)


def _choose_kept(
  settings: Settings,
  teachers: Mapping[str, Decoder],
  frozen: Mapping[str, PyTree],
  data: Data,
  mesh: Mesh,
  student: ModelConfig,
  stop: Stop,
) -> Kept:
  [(name, decoder)] = teachers.items()
  with jax.set_mesh(mesh):
    batches = stop.heard(_batches(settings, data.train[:_ACTIVE_ROWS], mesh))
    squares = activity.mean_squares(decoder, frozen[name], batches, mesh)
  whole = decoder.config
  _log.info(
    "student.width=%s: of each layer %d of %d heads and %d of %d MLP channels",
    settings.student.width,
    student.num_heads,
    whole.num_heads,
    student.mlp_size,
    whole.mlp_size,
  )
  layers = settings.student.taken(whole.num_layers)
  squares = {part: values[layers] for part, values in squares.items()}
  return models.choose_kept(squares, decoder.config, student)


def _batches(
  settings: Settings, examples: Sequence[Example], mesh: Mesh
) -> Iterator[Batch]:
  """All of the rows as the teacher reads them, each in a row of its own."""
  batches = eval_batches(
    [example.for_teacher() for example in examples],
    batch_size=sharding.whole_rows(settings.eval.batch_size, mesh),
    length=max(settings.data.max_length, settings.data.form.teacher_length),
    pad_id=PAD_ID,
  )
  return map(Batch.of, batches)


def kernel(settings: Settings, shape: ModelConfig) -> str:
  """What computes attention in training rows that no learned prefix comes before."""
  train, length = settings.train, settings.data.max_length
  return kernels.choose(train.attention, kernels.form(shape, train.dtype, length))
