"""`bench step`: one training step of random models, beside what it must compute."""

import argparse
import re
import statistics
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from okd_jax import methods, models
from okd_jax.bench import flops, measure
from okd_jax.bench.measure import at_least
from okd_jax.errors import UserError
from okd_jax.models import Decoder, ModelConfig
from okd_jax.run import build as setup
from okd_jax.run import checks, optim
from okd_jax.run.step import TrainState, compile_step, init_state
from okd_jax.runtime import sharding

HEAD = 64  # channels of an attention head


class Trial(NamedTuple):
  """A compiled step and all that it takes; `state` is donated by each call."""

  program: Any
  state: TrainState
  frozen: Any
  batch: dict[str, jax.Array]
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
  """Random models, a method and a batch of whole rows of random tokens.

  Raises:
    UserError: for shapes that make no model, rows that devices and microbatches cannot
      share, or a method that must sample its text.
  """
  student, teacher = (_model(flags, getattr(flags, n)) for n in ("student", "teacher"))
  config = flags.config
  method = methods.build(flags.method, config.method)
  plan = method.sequences
  if plan.sampled or plan.beforehand or plan.prepare or method.teacher == "several":
    raise UserError(f"--method={flags.method} is more than a step on given rows")
  mesh, parts = sharding.make_mesh(), config.train.microbatches
  sharding.check_batch(config.train.batch_size, parts, mesh)
  decoders = _decoders(flags, method, student, teacher)
  checks.check_attention(config, decoders)
  state, frozen, optimizers = _state(decoders, config.optim.dtype)
  apply = methods.apply_functions(decoders, config.train.loss_chunk)
  batch = sharding.put_batch(_batch(flags), mesh)
  frozen = jax.device_put(frozen, sharding.shardings(frozen, mesh))
  start = time.perf_counter()
  step = compile_step(method, apply, optimizers, parts, 100, state, mesh)
  with jax.set_mesh(mesh):
    program = step.lower(state, frozen, batch).compile()
  elapsed = time.perf_counter() - start
  adapted = decoders.get("adapted")
  layers = adapted.adapter.num_layers(teacher.num_layers) if adapted else 0
  size = sum(leaf.size for leaf in jax.tree.leaves(state.params.get("adapter", {})))
  operations = flops.step(
    student,
    None if method.teacher == "none" else teacher,
    config.train.batch_size * config.data.max_length,
    config.data.max_length,
    adapted_layers=layers,
    module_size=size,
  )
  return Trial(program, state, frozen, batch, elapsed, operations)


def _decoders(flags, method, student: ModelConfig, teacher: ModelConfig):
  config = flags.config
  common = dict(
    dtype=jnp.dtype(config.train.dtype),
    remat=config.train.remat,
    attention=config.train.attention,
  )
  decoders = {"student": Decoder(student, **common)}
  if method.teacher != "none":
    decoders["teacher"] = Decoder(teacher, **common)
  if method.teacher == "adapted":
    adapter = setup.adapter_config(config, config.adapter.kind or method.module)
    adapter.check(teacher.num_layers, teacher.gated_mlp)
    decoders["adapted"] = Decoder(teacher, adapter, **common)
  return decoders


def _state(decoders, moments: str) -> tuple[TrainState, Any, dict]:
  keys = iter(jax.random.split(jax.random.key(0), 3))
  tokens = jnp.zeros((1, 1), jnp.int32)
  dtype = decoders["student"].dtype
  params = {"student": jax.jit(decoders["student"].init)(next(keys), tokens)["params"]}
  frozen = None
  if "teacher" in decoders:
    frozen = jax.jit(decoders["teacher"].init)(next(keys), tokens)["params"]
    frozen = jax.tree.map(lambda x: x.astype(dtype), frozen)
  if "adapted" in decoders:
    params["adapter"] = jax.jit(decoders["adapted"].init)(next(keys), tokens)["adapter"]
  rate = optim.schedule("constant", 1e-4, 100, 0, 0.0)
  options = dict(b1=0.9, b2=0.999, eps=1e-8, weight_decay=1e-2, clip=1.0)
  options["dtype"] = moments
  optimizers = {name: optim.build(rate, **options) for name in params}
  return init_state(params, optimizers, jax.random.key(1)), frozen, optimizers


def _batch(flags) -> dict[str, np.ndarray]:
  rows, length = flags.config.train.batch_size, flags.config.data.max_length
  shape = (rows, length + 1)
  ids = np.random.default_rng(0).integers(0, flags.vocab_size, shape, dtype=np.int32)
  return {
    "tokens": ids[:, :-1],
    "labels": ids[:, 1:],
    "mask": np.ones((rows, length), bool),
    "segment_ids": np.ones((rows, length), np.int32),
  }


def _model(flags, shape: tuple[int, int]) -> ModelConfig:
  layers, hidden = shape
  return models.preset(
    flags.family,
    vocab_size=flags.vocab_size,
    hidden_size=hidden,
    num_layers=layers,
    num_heads=max(hidden // HEAD, 1),
    max_length=max(flags.config.data.max_length, 1024),
  )


def _rows(flags, results) -> dict[str, str]:
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
