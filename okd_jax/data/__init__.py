"""From files to batches: sources, templates, tokens, rows, loaders, tokenizers."""

from okd_jax.data.encode import Example, encode, prepare, show_example, stop_ids
from okd_jax.data.limits import Counts, Limits
from okd_jax.data.loader import each_alone, eval_batches, train_loader
from okd_jax.data.pack import PAD_ID, pack, pack_row, pad_row, positions
from okd_jax.data.pairing import pair, shared_text
from okd_jax.data.sources import (
  Record,
  load_records,
  read_predictions,
  read_references,
)
from okd_jax.data.tokenizer import (
  check_vocabulary,
  compare_tokenizers,
  make_tokenizer,
)

__all__ = [
  "PAD_ID",
  "Counts",
  "Example",
  "Limits",
  "Record",
  "check_vocabulary",
  "compare_tokenizers",
  "each_alone",
  "encode",
  "eval_batches",
  "load_records",
  "make_tokenizer",
  "pack",
  "pack_row",
  "pad_row",
  "pair",
  "positions",
  "prepare",
  "read_predictions",
  "read_references",
  "shared_text",
  "show_example",
  "stop_ids",
  "train_loader",
]
