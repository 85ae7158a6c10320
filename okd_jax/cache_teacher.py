"""Stores what a teacher says about a run's data, so that training needs no teacher.

    python -m okd_jax.cache_teacher --config=configs/X.py --output=DIR [--k=32]
    python -m okd_jax.main --config=configs/X.py --config.teacher.cache=DIR --workdir=W

Of each trained token: the K likeliest ids, their log-probabilities and the mass of the
rest, of the distribution at method.temperature. The configuration is the run's own;
where it names stages, --workdir is the run that has finished them. Killed and run
again, the command goes on with the rows that are missing. DIR/about.json says what
it was made of (`okd_jax.store`).
"""

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from okd_jax import cli, configuration, setup, sharding, store, train
from okd_jax.data import pad_row
from okd_jax.errors import UserError
from okd_jax.methods import Models, stored
from okd_jax.models import output

_BATCHES = 8  # whose rows make one file
_log = logging.getLogger("okd_jax")  # also when this is run as a command


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
  if "teacher" not in run.decoders:
    raise UserError("the configuration names no teacher")
  with jax.set_mesh(run.mesh):
    write(run, Path(args.output), args.k, args.dtype)


def write(run: setup.Run, folder: Path, k: int, dtype: str) -> store.Store:
  """Stores the teacher's top k for every row of `run.train`, or what is missing of it.

  Every process calls it; each writes the rows that its devices computed.
  """
  size = min(run.decoders[role].config.vocab_size for role in ("student", "teacher"))
  about = setup.stored_key(run.config, run.train) | {
    "k": min(k or size, size),
    "dtype": dtype,
    "vocab_size": size,
  }
  if jax.process_index() == 0:
    store.begin(folder, len(run.train), about)
  _barrier("begun")
  kept = store.Store(folder, len(run.train), about)
  read = _reader(run, about)
  todo = set(kept.missing())
  batch = _batch_size(run)
  piece = _BATCHES * batch
  bar = tqdm(
    total=len(run.train),
    initial=len(run.train) - len(todo),
    unit="row",
    desc="teacher",
    disable=not sys.stderr.isatty(),
  )
  with bar:
    for first in range(0, len(run.train), piece):
      rows = range(first, min(first + piece, len(run.train)))
      if missing := todo.intersection(rows):
        _write_piece(run, kept, read, rows, missing, batch)
        bar.update(len(missing))
  _barrier("stored")
  kept.reload()
  if jax.process_index() == 0:
    _log.info("%s: %d rows, %s", folder, len(run.train), _size(run, folder))
  return kept


def _write_piece(run, kept, read, rows: range, missing: set[int], size: int) -> None:
  """Answers some rows batch by batch, always the same ones together."""
  own, arrays = [], []
  for first in range(rows.start, rows.stop, size):
    batch = [min(row, rows.stop - 1) for row in range(first, first + size)]
    share = size // jax.process_count()
    mine = batch[jax.process_index() * share :][:share]
    for row, values in zip(mine, read(mine), strict=True):
      if row in missing and row not in own:
        own.append(row)
        arrays.append(values)
  if own:
    kept.write(own, arrays)


def _reader(run: setup.Run, about) -> Callable[[list[int]], list[dict[str, Any]]]:
  """This process's rows of a batch -> what the teacher says of their trained tokens."""
  decoder = run.decoders["teacher"]
  models = Models(
    None, None, None, run.config.train.loss_chunk, vocab_size=about["vocab_size"]
  )

  @jax.jit
  def record(frozen, batch):
    hidden = output(decoder, {"params": frozen}, batch)
    return stored.record(
      models,
      hidden,
      batch["labels"],
      about["k"],
      about["temperature"],
      jnp.dtype(about["dtype"]),
    )

  def read(rows):
    length = run.config.data.max_length
    padded = [pad_row(run.train[row], length, train.PAD_ID) for row in rows]
    batch = {name: np.stack([row[name] for row in padded]) for name in padded[0]}
    values = record(run.frozen, sharding.put_batch(batch, run.mesh))
    values = jax.tree.map(_local, values)
    return [
      {name: array[i][mask] for name, array in values.items()}
      for i, mask in enumerate(batch["mask"])
    ]

  return read


def _local(array: jax.Array) -> np.ndarray:
  """The rows of a global array that this process holds, in order."""
  parts = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
  return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])


def _batch_size(run: setup.Run) -> int:
  ways = run.mesh.shape["data"] * run.mesh.shape["fsdp"]
  return -(-run.config.eval.batch_size // ways) * ways


def _size(run: setup.Run, folder: Path) -> str:
  total = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
  tokens = sum(len(e.tokens) - max(e.prompt_length, 1) for e in run.train)
  return f"{total / 1e6:.1f} MB, {total / max(tokens, 1):.0f} bytes per trained token"


def _barrier(name: str) -> None:
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(f"cache_teacher {name}")


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
