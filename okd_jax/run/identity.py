"""Whether a workdir's run is the one that is asked for, and what of it may change."""

import datetime
import json
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from transformers import PreTrainedTokenizerBase

from okd_jax import models
from okd_jax.config import read
from okd_jax.config.schema import DataSettings, Settings
from okd_jax.data import day, prepared
from okd_jax.errors import UserError
from okd_jax.methods import Method
from okd_jax.methods.base import Linear
from okd_jax.run import seal
from okd_jax.runtime import agreement, checksums, machine
from okd_jax.runtime.files import local, read_json
from okd_jax.runtime.workdir import Workdir, made_from
from okd_jax.teachers.load import adapter_digest

_log = logging.getLogger(__name__)

# How a run is watched and kept is not what it computes; neither is the mesh that it
# goes on on.
_FREE = (
  "train.log_every",
  "train.tensorboard",
  "train.wandb",
  "checkpoint.keep",
  "checkpoint.any_version",
)


def growth(config: Mapping[str, Any], workdir: Workdir) -> str:
  """The key by which the run in `workdir` is to be longer than it was, '' if by none.

  Args:
    config: the resolved configuration that is asked for.

  Raises:
    UserError: if the folder holds a run with another configuration, or if its method's
      file is another now.
  """
  saved = kept(workdir)["config"]
  if not saved:
    return ""
  wanted = json.loads(json.dumps(config))
  # Of both the steps count: with them the epochs mean nothing.
  by_steps = wanted["train"]["steps"] > 0
  length = "train.steps" if by_steps else "train.epochs"
  free = (*_FREE, "train.epochs") if by_steps else _FREE
  wanted = _placeless(wanted)
  changed = [
    row
    for row in _differences(saved, wanted)
    if row[0] not in free and not row[0].startswith("mesh.")
  ]
  grown = [key for key, before, now in changed if key == length and now > before > 0]
  different = [
    f"{key}={before!r} there, {now!r} here"
    for key, before, now in changed
    if key not in grown
  ]
  if different:
    raise UserError(
      f"{workdir.path} holds a run with another configuration "
      f"({'; '.join(different[:5])}); name another workdir, or the same values to go on"
    )
  _check_method_file(wanted["method"]["file"], workdir)
  return "".join(grown)


def of(
  config: Mapping[str, Any], settings: Settings, data: Mapping[str, Any]
) -> dict[str, Any]:
  """What a run is made from, for its checkpoints: JSON.

  Args:
    config: the resolved configuration; data: digests of rows, tokenizer and template.
  """
  found = {"config": _placeless(dict(config)), "models": models_of(settings)}
  found |= {"data": dict(data), "versions": machine.versions()}
  return json.loads(json.dumps(found))


def kept(workdir: Workdir) -> dict[str, Any]:
  """What the run in a workdir was made from; parts of which nobody knows are empty.

  As its newest checkpoint says. Until there is one, as the workdir's files say.

  Raises:
    UserError: if one of these is damaged.
  """
  nothing = {"config": {}, "models": {}, "data": {}, "versions": {}}
  found = seal.newest(workdir.checkpoints)
  if found and found[1].identity:
    known = nothing | found[1].identity
    return known | {"config": json.loads(json.dumps(read.filled(known["config"])))}
  if workdir.config.exists():
    own = read.saved(workdir.config).to_dict()
    nothing["config"] = _placeless(json.loads(json.dumps(own)))
  if workdir.models.exists():
    nothing["models"] = read_json(workdir.models)
  if workdir.about.exists():
    nothing["data"] = read_json(workdir.about).get("data", {})
  return nothing


def check_versions(settings: Settings, workdir: Workdir) -> None:
  """Refuses to go on from a checkpoint with other versions than it was written with.

  Raises:
    UserError: that names them.
  """
  saved, now = kept(workdir)["versions"], machine.versions()
  changed = [
    f"{name} {before} there, {now.get(name)} here"
    for name, before in saved.items()
    if now.get(name) != before
  ]
  if not changed:
    return
  said = f"{workdir.checkpoints}: written with other versions ({'; '.join(changed)})"
  if not settings.checkpoint.any_version:
    raise UserError(
      f"{said}; the run would not end as it began: put those back, or go on all the "
      "same with checkpoint.any_version=True"
    )
  _log.warning("%s: the run will not end as it would have with those", said)


def _placeless(config: Any) -> Any:
  """The configuration with 'stages/NAME' for the folder of a stage, wherever it lies.

  A workdir may be moved, and lies elsewhere in every process that has a copy of it.
  """
  if isinstance(config, dict):
    return {key: _placeless(value) for key, value in config.items()}
  found = re.search(r"stages/[^/]+$", config) if isinstance(config, str) else None
  return found[0] if found else config


def _check_method_file(file: str, workdir: Workdir) -> None:
  """Refuses a method.file whose text is not the one that the run began with."""
  if file and workdir.method.exists():
    if Path(file).read_bytes() != workdir.method.read_bytes():
      raise UserError(
        f"method.file={file} has changed since the run in {workdir.path} began; name "
        f"another workdir, or put back {workdir.method}, which is the file as it was"
      )


def models_of(settings: Settings) -> dict[str, str]:
  """Digests of the models and the adapter that the settings name, by their keys.

  Raises:
    UserError: for one that is not there.
  """
  paths = {"student.path": settings.student.path}
  if not settings.teacher.cache:
    teacher = "" if settings.teacher.itself else settings.teacher.path
    paths |= {"teacher.path": teacher}
    paths |= {f"teachers.{name}": path for name, path in settings.teachers.items()}
  found = {key: models.glance(path) for key, path in paths.items() if path}
  if settings.teacher.cache:
    stores = sorted(local(settings.teacher.cache).glob("*/made_from.json"))
    about = {file.parent.name: made_from(file.parent) for file in stores}
    text = json.dumps(about, sort_keys=True)
    found["teacher.cache"] = checksums.of_bytes(text.encode())
  if settings.teacher.adapter:
    found["teacher.adapter"] = adapter_digest(settings.teacher)
  return found


def check_processes(config: Mapping[str, Any], settings: Settings) -> None:
  """Refuses processes with other settings or models than process 0's.

  Raises:
    UserError: that names what differs.
  """
  if jax.process_count() == 1:
    return  # and no model's files are read for nobody
  facts = {f"config.{name}": value for name, value in _placeless(dict(config)).items()}
  agreement.check_same(facts | {"models": sorted(models_of(settings).values())})


def check_models(settings: Settings, workdir: Workdir) -> None:
  """Refuses models that are others now than when the run in the workdir began.

  Names stay where folders change: a run that a student came from may be longer now.

  Raises:
    UserError: that names one.
  """
  saved = kept(workdir)["models"]
  changed = [k for k, now in models_of(settings).items() if saved.get(k, now) != now]
  if changed:
    raise UserError(
      f"{changed[0]}: the model is another than when the run in {workdir.path} began; "
      "put that one back, or name another workdir"
    )


def kept_day(settings: Settings, workdir: Workdir) -> datetime.date | None:
  """The day that chat templates write in this run; of a new one process 0's today.

  A teacher's cache spoke of rows as they were on its own day, and prepared rows are of
  theirs.
  """
  cache = settings.teacher.cache
  for folder in (workdir, *([Workdir(local(cache))] if cache else [])):
    if folder.day.exists():
      return datetime.date.fromisoformat(read_json(folder.day)["day"])
  if settings.data.prepared:
    return prepared.day_of(settings.data.prepared)
  # Midnight passes at other times in other places.
  today = datetime.date.today().toordinal()
  return datetime.date.fromordinal(agreement.of_first(today))


def keep_day(
  tokenizer: PreTrainedTokenizerBase, data: DataSettings, workdir: Workdir
) -> None:
  """Keeps the day, if rows depend on it, and tells of it."""
  if day.names_the_day(tokenizer, data.template, data.teacher_template):
    today = day.day().isoformat()
    if not workdir.day.exists():
      workdir.write_json(workdir.day, {"day": today})
    _log.info("the chat template writes the date: %s in all of this run", today)


def tell_growth(settings: Settings, method: Method) -> None:
  """Says aloud what a run that is longer now does not share with a new one."""
  text = method.sequences
  moving = [f"method.{k}" for k, v in method.knobs.items() if isinstance(v, Linear)]
  if settings.optim.schedule != "constant":
    moving.insert(0, f"optim.schedule={settings.optim.schedule}")
  if settings.adapter.until < 1:
    moving.append(f"adapter.until={settings.adapter.until}")
  if isinstance(text.share, Linear) or (text.replay and text.replay.adaptive):
    moving.append("the share of sampled text")
  if moving:
    _log.warning(
      "the run is longer now: from here on %s follows the new length, so the run is "
      "not what one of that length would have been from its start",
      ", ".join(moving),
    )


def _differences(
  a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
  """(key, value in a, value in b) wherever two nested dicts differ."""
  for key in sorted(set(a) | set(b)):
    left, right, path = a.get(key), b.get(key), prefix + key
    if isinstance(left, dict) and isinstance(right, dict):
      yield from _differences(left, right, path + ".")
    elif left != right:
      yield path, left, right
