"""A trained student as a Hugging Face folder, adapters as PEFT folders.

A teacher whose own blocks learned is no PEFT adapter; it becomes a folder like the
student's. Every process of a run calls these functions; process 0 alone writes.
"""

import logging
from collections.abc import Mapping
from pathlib import Path

from jaxtyping import PyTree

from okd_jax import models
from okd_jax.config.schema import Settings
from okd_jax.errors import UserError
from okd_jax.run.build import Run, Shapes
from okd_jax.run.outline import teacher_paths
from okd_jax.runtime.sharding import gathered
from okd_jax.runtime.workdir import writes
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
) -> None:
  """Writes the student to a folder, or to a file that ends in .gguf.

  template: what its prompts were written with, '' for none; None is what the run says.
  """
  tree = gathered(params["student"])
  if writes() and folder.suffix == GGUF:
    models.save_gguf(folder, tree, run.outline.student, run.outline.tokenizer)
  elif writes():
    models.save(
      folder,
      tree,
      run.outline.student,
      run.outline.tokenizer,
      dtype=run.job.settings.export.dtype,
      card=_card(run.job.settings),
      template=_template(run) if template is None else template,
    )


def export_teachers(
  run: Run | Shapes,
  params: Mapping[str, PyTree],
  frozen: Mapping[str, PyTree],
  folder: Path,
) -> None:
  """Writes adapters, of several teachers each to its own folder in `folder`.

  frozen: the teachers' parameters; read only where a teacher's own blocks learned.
  """
  paths, alone = teacher_paths(run.job.settings), len(run.cast.teachers) == 1
  for name, decoder in run.cast.adapted.items():
    place = folder if alone else folder / name
    adapter, tree = decoder.adapter, params["adapter"][name]
    peft = adapter.folder == "adapter"
    tree = gathered(tree if peft else adapter.merge(frozen[name], tree))
    if not writes():
      continue
    if peft:
      base = _base_model(paths.get(name, ""))
      if base and models.is_part(base):
        _log.warning(
          "%s: the adapter is of the text model of %s alone, and PEFT, which opens the "
          "whole, would leave it out; write the merged model with export --merge",
          place,
          base,
        )
      models.save_adapter(place, tree, adapter, decoder.config, base)
      continue
    blocks = ", ".join(map(str, adapter.blocks))
    models.save(
      place,
      tree,
      decoder.config,
      run.outline.tokenizer,
      dtype=run.job.settings.export.dtype,
      card=_card(run.job.settings) | {"Trained blocks": blocks},
    )


def export_merged(
  run: Run | Shapes,
  params: Mapping[str, PyTree],
  folder: Path,
) -> None:
  """Writes adapted teachers as models of their own, each with its module in it.

  Raises:
    UserError: if there is none, for a module that no weights can hold
      (`Adapter.merge`), or for weights that cannot be read.
  """
  if not run.cast.adapted:
    raise UserError("no teacher of this run has an adapter that could be merged")
  teachers = {name: decoder.config for name, decoder in run.cast.adapted.items()}
  # In float32: rounded once, when the sum is written.
  whole = load_whole(run.job.settings, teachers, run.mesh, "float32")
  alone = len(run.cast.teachers) == 1
  for name, decoder in run.cast.adapted.items():
    tree = gathered(decoder.adapter.merge(whole[name], params["adapter"][name]))
    if writes():
      models.save(
        folder if alone else folder / name,
        tree,
        decoder.config,
        run.outline.teacher_tokenizer or run.outline.tokenizer,
        dtype=run.job.settings.export.dtype,
        card=_card(run.job.settings) | {"Merged": decoder.adapter.kind},
        template=_template(run),
      )


def _base_model(path: str) -> str:
  """A teacher's path as PEFT finds it from anywhere: hub ids stay, folders are whole.

  PEFT opens what is named from the folder that a program runs in. Of a workdir it is
  the folder of the exported model.
  """
  local = Path(path).expanduser()
  if not path or not local.exists():
    return path
  exported = local / "student"
  return str((exported if exported.is_dir() else local).resolve())


def _template(run: Run | Shapes) -> str:
  """data.template, if it had any part in the rows; '' where they were used as they are.

  Without the rows nobody knows; then it is data.template.
  """
  template = run.job.settings.data.template
  if isinstance(run, Shapes):
    return template
  kinds = {e.record.kind for e in run.data.train if e.record is not None}
  return template if kinds & set(_TEMPLATED) else ""


def _card(settings: Settings) -> dict[str, str]:
  teachers = ", ".join(settings.teachers.values()) or settings.teacher.path
  method, data = settings.method.name, settings.data.train
  return {"Teacher": teachers, "Method": method, "Data": data}
