"""From a configuration to a run: the phases in order, nothing is trained here."""

import dataclasses
import functools
import logging

from jax.sharding import Mesh
from ml_collections import ConfigDict

from okd_jax.config.schema import Settings
from okd_jax.data import day, rows
from okd_jax.methods import Method
from okd_jax.run import checks, ends, identity, room, student
from okd_jax.run.cast import Cast, kernel, make_cast, shapes
from okd_jax.run.data import Data, read_data, records
from okd_jax.run.job import Job, check
from okd_jax.run.outline import Outline, outline
from okd_jax.run.plan import Plan, make_models, make_plan
from okd_jax.run.state import TrainState, first_state
from okd_jax.run.stop import Stop
from okd_jax.run.streamed import stream_data
from okd_jax.runtime import agreement, distributed, sharding
from okd_jax.runtime.workdir import Workdir
from okd_jax.teachers import activity, saliency, trunk
from okd_jax.teachers.load import load_teachers

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Run:
  """What one run needs, ready for its loop: what each phase has found.

  stop: asked between any two batches, whatever is computed.
  """

  job: Job
  mesh: Mesh
  outline: Outline
  data: Data
  cast: Cast
  plan: Plan
  stop: Stop

  @property
  def settings(self) -> Settings:
    return self.job.settings

  @property
  def method(self) -> Method:
    return self.job.method

  def init(self) -> TrainState:
    """The state of step 0; not needed by a run that resumes."""
    cast, plan = self.cast, self.plan
    return first_state(self.settings, cast, plan.random, plan.abstract, self.mesh)

  def only_top(self) -> "Run":
    """The run without its teacher's trunk, which is deleted from the devices."""
    cast = trunk.only_top(self.cast)
    plan = dataclasses.replace(self.plan, models=make_models(self.job, cast))
    return dataclasses.replace(self, cast=cast, plan=plan)


def build(config: ConfigDict, workdir: Workdir, stop: Stop | None = None) -> Run:
  """Loads the models and the data that a resolved configuration names.

  stop: asked between the phases, and between batches; never by default.

  Raises:
    UserError: for whatever is wrong with the configuration, a model or the data.
    Stopped: if `stop` came true.
  """
  stop = stop or Stop()
  job = check(config)
  settings = job.settings
  mesh = sharding.make_mesh(**settings.mesh.sizes)
  _log.info("%s: %s", distributed.found(), sharding.described(mesh))
  distributed.connect(mesh)
  sharding.check_batch(
    settings.train.batch_size, settings.train.microbatches, mesh, job.one_row_in
  )
  identity.check_processes(config.to_dict(), settings)
  identity.check_models(settings, workdir)
  shape = outline(job, workdir, functools.partial(records, settings.data))
  room.check(settings, shape.student, workdir)
  ends.tell(shape, settings.data)
  with day.written_on(identity.kept_day(settings, workdir)):
    data = _read(job, shape, mesh)
    identity.keep_day(shape.tokenizer, settings.data, workdir)
  agreement.check_same(
    {"data.train": rows.digest(data.train), "data.eval": rows.digest(data.eval)}
  )
  stop.check()
  cast = make_cast(job, shape, data, mesh, workdir, stop)
  cast = student.with_held(settings, cast, mesh)
  compared = bool(cast.stored) or bool(cast.teachers and not data.other)
  checks.check_itself(settings, job.method, data.teacher_length > 0)
  if data.teacher_length:
    checks.check_own_prompts(settings, job.method)
  checks.after(settings, job.method, data.train, data.eval, cast.decoders, compared)
  _log.info("attention: %s", kernel(settings, shape.student))
  plan = make_plan(job, cast, len(data.packs))
  return Run(job, mesh, shape, data, cast, plan, stop)


def _read(job: Job, outline: Outline, mesh: Mesh) -> Data:
  settings = job.settings
  if settings.data.stream:
    return stream_data(settings, outline, mesh)
  prompts = job.method.sequences.answers_all
  return read_data(settings.data, settings.eval, outline, prompts)


@dataclasses.dataclass(frozen=True)
class Shapes:
  """A run without its data and most weights: what exporting a checkpoint needs."""

  job: Job
  mesh: Mesh
  outline: Outline
  cast: Cast
  plan: Plan


def build_shapes(config: ConfigDict, workdir: Workdir) -> Shapes:
  """The shapes of a run that was begun in `workdir`.

  Reads configurations alone, and where the student is trained in part, the rest of it.

  Raises:
    UserError: for a configuration or a model's that cannot be read.
  """
  job = check(config)
  mesh = sharding.make_mesh(**job.settings.mesh.sizes)
  shape = outline(job, workdir, functools.partial(records, job.settings.data))
  identity.check_models(job.settings, workdir)
  cast = shapes(job, shape, saliency.read(workdir.blocks))
  if job.settings.student.in_part:
    if job.settings.student.from_teacher:
      frozen = load_teachers(job.settings, shape.teachers, mesh)
      kept = activity.read(workdir.width)
      cast = dataclasses.replace(cast, frozen=frozen, kept=kept)
    cast = student.with_held(job.settings, cast, mesh)
  steps = job.settings.optim.warmup_steps + 1
  return Shapes(job, mesh, shape, cast, make_plan(job, cast, rows=steps))
