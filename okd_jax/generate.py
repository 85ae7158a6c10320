"""Continues one prompt and prints the completion, alone, on standard output.

python -m okd_jax.generate --model=M --prompt="Once upon a time"
python -m okd_jax.generate --model=M --chat --prompt="Name three colours."
python -m okd_jax.generate --model=M --prompt=- --temperature=0.8 <prompt.txt
"""

import argparse
import math
import sys

import jax
import jax.numpy as jnp
import jinja2

from okd_jax import cli, rollout
from okd_jax.errors import UserError
from okd_jax.models import Decoder, Model, head_kernel, init_cache, load, unembed

_NEW_TOKENS = 128


def main(arguments: list[str]) -> None:
  """Prints the completion that the arguments ask for."""
  flags = _parser().parse_args(arguments)
  cli.use_compilation_cache()
  prompt = _read(flags.prompt)
  model = load(flags.model, dtype=jnp.dtype(flags.dtype))
  if model.tokenizer is None:
    raise UserError(f"{flags.model} has no tokenizer, so it cannot read a prompt")
  print(complete(model, prompt, flags), flush=True)


def complete(model: Model, prompt: str, flags) -> str:
  """The text that `model` puts after `prompt`, without special tokens."""
  tokens = _chat_tokens(model, prompt) if flags.chat else _plain_tokens(model, prompt)
  if not tokens:
    raise UserError(
      "the prompt has no tokens and this tokenizer puts none before a text; "
      "give --prompt some text"
    )
  if max(tokens) >= model.config.vocab_size:
    raise UserError(
      f"the tokenizer gives token {max(tokens)}, but the model knows only "
      f"{model.config.vocab_size}: they do not belong together"
    )
  decoder = Decoder(model.config, dtype=jnp.dtype(flags.dtype))
  [completion] = rollout.generate(
    rollout.decoder_source(decoder, init_cache, head_kernel, unembed),
    {"params": model.params},
    [tokens],
    jax.random.key(flags.seed),
    max_new_tokens=flags.max_new_tokens or _room(model, tokens),
    sampling=rollout.Sampling(flags.temperature, flags.top_k, flags.top_p),
    eos_ids=_stop_ids(model, flags.chat),
  )
  return model.tokenizer.decode(completion.tokens, skip_special_tokens=True)


def _room(model: Model, tokens: list[int]) -> int:
  """The default length, or less where the model's context ends before."""
  return min(_NEW_TOKENS, max(1, model.config.max_length - len(tokens)))


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


def _plain_tokens(model: Model, prompt: str) -> list[int]:
  """The prompt as it is, after what the tokenizer puts before a text by default.

  What it puts after one, an EOS say, is left out: a prompt has not ended.
  """
  probe = model.tokenizer("a", return_special_tokens_mask=True)
  front = probe["input_ids"][: probe["special_tokens_mask"].index(0)]
  return front + model.tokenizer(prompt, add_special_tokens=False)["input_ids"]


def _chat_tokens(model: Model, prompt: str) -> list[int]:
  """The prompt as a user's turn, and the opening of the answer."""
  if not model.tokenizer.chat_template:
    raise UserError("the model's tokenizer has no chat template; leave out --chat")
  messages = [{"role": "user", "content": prompt}]
  try:
    text = model.tokenizer.apply_chat_template(
      messages, tokenize=False, add_generation_prompt=True
    )
  except (jinja2.TemplateError, TypeError, ValueError) as error:
    raise UserError(f"the chat template refuses the prompt ({error})") from error
  return model.tokenizer(text, add_special_tokens=False)["input_ids"]


def _stop_ids(model: Model, chat: bool) -> tuple[int, ...]:
  """What ends a text for the model or its tokenizer; in a chat, the end of a turn."""
  ids = set(model.config.eos_ids)
  if model.tokenizer.eos_token_id is not None:
    ids.add(model.tokenizer.eos_token_id)
  if chat:
    # Here, because the data pipeline takes half a second to import.
    from okd_jax.data import stop_ids

    ids |= set(stop_ids(model.tokenizer, "chat"))
  return tuple(sorted(ids))


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
    type=_number(int, "at least 1", lambda n: n >= 1),
    metavar="N",
    help=f"{_NEW_TOKENS}, or less where the model's context is full before",
  )
  add(
    "--temperature",
    type=_number(float, "at least 0", lambda t: 0 <= t < math.inf),
    default=0.0,
    help="of the sampling; 0 always takes the likeliest token",
  )
  add(
    "--top_p",
    type=_number(float, "above 0 and at most 1", lambda p: 0 < p <= 1),
    default=1.0,
    help="sample from the likeliest tokens that hold this much probability",
  )
  add(
    "--top_k",
    type=_number(int, "at least 0", lambda k: 0 <= k < 2**31),
    default=0,
    help="sample from this many likeliest tokens; 0 is all",
  )
  add(
    "--seed",
    type=_number(int, "from 0 to 2^32 - 1", lambda seed: 0 <= seed < 2**32),
    default=0,
    help="of the sampling; the same seed gives the same text",
  )
  add(
    "--dtype", default="float32", choices=("float32", "bfloat16"), help="of the matmuls"
  )
  return parser


def _number(kind: type, allowed: str, fits):
  """An argparse type: a number that `fits`, or an error that says what is allowed."""

  def parse(text: str):
    try:
      value = kind(text)
    except ValueError:
      value = math.nan
    if not fits(value):
      noun = "a whole number" if kind is int else "a number"
      raise argparse.ArgumentTypeError(f"{text!r} must be {noun}, {allowed}")
    return value

  return parse


if __name__ == "__main__":
  cli.run(main)
