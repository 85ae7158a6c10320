"""A trained student as a Hugging Face folder, adapters as PEFT folders.

A teacher whose own blocks learned is no PEFT adapter; it becomes a folder like the
student's. Every process of a run calls these functions; process 0 alone writes.
"""

import logging
from collections.abc import Mapping
from pathlib import Path

from jaxtyping import PyTree
from transformers import PreTrainedTokenizerBase

from okd_jax import models
from okd_jax.errors import UserError
from okd_jax.evaluation.figures import score_by
from okd_jax.methods.base import STUDENT
from okd_jax.models import Card, ModelConfig, int8
from okd_jax.models.adapters import Lora
from okd_jax.run import checkpoint, student
from okd_jax.run.build import Run, Shapes
from okd_jax.run.card import made_by
from okd_jax.run.outline import teacher_paths
from okd_jax.run.state import TrainState
from okd_jax.runtime.files import local
from okd_jax.runtime.sharding import gathered
from okd_jax.runtime.workdir import Workdir, writes
from okd_jax.teachers.load import load_whole

GGUF = ".gguf"
_log = logging.getLogger(__name__)
# Kinds of records that data.template puts into words; others are taken as they are.
_TEMPLATED = ("instruction", "messages")


def export_student(
  run: Run | Shapes,
  params: Mapping[str, PyTree],
  folder: Path,
  template: str | None = None,
  card: Card | None = None,
) -> None:
  """Writes the student to a folder, or to a file that ends in .gguf.

  template: what its prompts were written with, '' for none; None is what the run says.
  """
  tree = student.merged(run.cast, params[STUDENT])
  if folder.suffix == GGUF:
    models.save_gguf(folder, tree, run.outline.student, run.outline.tokenizer)
  else:
    models.save(
      folder,
      tree,
      run.outline.student,
      run.outline.tokenizer,
      dtype=run.job.settings.export.dtype,
      card=card,
      template=_template(run) if template is None else template,
    )


def export_student_adapter(
  run: Run | Shapes, params: Mapping[str, PyTree], folder: Path
) -> None:
  """Writes the LoRA that was trained in place of the student's weights.

  Where PEFT cannot find its base model, that comes beside, as FOLDER_base.

  Raises:
    UserError: if there is none.
  """
  decoder, settings = run.cast.student, run.job.settings
  if not isinstance(decoder.adapter, Lora):
    raise UserError("the student of this run has no adapter of its own")
  base = _base_model(settings.student.path)
  if not base:
    frozen = int8.dequantized(run.cast.frozen[STUDENT])
    base = _save_beside(run, folder, frozen, decoder.config, run.outline.tokenizer)
  tree = gathered(params[STUDENT])
  if writes():
    models.save_adapter(folder, tree, decoder.adapter, decoder.config, base)


def export_teachers(
  run: Run | Shapes, params: Mapping[str, PyTree], folder: Path
) -> None:
  """Writes adapters, of several teachers each to its own folder in `folder`.

  Where PEFT cannot find an adapter's base model, that comes beside, as FOLDER_base. A
  teacher whose own blocks learned is written as a whole.

  Raises:
    UserError: if no teacher has one, or for weights that cannot be read.
  """
  if not run.cast.adapted:
    raise UserError("no teacher of this run has an adapter")
  alone = len(run.cast.teachers) == 1
  for name, decoder in run.cast.adapted.items():
    place = folder if alone else folder / name
    adapter, tree = decoder.adapter, params["adapter"][name]
    if adapter.folder == "adapter":
      base = _base_of_teacher(run, params, name, place)
      tree = gathered(tree)
      if writes():
        models.save_adapter(place, tree, adapter, decoder.config, base)
      continue
    frozen = run.cast.frozen.get(name) or _teacher(run, params, name)
    card = _card(run, Blocks=", ".join(map(str, adapter.blocks)))
    whole = adapter.merge(frozen, tree)
    _save(run, place, whole, decoder.config, run.outline.tokenizer, card)


def export_merged(
  run: Run | Shapes, params: Mapping[str, PyTree], folder: Path
) -> None:
  """Writes adapted teachers as models of their own, each with its module in it.

  Raises:
    UserError: if there is none, for a module that no weights can hold
      (`Adapter.merge`), or for weights that cannot be read.
  """
  if not run.cast.adapted:
    raise UserError("no teacher of this run has an adapter that could be merged")
  alone = len(run.cast.teachers) == 1
  for name, decoder in run.cast.adapted.items():
    # In float32: rounded once, when the sum is written.
    whole = _teacher(run, params, name, "float32")
    tree = decoder.adapter.merge(whole, params["adapter"][name])
    card = _card(run, Merged=decoder.adapter.kind)
    place = folder if alone else folder / name
    tokenizer = _teachers_tokenizer(run)
    _save(run, place, tree, decoder.config, tokenizer, card, _template(run))


# What a run can write beside its student: by a command's flag, how, and what it is.
WRITERS = {  # of the folders that the command writes if it is asked to
  "adapter": export_teachers,
  "merge": export_merged,
  "student_adapter": export_student_adapter,
}


def restored(shapes: Shapes, workdir: Workdir, step: int | None) -> TrainState:
  """What a run's checkpoint holds; of step None that of the best one.

  Raises:
    UserError: if there is no such checkpoint.
  """
  settings = shapes.job.settings
  best, keep = score_by(settings.eval.best), settings.checkpoint.keep
  with checkpoint.opened(workdir.checkpoints, keep, best, read_only=True) as found:
    if not (steps := found.steps()):
      raise UserError(f"{workdir.checkpoints} holds no whole checkpoint yet")
    if step is None:
      return found.best(shapes.plan.abstract, shapes.mesh)[0]
    if step not in steps:
      raise UserError(f"--step={step}: the checkpoints at hand are {steps}")
    return found.restore_step(step, shapes.plan.abstract, shapes.mesh)


def _base_of_teacher(
  run: Run | Shapes, params: Mapping[str, PyTree], name: str, place: Path
) -> str:
  """What PEFT opens as the model under a teacher's adapter; written if it must be."""
  settings = run.job.settings
  path = teacher_paths(settings).get(name, "")
  if settings.teacher.itself and settings.student.in_part:  # LoRA, which it lacks
    path = settings.student.path
  base = _base_model(path)
  if not base or settings.teacher.adapter:  # the sum of both is in no folder yet
    config, tokenizer = run.outline.teachers[name], _teachers_tokenizer(run)
    whole = _teacher(run, params, name)
    return _save_beside(run, place, whole, config, tokenizer)
  if models.is_part(base):
    _log.warning(
      "%s: the adapter is of the text model of %s alone, and PEFT, which opens the "
      "whole, would leave it out; write the merged model with export --merge",
      place,
      base,
    )
  return base


def _base_model(path: str) -> str:
  """A model's path as PEFT opens it from anywhere, '' where it cannot.

  Hub ids stay and folders are whole: PEFT opens what is named from the folder that a
  program runs in. Of a workdir it is the folder of the exported model.
  """
  place = local(path)
  if not path or place.is_file():  # PEFT reads no .gguf
    return ""
  if not place.exists():
    return path
  return str(models.place_of(place).resolve())


def _teachers_tokenizer(run: Run | Shapes) -> PreTrainedTokenizerBase:
  return run.outline.teacher_tokenizer or run.outline.tokenizer


def _save_beside(
  run: Run | Shapes,
  place: Path,
  params: PyTree,
  config: ModelConfig,
  tokenizer: PreTrainedTokenizerBase,
) -> str:
  """Writes the model under the adapter at `place`; returns where it is."""
  folder = place.with_name(f"{place.name}_base").resolve()
  card = Card({"Made for": f"the adapter in {place.name}"})
  _save(run, folder, params, config, tokenizer, card)
  return str(folder)


def _teacher(
  run: Run | Shapes, params: Mapping[str, PyTree], name: str, dtype: str = ""
) -> PyTree:
  """A frozen teacher's parameters, read once more and never in int8.

  Of one that is the student itself those that it ended with.
  """
  if run.job.settings.teacher.itself:
    return int8.dequantized(run.cast.teacher_params(name, params))
  shapes = {name: run.outline.teachers[name]}
  return load_whole(run.job.settings, shapes, run.mesh, dtype)[name]


def _save(
  run: Run | Shapes,
  folder: Path,
  params: PyTree,
  config: ModelConfig,
  tokenizer: PreTrainedTokenizerBase,
  card: Card,
  template: str = "",
) -> None:
  """Writes a model that is not the student."""
  models.save(
    folder,
    params,
    config,
    tokenizer,
    dtype=run.job.settings.export.dtype,
    card=card,
    template=template,
  )


def _template(run: Run | Shapes) -> str:
  """data.template, if it had any part in the rows; '' where they were used as they are.

  Without the rows nobody knows; then it is data.template.
  """
  template = run.job.settings.data.template
  if isinstance(run, Shapes):
    return template
  return template if run.data.kinds & set(_TEMPLATED) else ""


def _card(run: Run | Shapes, **rows: str) -> Card:
  card = made_by(run.job.settings)
  return card._replace(rows={**card.rows, **rows})
