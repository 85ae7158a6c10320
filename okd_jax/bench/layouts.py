"""How a run may lie on devices: the sizes of the mesh, and what is stored or computed
again."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from okd_jax.config.schema import Settings
from okd_jax.errors import UserError
from okd_jax.models import ModelConfig
from okd_jax.run.ahead import TEACHER
from okd_jax.run.job import Job
from okd_jax.runtime import sharding

_LOGITS = 256 << 20  # bytes of a chunk's, as `losses.outputs` has them beside a CPU
_PARTS = (1, 2, 4, 8, 16)  # microbatches that a search tries
_TENSOR = (1, 2, 4, 8)


class Layout(NamedTuple):
  """data, fsdp, tensor: sizes of the mesh.

  teacher: 'replicate' or 'fsdp'.
  remat, microbatches: those of config.train.
  """

  data: int
  fsdp: int
  tensor: int
  teacher: str
  remat: bool
  microbatches: int

  @property
  def mesh(self) -> dict[str, int]:
    return dict(zip(sharding.AXES, self[:3], strict=True))

  @property
  def rows(self) -> int:
    """Ways that the rows of a batch are divided."""
    return self.data * self.fsdp

  def flags(self) -> str:
    """The configuration's flags that ask for it."""
    keys = [f"mesh.{axis}={size}" for axis, size in self.mesh.items()]
    keys += [f"mesh.teacher={self.teacher}", f"train.remat={self.remat}"]
    keys += [f"train.microbatches={self.microbatches}"]
    return " ".join(f"--config.{key}" for key in keys)

  def __str__(self) -> str:
    sizes = " ".join(f"{axis}{size}" for axis, size in self.mesh.items() if size > 1)
    remat = " remat" if self.remat else ""
    parts = f" x{self.microbatches}" if self.microbatches > 1 else ""
    return f"{sizes or 'one'} teacher {self.teacher}{remat}{parts}"


def asked(settings: Settings, count: int) -> Layout:
  """The layout that the settings ask for, on so many devices.

  Raises:
    UserError: if the mesh does not fit them.
  """
  mesh = settings.mesh
  sizes = [mesh.data, mesh.fsdp, mesh.tensor]
  known = int(np.prod([size for size in sizes if size != -1]))
  sizes = [count // max(known, 1) if size == -1 else size for size in sizes]
  if min(sizes) < 1 or np.prod(sizes) != count:
    told = ", ".join(f"mesh.{a}={s}" for a, s in zip(sharding.AXES, sizes, strict=True))
    raise UserError(f"{told} does not fit the {count} devices of the topology")
  train = settings.train
  return Layout(*sizes, mesh.teacher, train.remat, train.microbatches)


def divides(layout: Layout, job: Job) -> bool:
  """Whether every microbatch has whole rows for each device."""
  parts = layout.microbatches * layout.rows * job.one_row_in
  return job.settings.train.batch_size % parts == 0


def candidates(
  job: Job, shapes: Mapping[str, ModelConfig], count: int
) -> Iterator[Layout]:
  """The layouts that make sense for these models on so many devices.

  Every tensor size divides the heads of all models; with neither fsdp nor a teacher
  there is one way to store the teacher.
  """
  for tensor in _TENSOR:
    heads = [n for s in shapes.values() for n in (s.num_heads, s.num_kv_heads)]
    if count % tensor or any(n % tensor for n in heads):
      continue
    rest = count // tensor
    for fsdp in (n for n in range(1, rest + 1) if rest % n == 0):
      for teacher in TEACHER if fsdp > 1 else TEACHER[:1]:
        for remat in (False, True):
          for parts in _PARTS:
            layout = Layout(rest // fsdp, fsdp, tensor, teacher, remat, parts)
            if divides(layout, job):
              yield layout


def laid_out(job: Job, layout: Layout, kernel: str, vocab_size: int) -> Job:
  """The job with the layout's settings, and with what its devices would choose.

  kernel: of attention where the settings leave it open.
  vocab_size: the largest of the models.
  """
  train = job.settings.train
  rows = max(train.batch_size // layout.rows // layout.microbatches, 1)
  fits = 1 << max(_LOGITS // (4 * vocab_size), 1).bit_length() - 1
  train = dataclasses.replace(
    train,
    remat=layout.remat,
    microbatches=layout.microbatches,
    attention=train.attention or kernel,
    loss_chunk=train.loss_chunk or max(fits // rows, 1),
  )
  return dataclasses.replace(
    job, settings=dataclasses.replace(job.settings, train=train)
  )


def stand_in(layout: Layout) -> Mesh:
  """A mesh of that layout, for arithmetic: which asks it for its sizes alone."""
  device = np.full(layout[:3], jax.devices()[0], dtype=object)
  return Mesh(device, sharding.AXES, axis_types=(AxisType.Auto,) * 3)
