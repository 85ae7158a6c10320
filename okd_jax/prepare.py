"""Tokenises the data of a run before it, so that many processes need not wait.

    python -m okd_jax.prepare --config=configs/X.py --output=DIR [--num_proc=16]
    python -m okd_jax.main --config=configs/X.py --config.data.prepared=DIR --workdir=W

Writes DIR/train and, where the configuration has data.eval, DIR/eval; DIR may be gs://,
s3:// or whatever fsspec writes to. No weights are loaded. What is there already is left
alone, and rows that were made otherwise are never replaced. The configuration is the
run's own.
"""

import functools

from okd_jax.config import read
from okd_jax.config.stages import stages
from okd_jax.errors import UserError
from okd_jax.runtime import cli
from okd_jax.runtime.files import local

_TRAINED = "bpe:"


def main(arguments: list[str]) -> None:
  """Writes as the arguments say; a UserError for whatever is wrong with them."""
  args, rest = _parser().parse_known_args(arguments)
  output, place = args.output, local(args.workdir or f"{args.output}/train")
  config = stages(read.read(rest), place)[-1].config
  from okd_jax.data import day, prepared  # heavy, from here on
  from okd_jax.data.sources import shards_of
  from okd_jax.run.data import making, records
  from okd_jax.run.job import check
  from okd_jax.run.outline import outline
  from okd_jax.runtime.workdir import Workdir

  job = check(config)
  data, prompts = job.settings.data, job.method.sequences.answers_all
  trained = data.tokenizer.startswith(_TRAINED)
  if data.prepared:
    raise UserError("data.prepared is what this command writes: name it by --output")
  if data.stream or job.method.sequences.own_tokens:
    key = "data.stream" if data.stream else "method.cross_tokenizer"
    raise UserError(f"under {key} no run reads prepared rows")
  if trained and "://" in output:
    raise UserError(
      f"data.tokenizer={data.tokenizer} would be trained and kept in {output}, where "
      "no run can read it; name a local --output"
    )
  processes = data.num_proc if args.num_proc is None else args.num_proc
  shape = outline(job, Workdir(place), functools.partial(records, data))
  parts = {"train": data.sources, "eval": data.eval_sources}
  with day.written_on(prepared.day_of(output)):
    for part in filter(parts.get, prepared.PARTS):
      made = making(data, shape, prompts, held_out=part == "eval")
      new = prepared.write(output, part, shards_of(parts[part]), made, processes)
      print(f"{output}/{part}: {'written' if new else 'is there already'}")
  if trained:
    Workdir(local(output)).keep_folder("tokenizer", shape.tokenizer.save_pretrained)
    print(f"runs read them with data.tokenizer={output}/tokenizer")


def _parser() -> cli.Parser:
  parser = cli.Parser(
    prog="okd_jax.prepare",
    description="Tokenises the data of a run. Also takes --config=RECIPE and "
    "--config.key=value, as okd_jax.main does.",
  )
  add = parser.add_argument
  add("--output", required=True, help="folder to write to, local or gs://, s3://, …")
  add("--num_proc", type=int, help="in place of data.num_proc; 0: as many as CPUs")
  add("--workdir", default="", help="a run whose finished stages the paths mean")
  return parser


def command() -> None:
  """The console script."""
  cli.run(main)


if __name__ == "__main__":
  command()
