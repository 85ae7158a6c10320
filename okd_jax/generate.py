"""Continues one prompt and prints the completion, alone, on standard output.

python -m okd_jax.generate --model=M --prompt="Once upon a time"
python -m okd_jax.generate --model=RUN --prompt="Name three colours."  # RUN's template
python -m okd_jax.generate --model=M --prompt=- --chat --temperature=0.8 <prompt.txt
python -m okd_jax.generate --model=TEACHER --draft=STUDENT --prompt=…  # speculatively
"""

import argparse

from okd_jax.errors import UserError
from okd_jax.runtime import cli
from okd_jax.text.defaults import DRAFT_TOKENS, NEW_TOKENS, RAW


def main(arguments: list[str]) -> None:
  """Prints the completion that the arguments ask for."""
  flags = _parser().parse_args(arguments)
  prompt = cli.text_or_stdin(flags.prompt, "the prompt")
  # From here on all is needed, which takes seconds to import.
  import jax.numpy as jnp

  from okd_jax.models import load, template_of
  from okd_jax.text.complete import complete
  from okd_jax.text.rollout import Sampling

  cli.use_compilation_cache()
  model = load(flags.model, dtype=jnp.dtype(flags.dtype))
  if model.tokenizer is None:
    raise UserError(f"{flags.model} has no tokenizer, so it cannot read a prompt")
  template = "chat" if flags.chat else flags.template or template_of(flags.model)
  draft = load(flags.draft, dtype=jnp.dtype(flags.dtype)) if flags.draft else None
  completion = complete(
    model,
    prompt,
    template=template or RAW,
    max_new_tokens=flags.max_new_tokens,
    sampling=Sampling(flags.temperature, flags.top_k, flags.top_p),
    seed=flags.seed,
    dtype=flags.dtype,
    draft=draft,
    draft_tokens=flags.draft_tokens,
  )
  print(completion, flush=True)


def _parser() -> cli.Parser:
  parser = cli.Parser(
    prog="python -m okd_jax.generate",
    description="Continues one prompt and prints the completion alone.",
  )
  add = parser.add_argument
  own = f"by default that of the run that made the model, else {RAW}"
  needed = {"required": True, "default": argparse.SUPPRESS}
  add("--model", **needed, help="HF folder, hub id, .gguf file or run's workdir")
  add("--prompt", **needed, help="text to continue; - reads standard input")
  form = parser.add_mutually_exclusive_group().add_argument
  form("--template", help=f"as data.template, or {RAW}: the prompt as it is; {own}")
  form("--chat", action="store_true", help="the same as --template=chat")
  most = f"{NEW_TOKENS}, or less where the model's context is full before"
  count = cli.number(int, "at least 1", lambda n: n >= 1)
  add("--max_new_tokens", type=count, metavar="N", help=most)
  cli.add_sampling(parser, temperature=0.0)
  add("--draft", default="", help="a smaller model of the same tokens: it writes ahead")
  ahead = (
    f"tokens that it writes before each pass of the model, {DRAFT_TOKENS} if unset"
  )
  add("--draft_tokens", type=count, metavar="N", help=ahead)
  cli.add_dtype(parser)
  return parser


def command() -> None:
  """The console script."""
  cli.run(main)


if __name__ == "__main__":
  command()
