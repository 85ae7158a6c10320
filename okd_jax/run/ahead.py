"""A run's training step from shapes alone: nothing is loaded, nothing is computed.

The phases are those of `run.build`, but that models are read from their configurations,
batches have a shape and no rows, and the mesh may be of devices that are not here.
"""

import dataclasses
from collections.abc import Callable, Mapping

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from okd_jax import models
from okd_jax.config.players import INT8, RandomModel
from okd_jax.config.schema import Settings
from okd_jax.data.batch import ROW, Batch
from okd_jax.errors import UserError
from okd_jax.methods.base import STUDENT
from okd_jax.methods.base.knobs import at_start
from okd_jax.models import Decoder, ModelConfig, adapters, int8
from okd_jax.models.formats.known import known
from okd_jax.run.cast import Cast, shapes
from okd_jax.run.job import Job
from okd_jax.run.outline import Outline, teacher_paths
from okd_jax.run.plan import Plan, make_models, make_plan
from okd_jax.run.step import compile_step
from okd_jax.runtime import sharding
from okd_jax.runtime.files import local
from okd_jax.teachers import saliency
from okd_jax.teachers.load import ONLY

TEACHER = ("replicate", "fsdp")  # how a frozen teacher's weights lie on the mesh


@dataclasses.dataclass(frozen=True)
class Ahead:
  """A run as far as its step's program depends on it.

  frozen, batch: what the step takes beside the state `plan.abstract`, as shapes.
  """

  job: Job
  cast: Cast
  plan: Plan
  frozen: dict[str, PyTree]
  batch: Batch

  @property
  def settings(self) -> Settings:
    return self.job.settings

  def compiled(self, mesh: Mesh, teacher: str) -> jax.stages.Compiled:
    """The program of the step for the devices of a mesh, here or not.

    teacher: one of TEACHER.

    Raises:
      jax.errors.JaxRuntimeError: from the compiler, where the step needs more memory
        than a device has.
    """
    step = compile_step(
      self.job.method,
      self.plan.models,
      self.plan.optimizers,
      self.settings.train.microbatches,
      self.plan.steps,
      self.plan.abstract,
      mesh,
    )
    frozen = jax.tree.map(
      lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
      self.frozen,
      sharding.shardings(self.frozen, mesh, teacher == "replicate"),
    )
    with jax.set_mesh(mesh):
      return step.lower(self.plan.abstract, frozen, self.batch).compile()


def ahead(job: Job, shape: Outline) -> Ahead:
  """The step of a run of these models.

  Raises:
    UserError: for an adapter that does not fit its teacher, or what no plan can know.
  """
  job = dataclasses.replace(job, settings=_counted(job.settings))
  _check(job)
  choice, share = None, job.settings.adapter.share
  if job.adapter_kind == adapters.Blocks.kind:
    [teacher] = shape.teachers.values()
    choice = saliency.choose(range(teacher.num_layers), share)
  cast = shapes(job, shape, choice)
  frozen = _frozen(job.settings, cast)
  # Whole, for any mesh: `compiled` says where each part lies.
  cast = dataclasses.replace(cast, frozen=frozen)
  plan = make_plan(job, cast, rows=1)
  return Ahead(job, cast, plan, frozen, _batch(job, cast, plan))


def outline(settings: Settings, vocab_size: int) -> Outline:
  """Shapes of the models that the settings name, without a tokenizer.

  vocab_size: of models of which nothing says it, those drawn at random.

  Raises:
    UserError: for a model whose config.json cannot be read.
  """
  teachers = {name: shape_of(path) for name, path in teacher_paths(settings).items()}
  if settings.teacher.model.wanted and not settings.teachers:
    teachers = {ONLY: _random(settings.teacher.model, vocab_size)}
  first, student = next(iter(teachers.values()), None), settings.student
  if student.path:
    shape = shape_of(student.path)
  elif student.from_teacher:
    shape = first.of_layers(student.taken(first.num_layers))
    shape = models.narrow_config(shape, student.width) if student.narrow else shape
  else:
    shape = _random(student.model, first.vocab_size if first else vocab_size)
  if settings.teacher.itself:
    teachers = {ONLY: shape}
  return Outline(None, shape, teachers)


def shape_of(path: str) -> ModelConfig:
  """A model's shape by its config.json alone: of a folder, a well-known one, the hub's.

  Raises:
    UserError: where there is none.
  """
  if not local(path).exists():
    if shape := known(path):
      return shape
    if models.is_hub_id(path):
      path = _config_folder(path)
  return models.load(path, params=False).config


def notes(job: Job) -> list[str]:
  """What a run of this job does that is not in a plan of its step."""
  plan, settings = job.method.sequences, job.settings
  found = []
  if plan.sampled:
    found.append("text sampled in training, and the memory of its cache")
  if plan.beforehand:
    found.append("answers to every prompt, written before training")
  if settings.adapter.every > 1 and job.method.adapts:
    found.append(f"adapter.every={settings.adapter.every}: steps that hold the modules")
  if settings.teacher.trunk:
    found.append("teacher.trunk: the teacher's lower layers are planned in the step")
  return [*found, "evaluation, checkpoints and export"]


def _config_folder(name: str) -> str:
  """The folder of a hub model's config.json, which alone is fetched."""
  try:
    file = huggingface_hub.hf_hub_download(name, "config.json")
  except Exception as error:  # its errors have no common base class
    reason = str(error).strip().split("\n")[0]
    raise UserError(
      f"{name} is no local folder, and its config.json cannot be fetched from the hub: "
      f"{reason}"
    ) from error
  return str(local(file).parent)


def _random(dimensions: RandomModel, vocab_size: int) -> ModelConfig:
  return models.preset(**dataclasses.asdict(dimensions), vocab_size=vocab_size)


def _counted(settings: Settings) -> Settings:
  """The settings with steps, which else the rows would tell."""
  train, least = settings.train, settings.optim.warmup_steps + 1
  train = dataclasses.replace(train, steps=train.steps or least)
  return dataclasses.replace(settings, train=train)


def _check(job: Job) -> None:
  """Raises a UserError for what a plan would have to read."""
  settings = job.settings
  if settings.teacher.cache:
    raise UserError(
      f"teacher.cache={settings.teacher.cache}: a plan reads no rows; plan the run "
      "with its teacher in place"
    )
  if settings.adapter.text:
    raise UserError(
      f"adapter.text={settings.adapter.text!r}: a plan reads no tokenizer; plan with "
      "adapter.length and without a text"
    )


def _frozen(settings: Settings, cast: Cast) -> dict[str, PyTree]:
  """Shapes of all that is frozen, in the formats that loading gives it."""
  found = {}
  if not settings.teacher.itself:
    dtype = settings.teacher_dtype
    for name, decoder in cast.teachers.items():
      found[name] = _stored(decoder, dtype, settings.quantizes, lambda tree: tree)
  adapter, dtype = cast.student.adapter, settings.student.dtype
  if adapter is not None:
    plain = cast.student.clone(adapter=None)
    quantize = dtype == INT8
    dtype = "float32" if quantize else dtype or "float32"
    found[STUDENT] = _stored(plain, dtype, quantize, adapter.held)
  return found


def _stored(
  decoder: Decoder, dtype: str, quantize: bool, held: Callable[[PyTree], PyTree]
) -> PyTree:
  """Shapes of what is held of a decoder's weights, in `dtype` or quantised."""

  def make() -> PyTree:
    tokens = jnp.zeros((1, 1), jnp.int32)
    tree = decoder.init(jax.random.key(0), tokens)["params"]
    tree = jax.tree.map(lambda x: x.astype(dtype), held(tree))
    return int8.quantized(tree) if quantize else tree

  return jax.eval_shape(make)


def _batch(job: Job, cast: Cast, plan: Plan) -> Batch:
  """Whole rows, and beside them what the method asks for, as shapes."""
  settings, text = job.settings, job.method.sequences
  size = settings.train.batch_size, settings.data.max_length
  kinds = dict.fromkeys(ROW, np.int32) | {"mask": np.bool_}
  rows = Batch.of({k: jax.ShapeDtypeStruct(size, v) for k, v in kinds.items()})
  batch = rows
  if text.prepare:
    key = jax.eval_shape(lambda: jax.random.key(0))
    now, apply = at_start(job.method.knobs), make_models(job, _traceable(cast))

    def prepare(params: PyTree, frozen: PyTree, batch: Batch, key: jax.Array) -> Batch:
      return text.prepare(apply, *apply.seen(params, frozen), batch, key, now)

    batch = jax.eval_shape(prepare, plan.abstract.params, cast.frozen, batch, key)
  beside = {"gold": rows} if text.gold else {}
  if text.own_tokens:
    beside["other_tokens"] = rows
  if text.beforehand and text.source != "teacher":
    beside["answers"] = dict.fromkeys(text.beforehand, rows)
  return batch.replace(**beside)


def _traceable(cast: Cast) -> Cast:
  """The cast with attention that needs no device's libraries to have a shape."""

  def plain(decoders: Mapping[str, Decoder]) -> dict[str, Decoder]:
    return {name: each.clone(attention="xla") for name, each in decoders.items()}

  student = cast.student.clone(attention="xla")
  teachers, adapted = plain(cast.teachers), plain(cast.adapted)
  return dataclasses.replace(cast, student=student, teachers=teachers, adapted=adapted)
