"""`bench loss`: loss and gradients in chunks, beside all logits at once."""

import argparse
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from okd_jax import losses, methods
from okd_jax.bench import measure
from okd_jax.bench.measure import at_least
from okd_jax.data.batch import Batch
from okd_jax.losses import Output
from okd_jax.methods import Method, Models, Teacher
from okd_jax.methods.base.knobs import knobs_at
from okd_jax.teachers.load import ONLY

METHODS = ("kd", "okd")

Outputs = dict[str, Output]
Loss = Callable[[Outputs], Float[Array, ""]]


def run(flags: argparse.Namespace) -> tuple[dict[str, Any], dict[str, str]]:
  """Both programs in turn, and what the compiler says of their temporaries.

  The dense one is the formula as one would write it, with no diagnostics beside.
  """
  outputs, labels = _inputs(flags)
  programs = {
    name: jax.jit(jax.grad(make(flags, labels))).lower(outputs).compile()
    for name, make in (("chunked", _chunked), ("dense", _dense))
  }
  rate = measure.matmul_rate(flags.config.train.dtype)
  times = {name: [] for name in programs}
  for i in range(flags.warmup + flags.repeats):
    for name, program in programs.items():
      took = measure.seconds(lambda program=program: program(outputs))
      if i >= flags.warmup:
        times[name].append(1e3 * took)
  rate = max(rate, measure.matmul_rate(flags.config.train.dtype))
  tokens = labels.size
  teacher_products = 2 if _method(flags).adapts else 1  # forwards, and to the hidden
  sizes = 3 * flags.student_size + teacher_products * flags.teacher_size
  operations = 2 * tokens * flags.vocab_size * sizes
  temporaries = {
    name: measure.memory(program).get("temporaries", 0)
    for name, program in programs.items()
  }
  ms = {name: measure.spread(values) for name, values in times.items()}
  pairs = zip(times["chunked"], times["dense"], strict=True)
  results = {
    "settings": measure.settings(flags),
    "ms": ms,
    "to_dense": measure.spread([a / b for a, b in pairs])["median"],
    "operations": operations,
    "floor_ms": 1e3 * operations / rate,
    "matmul_rate": rate,
    "temporary_bytes": temporaries,
  }
  return results, _rows(flags, results)


def _inputs(flags: argparse.Namespace) -> tuple[Outputs, Int[Array, "B L"]]:
  """({model: Output}, labels), random."""
  keys = jax.random.split(jax.random.key(0), 5)
  rows = (flags.config.train.batch_size, flags.config.data.max_length)
  dtype = jnp.dtype(flags.config.train.dtype)

  def draw(key: Key[Array, ""], size: int) -> Output:
    hidden, head = jax.random.split(key)
    return Output(
      jax.random.normal(hidden, (*rows, size)).astype(dtype),
      (0.05 * jax.random.normal(head, (flags.vocab_size, size))).astype(dtype),
    )

  outputs = {
    "student": draw(keys[0], flags.student_size),
    "teacher": draw(keys[1], flags.teacher_size),
  }
  return outputs, jax.random.randint(keys[2], rows, 0, flags.vocab_size)


def _chunked(flags: argparse.Namespace, labels: Int[Array, "B L"]) -> Loss:
  """The method's own loss, of the hidden states and the student's head."""
  method = _method(flags)

  def student(params: Output, batch: Batch, key: None, mix: None = None) -> Output:
    return params

  def teacher(
    frozen: Output, adapter: Output | None, batch: Batch, mix: None = None
  ) -> Output:
    return frozen if adapter is None else adapter

  def both(frozen: Output, adapter: Output, batch: Batch) -> tuple[Output, Output]:
    return adapter, frozen

  teachers = {ONLY: Teacher(teacher, both)}
  models = Models(student, teachers, flags.config.train.loss_chunk)
  everywhere = jnp.ones(labels.shape, jnp.int32)
  weights = jnp.full(labels.shape, 1 / labels.size)
  batch = Batch(labels, labels, everywhere > 0, everywhere, weights)

  def loss(outputs: Outputs) -> Float[Array, ""]:
    teacher = outputs["teacher"]
    adapted = teacher.replace(head=jax.lax.stop_gradient(teacher.head))
    frozen = {ONLY: jax.lax.stop_gradient(teacher)}
    params = {"student": outputs["student"], "adapter": {ONLY: adapted}}
    now = knobs_at(method.knobs, 0.0)
    return method.loss(models, params, frozen, batch, jax.random.key(0), now)[0]

  return loss


def _method(flags: argparse.Namespace) -> Method:
  config = flags.config
  return methods.build(flags.method, config.method.to_dict(), config.adapter.kind)


def _dense(flags: argparse.Namespace, labels: Int[Array, "B L"]) -> Loss:
  alpha, stop = flags.config.method.teacher_kl_weight, jax.lax.stop_gradient
  adapts = _method(flags).adapts

  def loss(outputs: Outputs) -> Float[Array, ""]:
    head = stop(outputs["teacher"].head)
    teacher = outputs["teacher"].replace(head=head).logits()
    student = outputs["student"].logits()
    value = losses.forward_kl(stop(teacher), student)
    if adapts:
      value += alpha * losses.forward_kl(stop(student), teacher)
      value += (1 - alpha) * losses.cross_entropy(teacher, labels)
    return jnp.mean(value)

  return loss


def _rows(flags: argparse.Namespace, results: dict[str, Any]) -> dict[str, str]:
  ms, temporaries, config = results["ms"], results["temporary_bytes"], flags.config
  rows = {
    "loss": f"{flags.method}, {config.train.batch_size} rows of "
    f"{config.data.max_length} tokens, student {flags.student_size}, teacher "
    f"{flags.teacher_size} channels, vocabulary {flags.vocab_size}, "
    f"{config.train.dtype}",
    "floor": f"{results['floor_ms']:.0f} ms: {results['operations'] / 1e9:.1f} GFLOP "
    f"at {results['matmul_rate'] / 1e9:.0f} GFLOP/s",
  }
  for name, each in ms.items():
    rows[name] = (
      f"{each['median']:.0f} ms ({each['min']:.0f} to {each['max']:.0f}), "
      f"temporaries {temporaries[name] / 2**20:.0f} MiB"
    )
  share = temporaries["chunked"] / max(temporaries["dense"], 1)
  rows["to dense"] = f"time {results['to_dense']:.2f}, temporaries {share:.2f}"
  return rows


def add_flags(parser: argparse.ArgumentParser) -> None:
  """Sizes and repeats of `bench loss`, beside the flags that all benches share."""
  add, whole = parser.add_argument, at_least(1)
  add("--method", default="okd", choices=METHODS, help="whose loss")
  add("--student_size", type=whole, default=768, help="channels")
  add("--teacher_size", type=whole, default=1600, help="channels")
  add("--vocab_size", type=whole, default=50257, help="tokens")
  add("--repeats", type=whole, default=5, help="measured runs of each")
  add("--warmup", type=at_least(0), default=1, help="runs before these")
