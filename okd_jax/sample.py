"""Lets a model answer every prompt of a dataset: the data of sequence-level KD.

python -m okd_jax.sample --model=M --data=F --output=O.jsonl
"""

from okd_jax.errors import UserError
from okd_jax.runtime import cli


def main(arguments: list[str]) -> None:
  """Writes the file that the arguments ask for."""
  args = _parser().parse_args(arguments)
  # From here on all is needed, which takes seconds to import.
  import jax.numpy as jnp

  from okd_jax.data import load_records
  from okd_jax.data.sources import source_list
  from okd_jax.models import Decoder, load, template_of
  from okd_jax.text.answers_file import write_samples
  from okd_jax.text.rollout import Sampling

  cli.use_compilation_cache()
  model = load(args.model, dtype=args.dtype)
  if model.tokenizer is None:
    raise UserError(f"{args.model} has no tokenizer, so it cannot read a prompt")
  records = load_records(source_list(args.data), prompts=True)[: args.limit or None]
  write_samples(
    Decoder(model.config, dtype=jnp.dtype(args.dtype)),
    {"params": model.params},
    records,
    model.tokenizer,
    args.output,
    template=args.template or template_of(args.model) or "default",
    max_new_tokens=args.max_new_tokens,
    max_prompt_length=args.max_prompt_length,
    sampling=Sampling(args.temperature, args.top_k, args.top_p),
    seed=args.seed,
    batch_size=args.batch_size,
  )


def _parser() -> cli.Parser:
  parser = cli.Parser(
    prog="python -m okd_jax.sample",
    description="Writes one response of a model to each prompt of a dataset.",
  )
  add = parser.add_argument
  add("--model", required=True, help="HF folder, hub id, .gguf file or run's workdir")
  add("--data", required=True, help="as data.train; rows may be prompts alone")
  add("--output", required=True, help="the .jsonl file; a partial one is gone on with")
  add("--max_new_tokens", type=int, default=256, help="of a response")
  add("--batch_size", type=int, default=32, help="rows at once")
  limit = cli.number(int, "at least 0", lambda rows: rows >= 0)
  add("--limit", type=limit, default=0, help="first so many rows; 0 is all")
  add("--template", help="as data.template; by default the run's own, or 'default'")
  add("--max_prompt_length", type=int, help="by default 512, or what fits")
  cli.add_sampling(parser, temperature=1.0)
  cli.add_dtype(parser)
  return parser


def command() -> None:
  """The console script."""
  cli.run(main)


if __name__ == "__main__":
  command()
