"""`okd_jax.distill`: the phases of a run, called from Python instead of a command.

What is given as an object is written into the workdir first, so that the run is an
ordinary one: `python -m okd_jax.main` could go on with it, `okd_jax.export` and
`okd_jax.evaluate` read it.
"""

import numbers
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from okd_jax import models
from okd_jax.config import read
from okd_jax.errors import UserError
from okd_jax.models import Model
from okd_jax.run import distill as whole
from okd_jax.run import given
from okd_jax.run.distill import Result
from okd_jax.runtime import files
from okd_jax.runtime.files import local
from okd_jax.runtime.workdir import Workdir, barrier, writes

Named = str | os.PathLike | Model
Rows = Iterable[Mapping[str, Any]]  # a list of dicts, a `datasets.Dataset`, …
Data = str | os.PathLike | Sequence[str | os.PathLike] | Rows

_GIVEN = "given"  # folder of a workdir: what came as objects, as the run reads it


def distill(
  *,
  teacher: Named | Mapping[str, Named] | None = None,
  student: Named | int | Mapping[str, Any],
  data: Data,
  workdir: str | os.PathLike,
  method: str | None = None,
  eval_data: Data | None = None,
  recipe: str = "default",
  **keys: Any,
) -> Result:
  """Distils a student and returns what its run left; called again, it goes on.

  Nothing is printed; `logging` has the progress.

  Args:
    teacher: a path, a hub id or a loaded `Model`; several by name for the method
      'ensemble'; None where the method has none, or a teacher cache is read.
    student: where it starts: a path, a hub id or a `Model`; a number of the teacher's
      layers; the dimensions of a random one (student.model), or {} if **keys say it.
    data: rows (any iterable of dicts with the keys of data files), or paths or ids.
    workdir: the folder of the run.
    method: a key of `okd_jax.METHODS`; None is the recipe's, of 'default' okd.
    eval_data: held-out rows; by default some of `data` are held out.
    recipe: what the configuration starts from: a file, or the name of a shipped one.
    **keys: any configuration keys, such as **{"train.steps": 100}.

  Returns:
    The result: `.student` (a `Model`), `.figures`, `.report`, `.adapter`, `.workdir`.

  Raises:
    UserError: for whatever is wrong with the configuration, a model or the data.
  """
  place = local(workdir)
  changes: dict[str, Any] = {"method.name": method} if method else {}
  changes |= _teachers(teacher, place) | _student(student, place)
  changes["data.train"] = given.data_sources(data, place, _GIVEN, "train")
  if eval_data is not None:
    changes["data.eval"] = given.data_sources(eval_data, place, _GIVEN, "eval")
  return whole.run(read.from_keys(changes | keys, recipe), place)[-1]


def _teachers(teacher: Any, place: Path) -> dict[str, Any]:
  if teacher is None:
    return {}
  none = {"teacher.path": "", "teacher.model.hidden_size": 0}
  if not isinstance(teacher, Mapping):
    return none | {"teacher.path": _model(teacher, place, "teacher")}
  for name in teacher:
    if not str(name).isidentifier():
      raise UserError(f"teacher {name!r}: a teacher's name is a word such as 'big'")
  return none | {
    f"teachers.{name}": _model(one, place, f"teacher-{name}")
    for name, one in teacher.items()
  }


def _student(student: Any, place: Path) -> dict[str, Any]:
  # Whatever the recipe starts from gives way.
  none = {"student.path": "", "student.layers": 0, "student.model.hidden_size": 0}
  none |= {"student.which_layers": "even", "student.width": 1.0}
  if isinstance(student, numbers.Integral):
    return none | {"student.layers": int(student)}
  if isinstance(student, Mapping):
    return none | {f"student.model.{key}": value for key, value in student.items()}
  return none | {"student.path": _model(student, place, "student")}


def _model(model: Named, place: Path, name: str) -> str:
  """A path; of a loaded model, that of a folder which it is written to."""
  if not isinstance(model, Model):
    return str(model)
  if model.params is None:
    raise UserError(f"{name}: the model was loaded without its parameters")
  folder = place / _GIVEN / name
  if writes():
    _keep_model(model, folder, place)
  barrier(f"{name} given")
  return str(folder)


def _keep_model(model: Model, folder: Path, place: Path) -> None:
  """Writes the model's folder, or finds that it is there already."""
  name = folder.name
  fresh = folder.with_name(f".{name}.new") if folder.exists() else folder
  dtype = jax.tree.leaves(model.params)[0].dtype
  models.save(fresh, model.params, model.config, model.tokenizer, dtype=dtype)
  if fresh != folder:
    if models.fingerprint(fresh) == models.fingerprint(folder):
      files.remove_folder(fresh)
    elif Workdir(place).config.exists():
      files.remove_folder(fresh)
      raise UserError(
        f"{place} holds a run with another {name} than the model that is given here; "
        "name another workdir"
      )
    else:  # of a call that never became a run
      files.remove_folder(folder)
      fresh.rename(folder)
