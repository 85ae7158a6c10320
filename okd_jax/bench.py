"""Measures how fast this machine runs a part of the package, and prints a table.

python -m okd_jax.bench generate --model=M --batch_size=8 --max_new_tokens=128

`benchmarks/` compares with other libraries and methods with each other; what was
measured is in BENCHMARKS.md.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from okd_jax import cli, rollout
from okd_jax.errors import UserError
from okd_jax.evaluate import source_of
from okd_jax.files import write_text
from okd_jax.models import Decoder, Model, ModelConfig, load


class Command(NamedTuple):
  """One subcommand: what it adds to the parser, and what it measures.

  measure: (flags) -> (results for the JSON file, rows of the printed table).
  """

  help: str
  add_flags: Callable[[argparse.ArgumentParser], None]
  measure: Callable[[argparse.Namespace], tuple[dict[str, Any], dict[str, str]]]


def main(arguments: list[str]) -> None:
  """Runs the benchmark that the arguments name."""
  flags = _parser().parse_args(arguments)
  # A program read from the cache has no time of compilation.
  jax.config.update("jax_enable_compilation_cache", False)
  results, rows = COMMANDS[flags.command].measure(flags)
  where = environment()
  results = {"benchmark": flags.command} | where | results
  rows = {"machine": describe(where), **rows}
  width = max(map(len, rows))
  print(
    "\n".join(f"{name:<{width}}  {text}" for name, text in rows.items()), flush=True
  )
  if flags.output:
    write_text(flags.output, json.dumps(results, indent=2) + "\n")


def generate_flags(parser: argparse.ArgumentParser) -> None:
  """The flags of whatever generates from random prompts."""
  add = parser.add_argument
  add(
    "--model",
    required=True,
    default=argparse.SUPPRESS,
    help="HF folder, hub id, .gguf file or run's workdir",
  )
  add("--batch_size", type=at_least(1), default=8, help="prompts at once")
  add("--prompt_tokens", type=at_least(1), default=32, help="random tokens of a prompt")
  add("--max_new_tokens", type=at_least(1), default=128, help="every row gets so many")
  add("--repeats", type=at_least(1), default=5, help="measured runs")
  add("--warmup", type=at_least(0), default=1, help="runs before these")


def random_prompts(config: ModelConfig, flags: argparse.Namespace) -> np.ndarray:
  """int32 [batch_size, prompt_tokens]; a UserError where the model has no room."""
  total = flags.prompt_tokens + flags.max_new_tokens
  if total > config.max_length:
    raise UserError(
      f"--prompt_tokens={flags.prompt_tokens} and --max_new_tokens="
      f"{flags.max_new_tokens} are {total} tokens, but the model takes "
      f"{config.max_length}"
    )
  shape = (flags.batch_size, flags.prompt_tokens)
  return np.random.default_rng(0).integers(0, config.vocab_size, shape, dtype=np.int32)


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


def _generate(flags: argparse.Namespace) -> tuple[dict[str, Any], dict[str, str]]:
  """Time of `rollout.sample`, from prompts on the host to tokens on the device."""
  model = load(flags.model, dtype=jnp.dtype(flags.dtype))
  program, inputs, compile_s = _compile(model, flags)
  for _ in range(flags.warmup):
    seconds(lambda: program(*inputs))
  times = [seconds(lambda: program(*inputs)) for _ in range(flags.repeats)]
  new = flags.batch_size * flags.max_new_tokens
  speed = spread([new / t for t in times])
  memory = _memory(program)
  settings = ("batch_size", "prompt_tokens", "max_new_tokens", "repeats", "warmup")
  results = {
    "model": Path(flags.model).name,
    "parameters": sum(leaf.size for leaf in jax.tree.leaves(model.params)),
    "settings": {k: getattr(flags, k) for k in (*settings, "temperature", "dtype")},
    "tokens_per_s": speed,
    # Between one token of a row and its next, reading the prompts included.
    "ms_per_token": 1e3 * statistics.median(times) / flags.max_new_tokens,
    "compile_s": compile_s,
    "memory_bytes": memory,
  }
  rows = {
    "model": f"{results['model']}, {results['parameters']:,} parameters, {flags.dtype}",
    "shape": f"{flags.batch_size} prompts of {flags.prompt_tokens} tokens, "
    f"{flags.max_new_tokens} new ones each, temperature {flags.temperature:g}",
    "tokens/s": f"{speed['median']:.1f} (median of {flags.repeats}; "
    f"{speed['min']:.1f} to {speed['max']:.1f})",
    "ms per token": f"{results['ms_per_token']:.3f} (of a row; the whole batch's step)",
    "compile": f"{compile_s:.2f} s",
  }
  if memory:
    rows["memory"] = ", ".join(f"{k} {v / 2**20:.1f} MiB" for k, v in memory.items())
  return results, rows


def _compile(model: Model, flags: argparse.Namespace) -> tuple[Callable, tuple, float]:
  """(sampling program, its arguments, seconds it took to compile).

  There is no EOS, so every row runs to the limit.
  """
  tokens = random_prompts(model.config, flags)
  batch = len(tokens)
  inputs = (
    {"params": model.params},
    tokens,
    np.full(batch, flags.prompt_tokens, np.int32),
    np.arange(batch, dtype=np.uint32),
    jax.random.key(0),
    rollout.Sampling(np.float32(flags.temperature), np.int32(0), np.float32(1)),
    np.zeros(0, np.int32),
    np.int32(0),
  )
  source = source_of(Decoder(model.config, dtype=jnp.dtype(flags.dtype)))
  start = time.perf_counter()
  lowered = rollout.sample.lower(source, *inputs, max_new_tokens=flags.max_new_tokens)
  program = lowered.compile()
  return program, inputs, time.perf_counter() - start


def _memory(program) -> dict[str, int]:
  """The compiler's account of a program's memory; empty where it gives none."""
  analysis = program.memory_analysis()
  if analysis is None:
    return {}
  return {
    "arguments": analysis.argument_size_in_bytes,
    "outputs": analysis.output_size_in_bytes,
    "temporaries": analysis.temp_size_in_bytes,
  }


def _add_generate(parser: argparse.ArgumentParser) -> None:
  generate_flags(parser)
  add = parser.add_argument
  add("--temperature", type=_temperature, default=0.0, help="0 is greedy")
  add("--dtype", default="float32", choices=("float32", "bfloat16"), help="of all")


def _temperature(text: str) -> float:
  try:
    value = float(text)
  except ValueError:
    value = -1.0
  if not 0 <= value < float("inf"):
    raise argparse.ArgumentTypeError(f"{text!r} must be a number, at least 0")
  return value


def _cpu_name() -> str:
  """The processor's model where the system says it."""
  path = Path("/proc/cpuinfo")
  lines = path.read_text().splitlines() if path.exists() else []
  names = [
    line.split(":")[1].strip() for line in lines if line.startswith("model name")
  ]
  return names[0] if names else platform.machine()


COMMANDS = {
  "generate": Command("tokens/s of the sampler", _add_generate, _generate),
}


def _parser() -> cli.Parser:
  parser = cli.Parser(
    prog="python -m okd_jax.bench",
    description="Measures the speed of one part of the package on this machine.",
  )
  commands = parser.add_subparsers(dest="command", required=True, metavar="BENCHMARK")
  for name, command in COMMANDS.items():
    part = commands.add_parser(name, help=command.help, description=command.help)
    command.add_flags(part)
    part.add_argument("--output", default="", help="write the results to this JSON")
  return parser


if __name__ == "__main__":
  cli.run(main)
