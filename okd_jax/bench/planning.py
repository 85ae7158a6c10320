"""The plan of a run: its step on hardware that is not here, in one layout or the best.

By arithmetic (`accounts`), and for TPUs by their compiler, which libtpu brings along:
it says what the step stores and sends. How long that takes is arithmetic either way.
"""

import functools
import importlib.util
import logging
import math
import os
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from okd_jax.bench import measure
from okd_jax.bench.accounts import Account, account
from okd_jax.bench.collectives import collectives
from okd_jax.bench.groups import axes_along, groups_of
from okd_jax.bench.layouts import Layout, asked, candidates, laid_out, stand_in
from okd_jax.bench.roofline import (
  EXAMPLES,
  Sent,
  Topology,
  link_seconds,
  roofline,
  span_of,
)
from okd_jax.errors import UserError
from okd_jax.run.ahead import Ahead, ahead, notes
from okd_jax.run.job import Job
from okd_jax.run.outline import Outline
from okd_jax.runtime import cli, sharding
from okd_jax.teachers.load import lies_whole

# Of a device's memory, what a program may fill: of v5e's 16 GiB 15.75 are free. An
# estimate should leave more, above all where no compiler looks at it afterwards.
_FREE, _SURE = 0.98, {True: 0.9, False: 0.97}  # by whether there are GPUs
_log = logging.getLogger(__name__)

# Else each core of a v4 would be a device, as in no run; of v5p that is the default.
_CONFIGS = {"v4": {"chip_config_name": "megacore"}}
_KERNELS = {True: "cudnn", False: "splash"}  # by whether there are GPUs


class Planned(NamedTuple):
  """A layout and what is known of the step in it.

  by: 'arithmetic', or 'compiler' where memory and collectives are the program's own.
  memory: bytes of a device by part; 'total' is what must fit.
  error: what the compiler said where it made no program.
  """

  layout: Layout
  by: str
  memory: dict[str, int]
  useful: dict[str, float]
  sent: list[Sent]
  roofline: dict[str, float]
  fits: bool
  compile_s: float = 0.0
  error: str = ""

  @property
  def order(self) -> tuple[bool, float]:
    """What ranks plans: that fits first, then the time of a step.

    As scheduled; where no compiler has said that, the mean of the two bounds.
    """
    times = self.roofline
    mean = (times["step_overlapped_s"] + times["step_in_turn_s"]) / 2
    return not self.fits, times.get("step_scheduled_s", mean)


class Planner:
  """Plans of one run on one topology."""

  def __init__(self, job: Job, shape: Outline, topology: Topology):
    self.job, self.shape, self.topology = job, shape, topology
    shapes = [shape.student, *shape.teachers.values()]
    self._vocab = max(config.vocab_size for config in shapes)
    train, length = job.settings.train, job.settings.data.max_length
    self.tokens = train.batch_size * length
    self._devices: list[Any] | None = None
    self._meshes: dict[tuple[int, ...], bool] = {}  # which can be laid on the torus
    self._general = ahead(self._laid_out(asked(job.settings, topology.count)), shape)

  def asked(self) -> Layout:
    """The layout of the settings.

    Raises:
      UserError: if its mesh does not fit the devices or the batch.
    """
    layout, train = asked(self.job.settings, self.topology.count), self.job.settings
    rows = train.train.batch_size, train.train.microbatches
    sharding.check_batch(*rows, stand_in(layout), self.job.one_row_in)
    return self._decided(layout)

  def by_arithmetic(self, layout: Layout) -> Planned:
    """The plan without a compiler."""
    found = account(self._general, layout)
    memory = found.memory | {"total": sum(found.memory.values())}
    fits = memory["total"] <= _SURE[self.topology.of_gpus] * self.topology.chip.hbm
    sent = _merged(found.sent)
    times = self._roofline(found, sent)
    return Planned(layout, "arithmetic", memory, found.useful, sent, times, fits)

  def by_compiler(self, layout: Layout) -> Planned:
    """The plan of the program that the TPU's compiler makes of the step.

    Raises:
      UserError: where there is no compiler.
    """
    mesh = self._mesh(layout)
    run = self._run(layout)
    found, begun = account(run, layout), time.perf_counter()
    try:
      program = run.compiled(mesh, layout.teacher)
    except jax.errors.JaxRuntimeError as error:
      plain = self.by_arithmetic(layout)
      return plain._replace(by="compiler", fits=False, error=_first(error))
    elapsed = time.perf_counter() - begun
    memory = _memory(found, program)
    train, length = run.settings.train, run.settings.data.max_length
    chunks = -(-length // train.loss_chunk) * layout.microbatches
    sent = _merged(_sent(program, layout, chunks))
    fits = memory["total"] <= _FREE * self.topology.chip.hbm
    times = self._roofline(found, sent)
    return Planned(layout, "compiler", memory, found.useful, sent, times, fits, elapsed)

  def search(self) -> list[Planned]:
    """The sensible layouts by arithmetic, the best first.

    Of each it is the one with the fewest microbatches that fits, if any does.
    """
    shapes = {"student": self.shape.student} | dict(self.shape.teachers)
    best: dict[tuple[Any, ...], Planned] = {}
    for layout in candidates(self.job, shapes, self.topology.count):
      known = best.get(layout[:-1])
      if (known is None or not known.fits) and self._placed(layout):
        plan = self.by_arithmetic(layout)
        if known is None or plan.fits:
          best[layout[:-1]] = plan
    if not best:
      rows = self.job.settings.train.batch_size
      raise UserError(
        f"train.batch_size={rows} cannot be divided by any mesh of the "
        f"{self.topology.count} devices of {self.topology.name}; make it a multiple"
      )
    return sorted(best.values(), key=lambda plan: plan.order)

  def compile_best(self, plans: list[Planned], count: int) -> list[Planned]:
    """The plans with the first `count` compiled, and more until one of them fits.

    Those that were compiled come first, the best at the front.
    """
    made: list[Planned] = []
    for plan in plans[: 3 * count]:
      if len(made) >= count and any(each.fits for each in made):
        break
      _log.info("compiling %s", plan.layout)
      made.append(self.by_compiler(plan.layout))
    return sorted(made, key=lambda plan: plan.order) + plans[len(made) :]

  def about(self) -> dict[str, Any]:
    """What is planned, in figures."""
    general, settings = self._general, self.job.settings
    trees = {"student": general.plan.abstract.params["student"]}
    trees |= {"modules": general.plan.abstract.params.get("adapter", {})}
    trees |= dict(general.frozen)
    return {
      "method": settings.method.name,
      "models": {n: _size(tree) for n, tree in trees.items() if _size(tree)},
      "rows": settings.train.batch_size,
      "length": settings.data.max_length,
      "tokens": self.tokens,
      "dtype": settings.train.dtype,
      "topology": self.topology.name,
      "devices": self.topology.count,
      "chip": self.topology.chip._asdict(),
      "not_planned": notes(self.job),
    }

  def _decided(self, layout: Layout) -> Layout:
    """With 'replicate' or 'fsdp' for 'auto', as a run on such devices decides."""
    if layout.teacher != "auto":
      return layout
    sizes = dict(zip(sharding.AXES, layout[:3], strict=True))
    limit = int(self.topology.chip.hbm)
    whole = lies_whole(self.job.settings, self.shape.teachers, sizes, limit)
    return layout._replace(teacher="replicate" if whole else "fsdp")

  def _laid_out(self, layout: Layout) -> Job:
    kernel = _KERNELS[self.topology.of_gpus]
    return laid_out(self.job, layout, kernel, self._vocab)

  def _run(self, layout: Layout) -> Ahead:
    return ahead(self._laid_out(layout), self.shape)

  def _mesh(self, layout: Layout) -> Mesh:
    """The mesh as a run would make it.

    Raises:
      UserError: for sizes that JAX cannot lay on the torus.
    """
    if self._devices is None:
      self._devices = tpu_devices(self.topology)
    axes = (AxisType.Auto,) * len(sharding.AXES)
    make = functools.partial(jax.make_mesh, axis_types=axes, devices=self._devices)
    try:
      return make(layout[:3], sharding.AXES)
    except NotImplementedError as error:
      told = ", ".join(f"mesh.{axis}={size}" for axis, size in layout.mesh.items())
      raise UserError(
        f"{told} cannot be laid on {self.topology.name}; make each a product of sides"
      ) from error

  def _placed(self, layout: Layout) -> bool:
    """Whether the devices can be a mesh of these sizes; True where nobody can tell."""
    sizes = layout[:3]
    if self.topology.of_gpus or importlib.util.find_spec("libtpu") is None:
      return True
    if sizes not in self._meshes:
      try:
        self._meshes[sizes] = bool(self._mesh(layout).size)
      except UserError:
        self._meshes[sizes] = False
    return self._meshes[sizes]

  def _roofline(self, found: Account, sent: list[Sent]) -> dict[str, float]:
    links = link_seconds(sent, self.topology)
    waited = None
    if all(each.apart is not None for each in sent):
      alone = [each for each in sent if not each.apart]
      waited = link_seconds(alone, self.topology)
    work = found.operations, sum(found.useful.values()), found.traffic
    return roofline(self.topology, *work, links, self.tokens, waited)


def tpu_devices(topology: Topology) -> list[Any]:
  """Devices of a TPU that is not here, for its compiler.

  Raises:
    UserError: without libtpu, or for a shape that it does not know.
  """
  cli.need("libtpu", "tpu")
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # nobody's machine is asked
  # Neither is used, but it would complain of what it did not find.
  os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
  os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
  sides = "x".join(map(str, topology.sides))
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip is opened
  name = f"{topology.kind}:{sides}"
  try:
    own = _CONFIGS.get(topology.kind, {})
    found = topologies.get_topology_desc(name, platform="tpu", **own).devices
  except jax.errors.JaxRuntimeError as error:
    raise UserError(
      f"--topology={topology.name} is none that libtpu knows ({_first(error)}); name "
      f"one such as {EXAMPLES}"
    ) from error
  return list(np.ravel(found))


def as_json(plan: Planned) -> dict[str, Any]:
  """A plan with everything that is known of it."""
  found = plan._asdict()
  found["layout"] = plan.layout._asdict() | {"flags": plan.layout.flags()}
  found["sent"] = [each._asdict() for each in plan.sent]
  return found


def _memory(found: Account, program: jax.stages.Compiled) -> dict[str, int]:
  """The parts by shapes, and the compiler's own temporaries and total.

  'arguments' is its sum of the parts that lie there beforehand, 'tiling' what its tiles
  of arrays add to these.
  """
  parts = {name: size for name, size in found.memory.items() if name != "temporaries"}
  sizes = measure.memory(program)
  analysis = program.memory_analysis()
  new = sizes["outputs"] - analysis.alias_size_in_bytes
  total = sizes["arguments"] + sizes["temporaries"] + new
  code = analysis.generated_code_size_in_bytes
  own = {"temporaries": sizes["temporaries"], "new outputs": new, "program": code}
  tiles = {"tiling": sizes["arguments"] - sum(parts.values())}
  arguments = {"arguments": sizes["arguments"]}
  return parts | tiles | own | arguments | {"total": total + code}


def _sent(program: jax.stages.Compiled, layout: Layout, chunks: int) -> Iterator[Sent]:
  """What the program sends; a group of which nothing is told are all devices.

  chunks: of the loss, at most. Its loop alone does not know how often it runs.
  """
  text, mesh = program.as_text(), layout.mesh
  groups = groups_of(text)
  for each in collectives(text):
    axes = axes_along(groups.get(each.name, ()), mesh)
    ways = math.prod(mesh[axis] for axis in axes)
    yield Sent(
      each.kind,
      _source(each.source),
      "+".join(axes),
      each.bytes,
      each.times or chunks,
      each.in_loop,
      ways,
      span_of(axes, mesh),
      each.apart,
    )


def _source(name: str) -> str:
  """Of a JAX operation's name what tells people where it stands."""
  parts = [part for part in name.split("/") if "(" not in part or "jvp" in part]
  return "/".join(parts[-3:])


def _merged(sent: list[Sent] | Iterator[Sent]) -> list[Sent]:
  """Those that differ in nothing but how often they are called; the most first."""
  found: dict[Sent, int] = {}
  for each in sent:
    alike = each._replace(times=0)
    found[alike] = found.get(alike, 0) + each.times
  merged = [each._replace(times=times) for each, times in found.items()]
  return sorted(merged, key=lambda each: -each.bytes * each.times)


def _size(tree: Any) -> int:
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _first(error: Exception) -> str:
  """The compiler's first sentence."""
  return str(error).strip().splitlines()[0][:300]
