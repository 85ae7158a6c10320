"""From a configuration to all that a run is made of; nothing is trained here."""

import dataclasses
import functools
import itertools
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from okd_jax import methods, models
from okd_jax.data import (
  PAD_ID,
  Example,
  check_vocabulary,
  compare_tokenizers,
  eval_batches,
  load_records,
  make_tokenizer,
)
from okd_jax.data.sources import source_list
from okd_jax.errors import UserError
from okd_jax.methods import Method
from okd_jax.models import Decoder, ModelConfig, kernels
from okd_jax.models.adapters import AdapterConfig
from okd_jax.run import checks, optim
from okd_jax.run.data import Reading, make_packs, read_rows
from okd_jax.run.state import first_state, random_state
from okd_jax.run.step import TrainState
from okd_jax.runtime import sharding
from okd_jax.teachers import load as teachers
from okd_jax.teachers.saliency import Choice, block_saliency, choose, read
from okd_jax.teachers.store import Store

_log = logging.getLogger(__name__)

CHOICE = "blocks.json"  # of a workdir: which of the teacher's blocks learn
STAGE = "stage:"  # prefix of a path that means what an earlier stage exported


@dataclasses.dataclass(frozen=True)
class Run:
  """What one run needs, ready for its loop.

  decoders: by role, 'student' and, if there is a teacher, 'teacher', and 'adapted'
    where the method trains an online module; of several 'teacher:NAME' and so on.
  choice: which of the teacher's blocks learn, where adapter.kind is 'blocks'.
  frozen: the teacher's parameters, of several by name, or None.
  stored: what the teacher said about the rows, by part, 'train' and 'eval', in place
    of the teacher.
  init: makes the state of step 0; not called by a run that resumes.
  abstract: that state's shapes.
  packs: the texts of `train` that are one row, by their indices: one or several.
  reading: the teacher's own, where it does not share the run's tokenizer.
  """

  config: ConfigDict
  mesh: Mesh
  tokenizer: Any
  train: list[Example]
  packs: list[tuple[int, ...]]
  eval: list[Example]
  decoders: dict[str, Decoder]
  adapter: AdapterConfig | None
  choice: Choice | None
  frozen: Any
  stored: dict[str, Store] | None
  method: Method
  models: methods.Models
  optimizers: dict[str, Any]
  learning_rate: Callable[[int], float]
  steps: int
  init: Callable[[], TrainState]
  abstract: TrainState
  reading: Reading | None = None


def check(config: ConfigDict) -> Method:
  """The method that `config` names; a UserError if its settings make no sense."""
  method = methods.build(config.method.name, config.method, config.adapter.kind)
  checks.check_settings(config, method)
  return method


def build(config: ConfigDict, workdir: Path) -> Run:
  """Loads the models and the data that `config` names.

  Raises:
    UserError: for whatever is wrong with the configuration, a model or the data.
  """
  method = check(config)
  mesh = sharding.make_mesh(**config.mesh)
  sharding.check_batch(config.train.batch_size, config.train.microbatches, mesh)
  start = _load_start(config)
  records = load_records(source_list(config.data.train))
  put = functools.partial(sharding.put, mesh)
  teacher = teachers.load_teacher(config, put) if config.teacher.path else None
  if config.teacher.cache:
    checks.check_stored(config, method)
  several = teachers.load_several(config, put)
  apart = method.sequences.own_tokens
  own = {f"teachers.{name}": model for name, model in several.items()}
  own |= {"teacher": None if apart else teacher, "student": start}
  tokenizer = _tokenizer(config, workdir, own, records)
  if config.teacher.model.hidden_size and not (config.teacher.cache or several):
    teacher = _random_teacher(config, mesh, tokenizer)
  train, held_out, reading = read_rows(
    config, tokenizer, records, teacher if apart else None
  )
  checks.check_sequences(config, method, train)
  kin = None if apart else teacher  # whose vocabulary is the student's
  first = kin or next(iter(several.values()), None)
  student_config = _student_config(config, first, start, tokenizer)
  stored = None
  if config.teacher.cache:
    size = student_config.vocab_size
    stored = teachers.open_stored(config, train, held_out, size)
    teacher, kin = None, None
  checks.check_best(config, held_out, bool(kin or several or stored))
  if method.teacher == "several" and teacher:  # the only one
    several, teacher = {"only": teacher}, None
  decoders = _decoders(config, student_config, teacher, several)
  checks.check_lengths(config, decoders)
  _check_vocabularies(decoders, train + held_out, reading)
  adapter, choice = None, None
  if kind := _module_kind(config, method):
    if kind == "blocks":
      choice = read(workdir / CHOICE) or _choose(
        config, mesh, decoders["teacher"], teacher.params, held_out
      )
    adapter = adapter_config(config, kind, choice.blocks if choice else ())
    decoders |= _adapted(decoders, adapter, config.adapter.teachers)
  checks.check_attention(config, decoders)
  _log.info("attention: %s", _kernel(config, decoders["student"]))
  packs = make_packs(config, train)
  steps = _steps(config, len(packs))
  learning_rate = optim.schedule(
    config.optim.schedule,
    config.optim.lr,
    steps,
    config.optim.warmup_steps,
    config.optim.end_lr,
  )
  optimizers = _optimizers(config, learning_rate, adapter, method)
  prompt_ids = _prompt_ids(config, adapter, tokenizer)
  random = functools.partial(
    random_state, config, decoders, optimizers, prompt_ids, method
  )
  abstract = jax.eval_shape(random)
  return Run(
    config=config,
    mesh=mesh,
    tokenizer=tokenizer,
    train=train,
    packs=packs,
    eval=held_out,
    decoders=decoders,
    adapter=adapter,
    choice=choice,
    frozen=_frozen(teacher, several),
    stored=stored,
    method=method,
    models=_apply_functions(decoders, config, stored),
    optimizers=optimizers,
    learning_rate=learning_rate,
    steps=steps,
    init=lambda: first_state(
      config, mesh, first, random, abstract, prompt_ids, adapter
    ),
    abstract=abstract,
    reading=reading,
  )


def _random_teacher(config, mesh, tokenizer) -> models.Model:
  """A teacher that knows nothing: what trials and tests distil from."""
  shape = _random_config(config.teacher.model, len(tokenizer), tokenizer)
  # Its own key: a student of the same shape must not be born as its twin.
  key = jax.random.fold_in(jax.random.key(config.train.seed), 1)
  init = functools.partial(models.init, shape)
  where = sharding.shardings(jax.eval_shape(init, key), mesh)
  return models.Model(shape, jax.jit(init, out_shardings=where)(key), tokenizer)


def _load_start(config) -> models.Model | None:
  """Configuration and tokenizer of student.path; its weights are read by `init`."""
  return models.load(config.student.path, params=False) if config.student.path else None


def _frozen(teacher, several):
  if several:
    return {name: model.params for name, model in several.items()}
  return teacher.params if teacher else None


def _tokenizer(config, workdir: Path, loaded, records):
  """The one tokenizer of the run, on which all models must agree."""
  spec = config.data.tokenizer
  own = {
    name: model.tokenizer
    for name, model in loaded.items()
    if model is not None and model.tokenizer is not None
  }
  for one, other in itertools.pairwise(own.values()):
    compare_tokenizers(one, other)
  if not spec:
    if not own:
      raise UserError(
        "neither teacher nor student brings a tokenizer; set data.tokenizer to a "
        "model, to 'bytes' or to 'bpe:N'"
      )
    return next(iter(own.values()))
  made = workdir / "tokenizer"
  if made.exists():  # trained by the run that is resumed here
    return models.load_tokenizer(made)
  if spec == "bytes" or spec.startswith("bpe:"):
    tokenizer = make_tokenizer(spec, records)
  else:
    tokenizer = models.load_tokenizer(spec)
  for name in own:
    compare_tokenizers(own[name], tokenizer)
  return tokenizer


def _check_vocabularies(decoders, examples, reading: Reading | None) -> None:
  configs = {role: d.config.vocab_size for role, d in decoders.items()}
  if reading:
    own = {"teacher": configs.pop("teacher")}
    check_vocabulary(own, reading.train + reading.eval)
  check_vocabulary(configs, examples)


def _student_config(config, teacher, start, tokenizer) -> ModelConfig:
  if start is not None:
    return start.config
  if config.student.layers:
    total = teacher.config.num_layers
    if config.student.layers > total:
      raise UserError(
        f"student.layers={config.student.layers}, but the teacher has {total} layers"
      )
    return dataclasses.replace(teacher.config, num_layers=config.student.layers)
  vocab_size = teacher.config.vocab_size if teacher else len(tokenizer)
  return _random_config(config.student.model, vocab_size, tokenizer)


def _random_config(dimensions, vocab_size: int, tokenizer) -> ModelConfig:
  return models.preset(
    **dimensions,
    vocab_size=vocab_size,
    bos_id=tokenizer.bos_token_id,
    eos_ids=(tokenizer.eos_token_id,),
    pad_id=tokenizer.pad_token_id,
  )


def _choose(config, mesh, decoder, params, held_out) -> Choice:
  batches = eval_batches(
    held_out,
    batch_size=sharding.whole_rows(config.eval.batch_size, mesh),
    length=config.data.max_length,
    pad_id=PAD_ID,
  )
  with jax.set_mesh(mesh):
    saliency = block_saliency(decoder, params, batches, mesh, config.train.loss_chunk)
  return choose(saliency, config.adapter.share)


def adapter_config(config, kind: str, blocks: tuple[int, ...] = ()) -> AdapterConfig:
  """What `config.adapter` says, of this kind; a UserError if it makes no sense."""
  own = {field.name for field in dataclasses.fields(AdapterConfig)}
  fields = {key: config.adapter[key] for key in config.adapter if key in own}
  return AdapterConfig(**fields | {"kind": kind, "blocks": blocks})


def _prompt_ids(config, adapter, tokenizer) -> np.ndarray | None:
  """The tokens [m] whose embeddings a prompt starts from, None if there is no text.

  A text of another length is repeated or cut, as PEFT does.
  """
  text = config.adapter.text
  if not (adapter and text):
    return None
  if adapter.kind != "prompt":
    raise UserError(
      f"adapter.text={text!r} starts a prompt, but the teacher's module is "
      f"{adapter.kind!r}; set adapter.kind=prompt or leave adapter.text empty"
    )
  ids = tokenizer.encode(text, add_special_tokens=False)
  if not ids:
    raise UserError(f"adapter.text={text!r} has no token")
  return np.resize(np.array(ids, np.int32), adapter.length)


def _module_kind(config, method: Method) -> str:
  """The kind of online module, '' where no teacher adapts."""
  if method.teacher == "adapted":
    return config.adapter.kind or method.module
  return config.adapter.kind if method.teacher == "several" else ""


def _adapted(decoders, adapter: AdapterConfig, names) -> dict[str, Decoder]:
  """{'adapted' or 'adapted:NAME': decoder} of the teachers that carry a module."""
  adapted = {}
  for role, decoder in decoders.items():
    kind, colon, name = role.partition(":")
    if kind == "teacher" and (not names or name in names):
      adapter.check(decoder.config.num_layers, decoder.config.gated_mlp)
      adapted[f"adapted{colon}{name}"] = decoder.clone(adapter=adapter)
  return adapted


def _decoders(config, student_config, teacher, several) -> dict[str, Decoder]:
  common = dict(
    dtype=jnp.dtype(config.train.dtype),
    remat=config.train.remat,
    attention=config.train.attention,
  )
  decoders = {"student": Decoder(student_config, **common)}
  if teacher:
    decoders["teacher"] = Decoder(teacher.config, **common)
  for name, model in several.items():
    decoders[f"teacher:{name}"] = Decoder(model.config, **common)
  return decoders


def _kernel(config, decoder: Decoder) -> str:
  """What computes attention in training rows that no learned prefix comes before."""
  length, size = config.data.max_length, decoder.config.head_dim
  return kernels.choose(config.train.attention, decoder.dtype, size, length, length)


def _apply_functions(decoders, config, stored) -> methods.Models:
  """The apply functions a method calls; dropout is the training student's alone."""
  student = decoders["student"].clone(dropout=config.train.dropout)
  return methods.apply_functions(
    decoders | {"student": student},
    config.train.loss_chunk,
    stored["train"].about["vocab_size"] if stored else None,
  )


def _steps(config, rows: int) -> int:
  if config.train.steps:
    return config.train.steps
  return max(1, math.ceil(config.train.epochs * rows / config.train.batch_size))


def _optimizers(config, learning_rate, adapter, method) -> dict[str, Any]:
  keys = ("b1", "b2", "eps", "weight_decay", "clip", "dtype")
  options = {key: config.optim[key] for key in keys}
  optimizers = {"student": optim.build(learning_rate, **options)}
  if adapter:
    scale = config.adapter.lr_scale
    optimizers["adapter"] = optim.build(learning_rate, lr_scale=scale, **options)
  trees = {name: optax.adam(rate) for name, (_, rate) in method.trees.items()}
  return optimizers | trees
