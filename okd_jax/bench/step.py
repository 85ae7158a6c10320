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
from okd_jax.config.read import defaults
from okd_jax.data.batch import Batch
from okd_jax.errors import UserError
from okd_jax.methods.base import STUDENT, TokenWeight
from okd_jax.methods.base.knobs import at_start
from okd_jax.models import Decoder, ModelConfig, adapters, int8
from okd_jax.run import checks
from okd_jax.run.cast import Cast, shapes
from okd_jax.run.job import Job, check
from okd_jax.run.outline import Outline
from okd_jax.run.plan import Plan, make_plan
from okd_jax.run.state import TrainState, first_state
from okd_jax.run.step import compile_step
from okd_jax.run.student import with_held
from okd_jax.runtime import sharding
from okd_jax.teachers import saliency
from okd_jax.teachers.load import ONLY

HEAD = 64  # channels of an attention head
_STEPS = 100  # of the run that the step would be one of


class Trial(NamedTuple):
  """A compiled step and all that it takes; `state` is donated by each call.

  held: the step in which adapters are held, None if they learn in each.
  every: the adapters learn once in so many steps.
  """

  program: jax.stages.Compiled
  held: jax.stages.Compiled | None
  every: int
  state: TrainState
  frozen: dict[str, PyTree]
  batch: Batch
  compile_s: float
  operations: dict[str, float]


def run(flags: argparse.Namespace) -> tuple[dict[str, Any], dict[str, str]]:
  """Seconds of a step, waited for, beside its floor: operations by matmul rate.

  With --beside, in turns with the step of another method on the same models.
  """
  trial, config = build(flags), flags.config
  other = build(_beside(flags)) if flags.beside else None
  rates = [measure.matmul_rate(config.train.dtype)]
  memory, sizes = measure.memory(trial.program), _sizes(trial)
  times, *theirs = _in_turns([t for t in (trial, other) if t], flags)
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
    "memory_bytes": sizes | {k: v for k, v in memory.items() if k == "temporaries"},
  }
  if other:
    results["beside"] = _ratios(trial, other, times, *theirs)
  return results, _rows(flags, results)


def _in_turns(trials: list[Trial], flags: argparse.Namespace) -> list[list[float]]:
  """Seconds of each trial's steps, one after the other in each round."""
  rounds = []
  for _ in range(flags.warmup + flags.repeats):
    rounds.append([])
    for i, each in enumerate(trials):
      trials[i], seconds = _timed(each)
      rounds[-1].append(seconds)
  return [list(times) for times in zip(*rounds[flags.warmup :], strict=True)]


def _timed(trial: Trial) -> tuple[Trial, float]:
  """(the trial with its next state, seconds of a step, the mean where they differ)."""
  programs = [(trial.program, 1)]
  if trial.held:
    programs.append((trial.held, trial.every - 1))
  state, seconds = trial.state, 0.0
  for program, count in programs:
    start = time.perf_counter()
    state, _ = program(state, trial.frozen, trial.batch)
    jax.block_until_ready(state)
    seconds += count * (time.perf_counter() - start)
  return trial._replace(state=state), seconds / trial.every


def _beside(flags: argparse.Namespace) -> argparse.Namespace:
  """The flags with the other method, its knobs and adapters at their defaults."""
  config, plain = flags.config.copy_and_resolve_references(), defaults()
  for section in ("method", "adapter"):
    config[section] = plain[section]
  changes = {"method": flags.beside, "config": config}
  return argparse.Namespace(**vars(flags) | changes)


def _sizes(trial: Trial) -> dict[str, int]:
  """Bytes of what lies in memory from step to step."""
  params = trial.state.params
  teachers, held = dict(trial.frozen), {}
  if STUDENT in teachers:
    held = {"frozen student": teachers.pop(STUDENT)}
  trees = {"teacher": teachers} | held | {"student": params[STUDENT]}
  trees |= {"module": params.get("adapter", {}), "optimizers": trial.state.opt_state}
  return {name: measure.nbytes(tree) for name, tree in trees.items() if tree}


def _ratios(
  trial: Trial, other: Trial, times: list[float], theirs: list[float]
) -> dict[str, Any]:
  """This step over the other one: seconds in pairs, arithmetic, and memory."""

  def memory(each: Trial) -> int:
    temporaries = measure.memory(each.program).get("temporaries", 0)
    return temporaries + sum(_sizes(each).values())

  pairs = [a / b for a, b in zip(times, theirs, strict=True)]
  work = [sum(each.operations.values()) for each in (trial, other)]
  return {
    "time": measure.spread(pairs),
    "operations": work[0] / work[1],
    "memory": memory(trial) / memory(other),
  }


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
  sharding.check_batch(train.batch_size, train.microbatches, mesh, job.one_row_in)
  cast = with_held(job.settings, _cast(job, student, teacher, mesh), mesh)
  length = job.settings.data.max_length
  checks.check_attention(train.attention, length, cast.decoders)
  plan = make_plan(job, cast, rows=1)
  state = first_state(job.settings, cast, plan.random, plan.abstract, mesh)
  batch = sharding.put_batch(_batch(flags, train.batch_size, length), mesh)
  if text.prepare:  # once, and not timed
    key, now = jax.random.key(2), at_start(job.method.knobs)
    seen = plan.models.seen(state.params, cast.frozen)
    batch = text.prepare(plan.models, *seen, batch, key, now)
  begun, takes = time.perf_counter(), (state, cast.frozen, batch)
  program = _compiled(job, plan, mesh, *takes)
  elapsed, every = time.perf_counter() - begun, job.settings.adapter.every
  held = _compiled(job, plan, mesh, *takes, learns=False) if every > 1 else None
  return Trial(
    program, held, every, *takes, elapsed, operations(job, cast, state, length)
  )


def _compiled(
  job: Job, plan: Plan, mesh: Mesh, *takes: PyTree, learns: bool = True
) -> jax.stages.Compiled:
  step = compile_step(
    job.method,
    plan.models,
    plan.optimizers,
    job.settings.train.microbatches,
    plan.steps,
    plan.abstract,
    mesh,
    learns,
  )
  with jax.set_mesh(mesh):
    return step.lower(*takes).compile()


def _config(flags: argparse.Namespace) -> ConfigDict:
  """The configuration with the models and the method that the flags name."""
  config = flags.config.copy_and_resolve_references()
  config.method.name = flags.method
  for name in ("teacher", "student"):
    section, (layers, hidden) = config[name], getattr(flags, name)
    section.path = ""
    section.model.update({"hidden_size": hidden, "num_layers": layers})
  config.student.update({"layers": 0, "which_layers": "even", "width": 1.0})
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
    tree = int8.quantized(tree) if job.settings.quantizes else tree
    frozen[name] = jax.device_put(tree, sharding.shardings(tree, mesh))
  return dataclasses.replace(cast, frozen=frozen)


def operations(
  job: Job, cast: Cast, state: TrainState, length: int
) -> dict[str, float]:
  """{part: operations} of a step (`flops.step`) of this cast; shapes will do.

  length: tokens that each of a row's sees; half of the row's, if those after it cost
    nothing.
  """
  settings, layers, teacher = job.settings, 0, None
  for decoder in cast.teachers.values():
    teacher = decoder.config
  if cast.adapter:
    layers = teacher.num_layers - cast.adapter.trunk_layers(teacher.num_layers)
  adapters = state.params.get("adapter", {})
  weight = settings.method.knobs.get("token_weight") or ""
  return flops.step(
    cast.student.config,
    teacher,
    settings.train.batch_size * settings.data.max_length,
    length,
    in_part=_in_part(cast.student, state),
    adapted_layers=layers,
    module_size=sum(leaf.size for leaf in jax.tree.leaves(adapters)),
    taught=1 / job.one_row_in / settings.adapter.every,
    token_weight=TokenWeight.read("method.token_weight", weight),
    module_tokens=settings.adapter.module_tokens,
  )


def _in_part(student: Decoder, state: TrainState) -> flops.InPart | None:
  """What is trained of the student, None if it is all."""
  config, adapter = student.config, student.adapter
  if adapter is None:
    return None
  if not isinstance(adapter, adapters.Part):
    layers = config.num_layers - adapter.trunk_layers(config.num_layers)
    size = sum(leaf.size for leaf in jax.tree.leaves(state.params[STUDENT]))
    return flops.InPart(layers, 0, size, head=False)
  lowest, kernels, total = config.num_layers, 0, config.num_layers
  for path, shape in models.parameter_shapes(config).items():
    of_layers = path.startswith("layers/")
    rows = adapter.moves(path, total if of_layers else 1)
    if of_layers and path.endswith("/kernel"):
      used = config.experts_per_token / config.experts if "/experts_" in path else 1
      kernels += int(rows.sum() * shape.size * used) // total
    if rows.any() and path.split("/")[0] not in ("head", "norm", "narrow"):
      lowest = min(lowest, int(np.argmax(rows)) if of_layers else 0)
  head = "embed/embedding" if config.tie_embeddings else "head"
  return flops.InPart(total - lowest, kernels, 0, bool(adapter.moves(head, 1)))


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
  rows = {
    "method": f"{flags.method}, {flags.family} {shapes}, vocabulary "
    f"{flags.vocab_size}, {config.train.dtype}{_dtypes(flags)}",
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
  if beside := results.get("beside"):
    ratio = beside["time"]
    rows[f"over {flags.beside}"] = (
      f"{ratio['median']:.2f} of its time ({ratio['min']:.2f} to {ratio['max']:.2f}; "
      f"by arithmetic {beside['operations']:.2f}), {beside['memory']:.2f} of its memory"
    )
  return rows


def _dtypes(flags: argparse.Namespace) -> str:
  """Number formats of what is frozen, and what is trained of the student, if told."""
  config = flags.config
  kind, frozen = config.student.adapter.kind, config.student.frozen
  told = {
    "teacher": config.teacher.dtype,
    "frozen student": config.student.dtype,
    "trained of the student": kind or (frozen and f"all but {frozen!r}"),
  }
  return "".join(f", {name} {value}" for name, value in told.items() if value)


def shape_of(text: str) -> tuple[int, int]:
  """An argparse type: layers x channels, as 8x512."""
  if not (found := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)):
    raise argparse.ArgumentTypeError(f"{text!r} is no LAYERSxCHANNELS, such as 8x512")
  return int(found[1]), int(found[2])


def add_flags(parser: argparse.ArgumentParser) -> None:
  """The flags of `bench step`, beside those of the configuration."""
  add = parser.add_argument
  model_flags(parser)
  add("--teacher", type=shape_of, default="8x512", help="LAYERSxCHANNELS")
  add("--student", type=shape_of, default="4x256", help="LAYERSxCHANNELS")
  add("--repeats", type=at_least(1), default=5, help="measured steps")
  add("--warmup", type=at_least(0), default=1, help="steps before these")
  beside = "another method, at its defaults: steps in turns, and the ratio to its own"
  add("--beside", default="", metavar="METHOD", help=beside)


def model_flags(parser: argparse.ArgumentParser) -> None:
  """What any benchmark of a step's program wants to know beside the configuration."""
  add = parser.add_argument
  add("--method", default="okd", help="any that trains on given rows")
  add("--family", default="gpt2", help="of docs/models.md: gpt2, llama, qwen3, …")
  add("--vocab_size", type=at_least(1), default=50257, help="tokens of both models")
