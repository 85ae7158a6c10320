"""Stores what a teacher says about a run's data, so that training needs no teacher.

    python -m okd_jax.cache_teacher --config=configs/X.py --output=DIR [--k=32]
    python -m okd_jax.main --config=configs/X.py --config.teacher.cache=DIR --workdir=W

Of each token that counts: the K likeliest ids, their log-probabilities and the mass of
the rest, of the distribution at method.temperature; the rows to train on in DIR/train,
those held out in DIR/eval. The configuration is the run's own; where it names stages,
--workdir is the run that has finished them. Killed and run again, the command goes on
with the rows that are missing. Each folder's about.json says what it was made of
(`okd_jax.store`).
"""

from pathlib import Path

import jax
import jax.numpy as jnp

from okd_jax import cli, configuration, precompute, setup, store, teachers, train
from okd_jax.errors import UserError
from okd_jax.methods import Models, stored
from okd_jax.models import output


def main(arguments: list[str]) -> None:
  """Stores as the arguments say; a UserError for whatever is wrong with them."""
  args, rest = _parser().parse_known_args(arguments)
  cli.use_compilation_cache()
  config = configuration.read(rest)
  *_, (_, config, workdir) = train.stages(config, Path(args.workdir or args.output))
  if args.k < 0:
    raise UserError(f"--k={args.k} must be at least 0")
  if config.teacher.cache:
    raise UserError("teacher.cache is what this command writes: name it by --output")
  run = setup.build(config, workdir)
  if run.method.teacher == "several" or run.reading:
    raise UserError(
      "a store holds the words of one teacher in the student's own tokens; set "
      "method.name=kd and teacher.path, and leave out method.cross_tokenizer"
    )
  if "teacher" not in run.decoders:
    raise UserError("the configuration names no teacher")
  with jax.set_mesh(run.mesh):
    write(run, Path(args.output), args.k, args.dtype)


def write(run: setup.Run, folder: Path, k: int, dtype: str) -> dict[str, store.Store]:
  """Stores the teacher's top k for every row of the run, or what is missing of it.

  Every process calls it; each writes the rows that its devices computed.

  Returns:
    The stores by part: 'train' and, if the run holds out any rows, 'eval'.
  """
  size = min(run.decoders[role].config.vocab_size for role in ("student", "teacher"))
  decoder, temperature = run.decoders["teacher"], run.config.method.temperature
  models = Models(None, None, None, run.config.train.loss_chunk, vocab_size=size)
  k = min(k or size, size)

  @jax.jit
  def record(frozen, batch):
    out = output(decoder, {"params": frozen}, batch)
    labels, kind = batch["labels"], jnp.dtype(dtype)
    return stored.record(models, out, labels, k, temperature, kind)

  parts = {"train": run.train} | ({"eval": run.eval} if run.eval else {})
  kept = {}
  for part, examples in parts.items():
    about = teachers.stored_key(run.config, examples)
    about |= {"k": k, "dtype": dtype, "vocab_size": size} | teachers.dtypes(run.config)
    where = folder / part
    if jax.process_index() == 0:
      store.begin(where, len(examples), about)
    precompute.barrier(f"{part} begun")
    kept[part] = store.Store(where, len(examples), about)
    precompute.fill(run, examples, kept[part], record, "mask")
  return kept


def _parser() -> cli.Parser:
  parser = cli.Parser(
    prog="okd_jax.cache_teacher",
    description="Stores a teacher's likeliest tokens for the data of a run. Also takes "
    "--config=FILE and --config.key=value, as okd_jax.main does.",
  )
  add = parser.add_argument
  add("--output", required=True, help="folder of the store; gone on with if it is one")
  add("--k", type=int, default=32, help="tokens kept a position; 0 is all of them")
  add(
    "--dtype",
    default="float16",
    choices=("float32", "float16", "bfloat16"),
    help="of the log-probabilities",
  )
  add("--workdir", default="", help="a run whose finished stages the paths mean")
  return parser


if __name__ == "__main__":
  cli.run(main)
