"""What a run's models say of themselves in README.md, and how they get to the hub."""

import math
from pathlib import Path

import huggingface_hub

from okd_jax import models
from okd_jax.config.schema import Settings
from okd_jax.data.sources import called
from okd_jax.errors import UserError
from okd_jax.evaluation import figures
from okd_jax.models import Card
from okd_jax.run.outline import teacher_paths
from okd_jax.runtime import metrics
from okd_jax.runtime.workdir import writes


def of_student(settings: Settings, workdir: Path, step: int) -> Card:
  """The student's card: who taught it, by what, and its figures after `step` steps.

  Its licence is export.license, or that of the model whose weights it starts from.

  Raises:
    UserError: for metrics that cannot be read.
  """
  paths = list(teacher_paths(settings).values())
  start = settings.student.path
  from_teacher = settings.teacher.path if settings.student.from_teacher else ""
  rows = {"Student's start": start or _start(settings)} | made_by(settings).rows
  rows |= _trained(settings)
  licence = {"license": settings.export.license} if settings.export.license else {}
  return Card(
    rows | {"Steps": f"{step:,}"},
    _measured(workdir, step),
    [
      path for path in dict.fromkeys((start, *paths)) if path and models.is_hub_id(path)
    ],
    [name for name in map(_dataset, settings.data.sources) if name],
    licence or _licence(start or from_teacher),
  )


def made_by(settings: Settings) -> Card:
  """Who taught, by what method, on what data."""
  teachers = ", ".join(teacher_paths(settings).values())
  teachers = "the student itself" if settings.teacher.itself else teachers
  method, data = settings.method.name, called(settings.data.sources)
  return Card({"Teacher": teachers or "–", "Method": method, "Data": data})


def check_name(name: str, public: bool) -> None:
  """Raises a UserError for a name that no model on the hub can have."""
  if public and not name:
    raise UserError("--public says who sees what --push_to_hub uploads; set that, too")
  if not name:
    return
  try:
    huggingface_hub.utils.validate_repo_id(name)
  except huggingface_hub.utils.HFValidationError as error:
    raise UserError(f"--push_to_hub={name!r} is no OWNER/NAME on the hub") from error


def push(place: Path, name: str, public: bool) -> str:
  """Uploads a model's folder or file to the hub; returns its address.

  Args:
    name: 'owner/model'; it is made if it is not there, private unless `public`.

  Raises:
    UserError: for whatever the hub refuses.
  """
  if not writes():
    return ""
  hub = huggingface_hub.HfApi()
  try:
    address = hub.create_repo(name, private=not public, exist_ok=True)
    if place.is_file():
      hub.upload_file(path_or_fileobj=place, path_in_repo=place.name, repo_id=name)
    else:
      hub.upload_folder(folder_path=place, repo_id=name)
  except Exception as error:  # of the network, the hub, the name: no common class
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    raise UserError(
      f"{place} is written, but not on the hub as {name}: {reason}"
    ) from error
  return str(address)


def _start(settings: Settings) -> str:
  """Where a student without a path begins."""
  student = settings.student
  if not student.from_teacher:
    return "random weights"
  layers = student.layers or "all"
  which = f"{layers} layers of the teacher ({student.which_layers})"
  return which + (f", width {student.width}" if student.narrow else "")


def _trained(settings: Settings) -> dict[str, str]:
  """What was trained of the student, if that was not all."""
  student = settings.student
  if not student.in_part:
    return {}
  own = student.adapter
  lora = f"LoRA of rank {own.rank} on {' '.join(own.targets)}, merged in"
  what = lora if own.kind else f"all but {student.frozen!r}"
  return {"Trained": what + (f", beside {student.dtype}" if student.dtype else "")}


def _measured(workdir: Path, step: int) -> dict[str, str]:
  """The figures of that step, as tables show them; none if it was not measured."""
  found = {}
  for row in metrics.read(workdir):
    if row["kind"] == "eval" and row["step"] == step:
      found = {k: v for k, v in row.items() if v is not None}
  return {
    figure.title.replace("·", "student").replace("‖", " ‖ "): f"{found[name]:.4g}"
    for name, figure in figures.columns().items()
    if name in found and math.isfinite(found[name])
  }


def _dataset(source: str) -> str:
  """A source's id on the hub, '' of one that is not there."""
  name = source.split(":")[0].split("@")[0]
  on_hub = name != "embedded" and "/" in name and models.is_hub_id(name)
  return name if on_hub else ""


def _licence(path: str) -> dict[str, str]:
  return models.licence_of(path) if path else {}
