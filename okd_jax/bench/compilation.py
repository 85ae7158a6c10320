"""`bench compile`: how the time to compile a step grows with its models' depth."""

import argparse
from typing import Any

from okd_jax.bench import measure, step
from okd_jax.bench.measure import at_least


def run(flags: argparse.Namespace) -> tuple[dict[str, Any], dict[str, str]]:
  """Seconds to trace and compile the step, teacher and student of each depth."""
  seconds, rows = {}, {}
  for layers in flags.layers:
    flags.teacher = flags.student = (layers, flags.hidden_size)
    seconds[layers] = step.build(flags).compile_s
  first = seconds[flags.layers[0]]
  for layers, took in seconds.items():
    rows[f"{layers} layers"] = f"{took:.1f} s, {took / first:.2f} of the first"
  return {"settings": measure.settings(flags), "compile_s": seconds}, rows


def add_flags(parser: argparse.ArgumentParser) -> None:
  add = parser.add_argument
  add(
    "--layers",
    type=lambda text: [at_least(1)(part) for part in text.split(",")],
    default="4,48",
    help="depths of both models, by commas",
  )
  add("--hidden_size", type=at_least(1), default=256, help="channels of both models")
  step.model_flags(parser)
