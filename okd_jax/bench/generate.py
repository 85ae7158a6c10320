"""`bench generate`: tokens a second of the sampler."""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from okd_jax.bench import measure
from okd_jax.bench.measure import at_least
from okd_jax.errors import UserError
from okd_jax.models import Decoder, Model, ModelConfig, load
from okd_jax.text import rollout
from okd_jax.text.source import decoder_source


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


def run(flags: argparse.Namespace) -> tuple[dict[str, Any], dict[str, str]]:
  """Time of `rollout.sample`, from prompts on the host to tokens on the device.

  Beside it that of reading the prompts, for the first token alone, and the least that
  another one takes: to read all weights and the cache once.
  """
  model = load(flags.model, dtype=jnp.dtype(flags.dtype))
  program, inputs, compile_s = _compile(model, flags, flags.max_new_tokens)
  first, _, _ = _compile(model, flags, 1)
  rates, times, firsts = [measure.read_rate()], [], []
  for _ in range(flags.warmup + flags.repeats):
    times.append(measure.seconds(lambda: program(*inputs)))
    firsts.append(measure.seconds(lambda: first(*inputs)))
  times, firsts = times[flags.warmup :], firsts[flags.warmup :]
  rates.append(measure.read_rate())
  new = flags.batch_size * flags.max_new_tokens
  prompts = statistics.median(firsts)
  later = statistics.median(times) - prompts
  ms = 1e3 * later / max(flags.max_new_tokens - 1, 1)
  floor = _bytes_read(model, flags) / max(rates)
  speed = measure.spread([new / t for t in times])
  memory = measure.memory(program)
  settings = ("batch_size", "prompt_tokens", "max_new_tokens", "repeats", "warmup")
  results = {
    "model": Path(flags.model).name,
    "parameters": sum(leaf.size for leaf in jax.tree.leaves(model.params)),
    "settings": {k: getattr(flags, k) for k in (*settings, "temperature", "dtype")},
    "tokens_per_s": speed,
    # Between one token of a row and its next, reading the prompts included.
    "ms_per_token": 1e3 * statistics.median(times) / flags.max_new_tokens,
    "prompts_ms": 1e3 * prompts,
    "ms_per_later_token": ms,
    "read_rate": max(rates),
    "floor_ms": 1e3 * floor,
    "to_floor": ms / 1e3 / floor,
    "compile_s": compile_s,
    "memory_bytes": memory,
  }
  return results, _rows(flags, results)


def _rows(flags: argparse.Namespace, results: dict[str, Any]) -> dict[str, str]:
  speed, ms = results["tokens_per_s"], results["ms_per_later_token"]
  rows = {
    "model": f"{results['model']}, {results['parameters']:,} parameters, {flags.dtype}",
    "shape": f"{flags.batch_size} prompts of {flags.prompt_tokens} tokens, "
    f"{flags.max_new_tokens} new ones each, temperature {flags.temperature:g}",
    "tokens/s": f"{speed['median']:.1f} (median of {flags.repeats}; "
    f"{speed['min']:.1f} to {speed['max']:.1f})",
    "ms per token": f"{results['ms_per_token']:.3f} (of a row; the whole batch's step)",
    "compile": f"{results['compile_s']:.2f} s",
  }
  if flags.max_new_tokens > 1:
    rows["where"] = (
      f"{results['prompts_ms']:.0f} ms for the prompts and the first token, "
      f"{ms:.3f} ms for each later one"
    )
    rows["floor"] = (
      f"{results['floor_ms']:.3f} ms to read weights and cache at "
      f"{results['read_rate'] / 1e9:.0f} GB/s, if none of it stays in a processor's "
      f"cache; a later token takes {results['to_floor']:.2f} times that"
    )
  if memory := results["memory_bytes"]:
    rows["memory"] = measure.mebibytes(memory)
  return rows


def _bytes_read(model: Model, flags: argparse.Namespace) -> float:
  """What a token reads: layers, head and, on average over the run, the cache.

  Of experts all, which a batch of several rows comes to need.
  """
  params, config = dict(model.params), model.config
  if not config.tie_embeddings:
    del params["embed"]  # a few rows of it
  params.pop("position_embed", None)
  slots = flags.prompt_tokens + flags.max_new_tokens / 2
  heads = config.num_layers * config.num_kv_heads * config.head_dim
  size = jnp.dtype(flags.dtype).itemsize
  return measure.nbytes(params) + 2 * flags.batch_size * heads * slots * size


def _compile(
  model: Model, flags: argparse.Namespace, max_new_tokens: int
) -> tuple[Callable, tuple, float]:
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
  source = decoder_source(Decoder(model.config, dtype=jnp.dtype(flags.dtype)))
  start = time.perf_counter()
  lowered = rollout.sample.lower(source, *inputs, max_new_tokens=max_new_tokens)
  program = lowered.compile()
  return program, inputs, time.perf_counter() - start


def add_flags(parser: argparse.ArgumentParser) -> None:
  generate_flags(parser)
  add = parser.add_argument
  add("--temperature", type=measure.temperature, default=0.0, help="0 is greedy")
  add("--dtype", default="float32", choices=("float32", "bfloat16"), help="of all")
