"""What all benchmarks share: the clock, the machine, and the flags' types."""

import argparse
import datetime
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import PyTree


class Command(NamedTuple):
  """One subcommand: what it adds to the parser, and what it measures.

  measure: (flags) -> (results for the JSON file, rows of the printed table).
  configured: whether there is a configuration, `flags.config`.
  """

  help: str
  add_flags: Callable[[argparse.ArgumentParser], None]
  measure: Callable[[argparse.Namespace], tuple[dict[str, Any], dict[str, str]]]
  configured: bool = False


def seconds(call: Callable[[], Any]) -> float:
  """How long a call takes until its arrays are there."""
  start = time.perf_counter()
  jax.block_until_ready(call())
  return time.perf_counter() - start


def spread(values: Sequence[float]) -> dict[str, float]:
  """Median, least and greatest."""
  return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def at_least(least: int) -> Callable[[str], int]:
  """An argparse type: a whole number, at least so much."""

  def parse(text: str) -> int:
    try:
      value = int(text)
    except ValueError:
      value = least - 1
    if value < least:
      message = f"{text!r} must be a whole number, at least {least}"
      raise argparse.ArgumentTypeError(message)
    return value

  return parse


def temperature(text: str) -> float:
  """An argparse type: a number, at least 0."""
  try:
    value = float(text)
  except ValueError:
    value = -1.0
  if not 0 <= value < float("inf"):
    raise argparse.ArgumentTypeError(f"{text!r} must be a number, at least 0")
  return value


def environment() -> dict[str, Any]:
  """Date, machine and versions; nothing that names the host."""
  device = jax.devices()[0]
  on_cpu = device.platform == "cpu"
  versions = {name: metadata.version(name) for name in ("jax", "flax", "transformers")}
  return {
    "date": datetime.date.today().isoformat(),
    "machine": {
      "platform": device.platform,
      "device": _cpu_name() if on_cpu else device.device_kind,
      "count": os.cpu_count() if on_cpu else jax.device_count(),
      "load": round(os.getloadavg()[0], 1),
    },
    "versions": {"python": platform.python_version()} | versions,
  }


def describe(where: dict[str, Any]) -> str:
  """One line about what `environment` found."""
  machine = where["machine"]
  noun = "CPU core" if machine["platform"] == "cpu" else "device"
  versions = ", ".join(f"{name} {v}" for name, v in where["versions"].items())
  return (
    f"{machine['count']} {noun}(s), {machine['device']}, load {machine['load']}; "
    f"{versions}; {where['date']}"
  )


def memory(program: jax.stages.Compiled) -> dict[str, int]:
  """The compiler's account of a program's memory; empty where it gives none."""
  analysis = program.memory_analysis()
  if analysis is None:
    return {}
  return {
    "arguments": analysis.argument_size_in_bytes,
    "outputs": analysis.output_size_in_bytes,
    "temporaries": analysis.temp_size_in_bytes,
  }


def mebibytes(sizes: Mapping[str, int]) -> str:
  """Sizes in bytes by name, in words."""
  return ", ".join(f"{name} {size / 2**20:.1f} MiB" for name, size in sizes.items())


def matmul_rate(dtype: DTypeLike, repeats: int = 5) -> float:
  """Operations a second of the best of a few square products: this machine, now.

  On an accelerator larger ones and ten in one program: a single small one is over
  before the host could ask for the next, and would tell how fast that asks.
  """
  on_cpu = jax.default_backend() == "cpu"
  size, count = (2048, 1) if on_cpu else (8192, 10)
  a = jax.random.normal(jax.random.key(0), (size, size))
  a, b = a.astype(dtype), (a / size**0.5).astype(dtype)  # no product overflows
  products = jax.jit(lambda a, b: jax.lax.fori_loop(0, count, lambda _, x: x @ b, a))
  seconds(lambda: products(a, b))
  times = [seconds(lambda: products(a, b)) for _ in range(repeats)]
  return 2 * size**3 * count / min(times)


def read_rate(repeats: int = 5) -> float:
  """Bytes a second that the device reads at best: this machine, now.

  The sum of an array that no cache holds, by NumPy, too, where that is the device.
  """
  array = jnp.ones(2**27, jnp.float32)
  sums = [jax.jit(jnp.sum)]
  if jax.default_backend() == "cpu":
    sums.append(lambda x: np.asarray(x).sum())
  times = [seconds(lambda f=f: f(array)) for f in sums for _ in range(repeats)]
  return array.nbytes / min(times)


def nbytes(tree: PyTree) -> int:
  """Bytes of all arrays of a tree."""
  return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def settings(flags: argparse.Namespace) -> dict[str, Any]:
  """What a benchmark was asked for; of the configuration what it reads."""
  given = {k: v for k, v in vars(flags).items() if k not in ("command", "output")}
  config = given.pop("config")
  parts = {name: config[name].to_dict() for name in ("method", "adapter")}
  keys = ("dtype", "remat", "attention", "loss_chunk", "microbatches", "batch_size")
  parts["train"] = {key: config.train[key] for key in keys}
  return given | parts | {"length": config.data.max_length}


def _cpu_name() -> str:
  """The processor's model where the system says it."""
  path = Path("/proc/cpuinfo")
  lines = path.read_text().splitlines() if path.exists() else []
  names = [
    line.split(":")[1].strip() for line in lines if line.startswith("model name")
  ]
  return names[0] if names else platform.machine()
