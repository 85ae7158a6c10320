"""`bench step`: one training step of random models, beside what it must compute."""

import argparse
import dataclasses
import re
import statistics
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree
from ml_collections import ConfigDict

from okd_jax import models
from okd_jax.bench import flops, measure
from okd_jax.bench.measure import at_least
from okd_jax.data.batch import Batch
from okd_jax.errors import UserError
from okd_jax.methods.base.knobs import at_start
from okd_jax.models import ModelConfig, adapters
from okd_jax.run import checks
from okd_jax.run.cast import Cast, shapes
from okd_jax.run.job import Job, check
from okd_jax.run.outline import Outline
from okd_jax.run.plan import make_plan
from okd_jax.run.state import TrainState, first_state
from okd_jax.run.step import compile_step
from okd_jax.runtime import sharding
from okd_jax.teachers import saliency
from okd_jax.teachers.load import ONLY

HEAD = 64  # channels of an attention head
_STEPS = 100  # of the run that the step would be one of


class Trial(NamedTuple):
  """A compiled step and all that it takes; `state` is donated by each call."""

  program: jax.stages.Compiled
  state: TrainState
  frozen: dict[str, PyTree]
  batch: Batch
  compile_s: float
  operations: dict[str, float]


def run(flags: argparse.Namespace) -> tuple[dict[str, Any], dict[str, str]]:
  """Seconds of a step, waited for, beside its floor: operations by matmul rate."""
  trial, config = build(flags), flags.config
  rates = [measure.matmul_rate(config.train.dtype)]
  memory = measure.memory(trial.program)
  state, frozen, batch = trial.state, trial.frozen, trial.batch
  sizes = {"teacher": frozen, "student": state.params["student"]}
  sizes |= {"module": state.params.get("adapter", {}), "optimizers": state.opt_state}
  parts = {name: measure.nbytes(tree) for name, tree in sizes.items() if tree}
  times = []
  for i in range(flags.warmup + flags.repeats):
    start = time.perf_counter()
    state, _ = trial.program(state, frozen, batch)
    jax.block_until_ready(state)
    if i >= flags.warmup:
      times.append(time.perf_counter() - start)
  rates.append(measure.matmul_rate(config.train.dtype))
  total, rate = sum(trial.operations.values()), max(rates)
  tokens = config.train.batch_size * config.data.max_length
  ms = measure.spread([1e3 * t for t in times])
  results = {
    "settings": measure.settings(flags),
    "ms": ms,
    "tokens_per_s": tokens / statistics.median(times),
    "operations": trial.operations,
    "matmul_rate": rate,
    "floor_ms": 1e3 * total / rate,
    "to_floor": ms["median"] * rate / total / 1e3,
    "compile_s": trial.compile_s,
    "memory_bytes": parts | {k: v for k, v in memory.items() if k == "temporaries"},
  }
  return results, _rows(flags, results)


def build(flags: argparse.Namespace) -> Trial:
  """The step of a run of random models, and a batch of whole rows of random tokens.

  Raises:
    UserError: for shapes that make no model, rows that devices and microbatches cannot
      share, or a method that must sample its text.
  """
  student, teacher = (_model(flags, getattr(flags, n)) for n in ("student", "teacher"))
  job = check(_config(flags))
  text, train = job.method.sequences, job.settings.train
  if text.sampled or text.beforehand or job.method.several:
    raise UserError(f"--method={flags.method} is more than a step on given rows")
  mesh = sharding.make_mesh()
  sharding.check_batch(train.batch_size, train.microbatches, mesh)
  cast = _cast(job, student, teacher, mesh)
  length = job.settings.data.max_length
  checks.check_attention(train.attention, length, cast.decoders)
  plan = make_plan(job, cast, rows=1)
  start = job.settings.student
  state = first_state(start, cast, plan.random, plan.abstract, mesh)
  batch = sharding.put_batch(_batch(flags, train.batch_size, length), mesh)
  if text.prepare:  # once, and not timed
    key, now = jax.random.key(2), at_start(job.method.knobs)
    batch = text.prepare(plan.models, state.params, cast.frozen, batch, key, now)
  begun = time.perf_counter()
  step = compile_step(
    job.method,
    plan.models,
    plan.optimizers,
    train.microbatches,
    plan.steps,
    plan.abstract,
    mesh,
  )
  with jax.set_mesh(mesh):
    program = step.lower(state, cast.frozen, batch).compile()
  elapsed = time.perf_counter() - begun
  return Trial(
    program, state, cast.frozen, batch, elapsed, _operations(job, cast, state)
  )


def _config(flags: argparse.Namespace) -> ConfigDict:
  """The configuration with the models and the method that the flags name."""
  config = flags.config.copy_and_resolve_references()
  config.method.name = flags.method
  for name in ("teacher", "student"):
    section, (layers, hidden) = config[name], getattr(flags, name)
    section.path = ""
    section.model.update({"hidden_size": hidden, "num_layers": layers})
  config.student.layers = 0
  config.train.steps = config.train.steps or _STEPS + config.optim.warmup_steps
  return config


def _cast(job: Job, student: ModelConfig, teacher: ModelConfig, mesh: Mesh) -> Cast:
  """Random models; where blocks of the teacher learn, the lowest ones."""
  teachers = {ONLY: teacher} if job.method.taught else {}
  share, total = job.settings.adapter.share, teacher.num_layers
  blocks = job.adapter_kind == adapters.Blocks.kind
  choice = saliency.choose(range(total), share) if blocks else None
  cast = shapes(job, Outline(None, student, teachers), choice)
  dtype, frozen = jnp.dtype(job.settings.teacher_dtype), {}
  for name, decoder in cast.teachers.items():
    tokens = jnp.zeros((1, 1), jnp.int32)
    tree = jax.jit(decoder.init)(jax.random.key(1), tokens)["params"]
    tree = jax.tree.map(lambda x: x.astype(dtype), tree)
    frozen[name] = jax.device_put(tree, sharding.shardings(tree, mesh))
  return dataclasses.replace(cast, frozen=frozen)


def _operations(job: Job, cast: Cast, state: TrainState) -> dict[str, float]:
  settings, layers, teacher = job.settings, 0, None
  for decoder in cast.teachers.values():
    teacher = decoder.config
  if cast.adapter:
    layers = teacher.num_layers - cast.adapter.trunk_layers(teacher.num_layers)
  adapters = state.params.get("adapter", {})
  return flops.step(
    cast.student.config,
    teacher,
    settings.train.batch_size * settings.data.max_length,
    settings.data.max_length,
    adapted_layers=layers,
    module_size=sum(leaf.size for leaf in jax.tree.leaves(adapters)),
  )


def _batch(flags: argparse.Namespace, rows: int, length: int) -> Batch:
  shape = (rows, length + 1)
  ids = np.random.default_rng(0).integers(0, flags.vocab_size, shape, dtype=np.int32)
  return Batch(
    tokens=ids[:, :-1],
    labels=ids[:, 1:],
    mask=np.ones((rows, length), bool),
    segment_ids=np.ones((rows, length), np.int32),
  )


def _model(flags: argparse.Namespace, shape: tuple[int, int]) -> ModelConfig:
  layers, hidden = shape
  return models.preset(
    flags.family,
    vocab_size=flags.vocab_size,
    hidden_size=hidden,
    num_layers=layers,
    num_heads=max(hidden // HEAD, 1),
    max_length=max(flags.config.data.max_length, 1024),
  )


def _rows(flags: argparse.Namespace, results: dict[str, Any]) -> dict[str, str]:
  ms, memory, config = results["ms"], results["memory_bytes"], flags.config
  parts = ", ".join(f"{k} {v / 1e9:.1f}" for k, v in results["operations"].items())
  total = sum(results["operations"].values())
  shapes = " to ".join("x".join(map(str, s)) for s in (flags.teacher, flags.student))
  return {
    "method": f"{flags.method}, {flags.family} {shapes}, vocabulary "
    f"{flags.vocab_size}, {config.train.dtype}",
    "shape": f"{config.train.batch_size} rows of {config.data.max_length} tokens",
    "step": f"{ms['median']:.0f} ms (median of {flags.repeats}; {ms['min']:.0f} to "
    f"{ms['max']:.0f})",
    "tokens/s": f"{results['tokens_per_s']:.0f}",
    "GFLOP": f"{total / 1e9:.1f}: {parts}",
    "floor": f"{results['floor_ms']:.0f} ms at {results['matmul_rate'] / 1e9:.0f} "
    f"GFLOP/s; the step takes {results['to_floor']:.2f} times that",
    "compile": f"{results['compile_s']:.1f} s",
    "memory": measure.mebibytes(memory),
  }


def shape_of(text: str) -> tuple[int, int]:
  """An argparse type: layers x channels, as 8x512."""
  if not (found := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)):
    raise argparse.ArgumentTypeError(f"{text!r} is no LAYERSxCHANNELS, such as 8x512")
  return int(found[1]), int(found[2])


def add_flags(parser: argparse.ArgumentParser) -> None:
  add = parser.add_argument
  model_flags(parser)
  add("--teacher", type=shape_of, default="8x512", help="LAYERSxCHANNELS")
  add("--student", type=shape_of, default="4x256", help="LAYERSxCHANNELS")
  add("--repeats", type=at_least(1), default=5, help="measured steps")
  add("--warmup", type=at_least(0), default=1, help="steps before these")


def model_flags(parser: argparse.ArgumentParser) -> None:
  """What any benchmark of a step's program wants to know beside the configuration."""
  add = parser.add_argument
  add("--method", default="okd", help="any that trains on given rows")
  add("--family", default="gpt2", help="gpt2, llama or mistral")
  add("--vocab_size", type=at_least(1), default=50257, help="tokens of both models")
