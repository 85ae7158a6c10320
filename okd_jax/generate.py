"""Continues one prompt and prints the completion, alone, on standard output.

python -m okd_jax.generate --model=M --prompt="Once upon a time"
python -m okd_jax.generate --model=M --chat --prompt="Name three colours."
python -m okd_jax.generate --model=M --prompt=- --temperature=0.8 <prompt.txt
"""

import argparse
import math
import sys

import jax.numpy as jnp

from okd_jax.errors import UserError
from okd_jax.models import load
from okd_jax.runtime import cli
from okd_jax.text.complete import NEW_TOKENS, complete


def main(arguments: list[str]) -> None:
  """Prints the completion that the arguments ask for."""
  flags = _parser().parse_args(arguments)
  cli.use_compilation_cache()
  prompt = _read(flags.prompt)
  model = load(flags.model, dtype=jnp.dtype(flags.dtype))
  if model.tokenizer is None:
    raise UserError(f"{flags.model} has no tokenizer, so it cannot read a prompt")
  print(complete(model, prompt, flags), flush=True)


def _read(prompt: str) -> str:
  """The prompt itself, or standard input if it is `-`, less its last line break."""
  if prompt != "-":
    # Bytes of the command line that are no text arrive as lone surrogates.
    text = prompt.encode(errors="surrogateescape")
  else:
    text = sys.stdin.buffer.read().removesuffix(b"\n")
  try:
    return text.decode()
  except UnicodeDecodeError as error:
    raise UserError(f"the prompt is not valid UTF-8 ({error})") from error


def _parser() -> cli.Parser:
  parser = cli.Parser(
    prog="python -m okd_jax.generate",
    description="Continues one prompt and prints the completion alone.",
  )
  add = parser.add_argument
  needed = {"required": True, "default": argparse.SUPPRESS}
  add("--model", **needed, help="HF folder, hub id, .gguf file or run's workdir")
  add("--prompt", **needed, help="text to continue; - reads standard input")
  add("--chat", action="store_true", help="ask through the model's chat template")
  add(
    "--max_new_tokens",
    type=cli.number(int, "at least 1", lambda n: n >= 1),
    metavar="N",
    help=f"{NEW_TOKENS}, or less where the model's context is full before",
  )
  add(
    "--temperature",
    type=cli.number(float, "at least 0", lambda t: 0 <= t < math.inf),
    default=0.0,
    help="of the sampling; 0 always takes the likeliest token",
  )
  add(
    "--top_p",
    type=cli.number(float, "above 0 and at most 1", lambda p: 0 < p <= 1),
    default=1.0,
    help="sample from the likeliest tokens that hold this much probability",
  )
  add(
    "--top_k",
    type=cli.number(int, "at least 0", lambda k: 0 <= k < 2**31),
    default=0,
    help="sample from this many likeliest tokens; 0 is all",
  )
  add(
    "--seed",
    type=cli.number(int, "from 0 to 2^32 - 1", lambda seed: 0 <= seed < 2**32),
    default=0,
    help="of the sampling; the same seed gives the same text",
  )
  cli.add_dtype(parser)
  return parser


if __name__ == "__main__":
  cli.run(main)
