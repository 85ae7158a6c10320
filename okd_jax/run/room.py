"""Whether a workdir can be written and has room, asked before anything is loaded."""

import math
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp

from okd_jax.config.schema import Settings
from okd_jax.errors import UserError
from okd_jax.models import ModelConfig, parameter_shapes
from okd_jax.runtime.workdir import Workdir, writes


def try_out(workdir: Workdir) -> None:
  """Writes a file, has it put on the disk, and removes it.

  Raises:
    UserError: if that fails, or if a file is where a folder belongs.
  """
  if not writes():
    return
  folders = [workdir.checkpoints, workdir.student, workdir.tokenizer]
  for folder in folders:
    if folder.exists() and not folder.is_dir():
      raise UserError(f"{folder} is a file, where a folder belongs; move it away")
  probe = workdir.path / f".written.{os.getpid()}"
  try:
    probe.parent.mkdir(parents=True, exist_ok=True)
    with probe.open("wb") as file:
      file.write(bytes(2**16))
      file.flush()
      os.fsync(file.fileno())
  except OSError as error:
    raise UserError(
      f"{workdir.path}: cannot be written ({error.strerror}); make room, or name "
      "another workdir"
    ) from error
  finally:
    if probe.exists():
      probe.unlink()


def check(settings: Settings, student: ModelConfig, workdir: Workdir) -> None:
  """Refuses a workdir without room for one more checkpoint and the exported student.

  Raises:
    UserError: with both sizes.
  """
  place = workdir.checkpoints
  if not writes():
    return
  free = shutil.disk_usage(_there(workdir.path)).free
  export, saved = _sizes(settings, student)
  # Orbax writes to a store by itself.
  needed = export + (saved if isinstance(place, Path) else 0)
  if free < needed:
    raise UserError(
      f"{workdir.path}: {free / 1e6:.0f} MB are free there, but a checkpoint and the "
      f"exported student take {needed / 1e6:.0f} MB; make room, or name another workdir"
    )


def _sizes(settings: Settings, student: ModelConfig) -> tuple[int, int]:
  """Bytes of the exported student, and of what is saved of it at the least."""
  leaves = jax.tree.leaves(parameter_shapes(student))
  count = sum(math.prod(leaf.shape) for leaf in leaves)
  export = count * jnp.dtype(settings.export.dtype).itemsize
  if settings.student.in_part:
    return export, 0  # next to nothing is trained
  moments = 2 * jnp.dtype(settings.optim.dtype or "float32").itemsize
  return export, count * (4 + moments)


def _there(path: Path) -> Path:
  """The folder, or the one of those around it that is there."""
  return path if path.exists() else _there(path.absolute().parent)
