"""The folder of a run: its names, who writes there, and what says how it was made.

Notable features:
  a text, a JSON file or a folder is there whole or not at all, and process 0 alone
    writes it and removes it;
  what was made from something has a sidecar that says so, NAME.made_from.json beside
    a file and made_from.json in a folder; it is refused where that differs;
  a file that grows by lines is called NAME.partial until it is whole, and a killed
    writer goes on after its last whole line.
"""

import dataclasses
import glob
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from etils import epath
from jax.experimental import multihost_utils

from okd_jax.errors import UserError
from okd_jax.runtime import files, mirror

MODULES = ("adapter", "teacher")  # folders of the adapted teachers, in either form
_MADE_FROM = "made_from.json"


@dataclasses.dataclass(frozen=True)
class Workdir:
  """A run's folder; whatever lies in it is named here.

  Where a method takes `where`, a name is one in this folder, and a path stays as it is.
  """

  path: Path

  @property
  def config(self) -> Path:
    return self.path / "config.json"

  @property
  def metrics(self) -> Path:
    return self.path / "metrics.jsonl"

  @property
  def report(self) -> Path:
    return self.path / "report.html"

  @property
  def about(self) -> Path:
    """The models' sizes, the data, and where the run ran."""
    return self.path / "about.json"

  @property
  def sample_answers(self) -> Path:
    """What the models say to a few held-out prompts."""
    return self.path / "sample_answers.json"

  @property
  def cost(self) -> Path:
    return self.path / "cost.json"

  @property
  def method(self) -> Path:
    """A copy of method.file, as it was when the run began."""
    return self.path / "method.py"

  @property
  def blocks(self) -> Path:
    """Which of the teacher's blocks learn."""
    return self.path / "blocks.json"

  @property
  def models(self) -> Path:
    """Digests of the models that the run began with."""
    return self.path / "models.json"

  @property
  def day(self) -> Path:
    """The day that chat templates write, where they do."""
    return self.path / "day.json"

  @property
  def width(self) -> Path:
    """Which of the teacher's heads and MLP channels a narrower student starts from."""
    return self.path / "width.json"

  @property
  def checkpoints(self) -> "Path | epath.Path":
    return mirror.checkpoints_of(self.path)

  @property
  def student(self) -> Path:
    return self.path / "student"

  @property
  def student_adapter(self) -> Path:
    """The LoRA that was trained of the student, which is merged into it, too."""
    return self.path / "student_adapter"

  @property
  def tokenizer(self) -> Path:
    return self.path / "tokenizer"

  @property
  def profile(self) -> Path:
    return self.path / "profile"

  @property
  def tensorboard(self) -> Path:
    return self.path / "tensorboard"

  @property
  def finished(self) -> Path:
    """Digests of what the run has left, once it has ended."""
    return self.path / "finished.json"

  @property
  def left(self) -> list[Path]:
    """What a finished run has left: files, and folders with all that is in them."""
    files = [self.config, self.models, self.metrics, self.about, self.sample_answers]
    folders = [self.student, self.student_adapter, *map(self.module, MODULES)]
    bases = [folder.with_name(f"{folder.name}_base") for folder in folders]
    return [*files, self.report, *folders, *bases]

  @property
  def fixed(self) -> tuple[Path, ...]:
    """Small files that stay as they are from the first step on."""
    return self.method, self.blocks, self.width, self.day

  @property
  def grown(self) -> tuple[Path, ...]:
    """Small files that each checkpoint has a copy of: the fixed ones and what grows."""
    return *self.fixed, self.metrics, self.about, self.sample_answers

  @property
  def watched(self) -> list[Path]:
    """Larger files that the run reads and that stay as they are once they are whole."""
    found = [*self.tokenizer.rglob("*"), *(self.path / "samples").rglob("*")]
    return sorted(p for p in found if p.is_file() and ".partial" not in p.name)

  def module(self, name: str) -> Path:
    """The online module, in the folder that its form has its name from."""
    return self.path / name

  def samples(self, name: str) -> Path:
    """What the model of that name answered before training."""
    return self.path / "samples" / f"{name}.jsonl"

  def stage(self, name: str) -> "Workdir":
    return Workdir(self.path / "stages" / name)

  def write_text(self, where: str | Path, text: str) -> None:
    if writes():
      files.write_text(self._at(where), text)

  def write_json(self, where: str | Path, value: Any) -> None:
    if writes():
      files.write_json(self._at(where), value)

  def remove(self, where: str | Path) -> None:
    """Removes a file, if it is there."""
    if writes():
      self._at(where).unlink(missing_ok=True)

  def keep_folder(self, where: str | Path, save: Callable[[Path], Any]) -> None:
    """What `save(folder)` puts into an empty folder, unless it is there already."""
    path = self._at(where)
    if writes() and not path.exists():
      with files.replacing(path, re.compile("")) as partial:
        save(partial)

  def _at(self, where: str | Path) -> Path:
    return self.path / where if isinstance(where, str) else where


def writes() -> bool:
  """Whether this process is the one that writes what all of them have."""
  return jax.process_index() == 0


def barrier(name: str) -> None:
  """Waits for the other processes, and sees what they have written till then."""
  mirror.push()
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(f"okd_jax {name}")
    mirror.pull()


# What was made from what


def claim(path: Path, about: Mapping[str, Any], what: str = "output") -> None:
  """Writes down what `path` is made from; what is there must be made from the same.

  Every process calls it, before any of them writes what is claimed. A sidecar is
  replaced where the file is missing, or the folder empty.

  path: a file, or a folder that is there; all processes share it.
  about: JSON, the same in all processes.
  what: such a thing, for the error that tells to name another.

  Raises:
    UserError: if something else is there, or something of which nobody knows.
  """
  about = _plain(about)
  if writes() and not _contents(path):
    files.write_json(_sidecar(path), about)
  barrier(f"{path.name} claimed")
  found = made_from(path)
  _refuse(path, found, dict.fromkeys(found) | about, what)


def made_from(path: Path) -> dict[str, Any]:
  """What `claim` wrote down.

  Raises:
    UserError: if that is missing or damaged.
  """
  try:
    return files.read_json(_sidecar(path))
  except UserError as error:
    why = f"nothing says how it was made ({error}); name another"
    raise UserError(f"{_name(path)}: {why}") from error


def check_made_from(path: Path, about: Mapping[str, Any], what: str = "output") -> None:
  """Refuses what was made from something else; `about` may leave things open."""
  _refuse(path, made_from(path), _plain(about), what)


def _refuse(path: Path, found: dict, wanted: dict, what: str) -> None:
  different = [
    f"{key}={found.get(key)!r} there, {value!r} here"
    for key, value in wanted.items()
    if found.get(key) != value
  ]
  if different:
    raise UserError(
      f"{_name(path)} was made from something else ({'; '.join(different)}); delete it "
      f"to have it made anew, or name another {what}"
    )


def _plain(about: Mapping[str, Any]) -> dict[str, Any]:
  """As it comes back from a file: tuples are lists."""
  return json.loads(json.dumps(dict(about)))


def _sidecar(path: Path) -> Path:
  if path.is_dir():
    return path / _MADE_FROM
  return path.with_name(f"{path.name}.{_MADE_FROM}")


def _contents(path: Path) -> list[Path]:
  """What there is of a file or a folder, but for the sidecar."""
  if not path.is_dir():
    return [x for x in (path, *parts(path)) if x.exists()]
  # A hidden file is what a killed writer has left.
  inside = (x for x in path.iterdir() if not x.name.startswith("."))
  return sorted(x for x in inside if x.name != _MADE_FROM)


def _name(path: Path) -> Path:
  """What is to be deleted of it."""
  return path if path.is_dir() else (_contents(path) or [path])[0]


# Files that grow by lines


def part(path: Path, index: int = 0, count: int = 1) -> Path:
  """The file that one of `count` processes fills until `path` is whole."""
  ending = f".{index}-of-{count}" if count > 1 else ""
  return path.with_name(f"{path.name}.partial{ending}")


def parts(path: Path) -> list[Path]:
  """Those that are there, of however many processes."""
  return sorted(path.parent.glob(f"{glob.escape(path.name)}.partial*"))


def whole_lines(path: Path) -> int:
  """How many lines a file holds, none if it is missing; a torn last one is cut off."""
  if not path.exists():
    return 0
  count = end = 0
  with path.open("rb+") as file:
    for line in file:
      if line.endswith(b"\n"):
        count, end = count + 1, end + len(line)
    file.truncate(end)
  return count
