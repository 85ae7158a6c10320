"""From files to batches: sources, templates, tokens, rows, loaders, tokenizers."""

from okd_jax.data.encode import encode, prepare, stop_ids
from okd_jax.data.example import Example, show_example
from okd_jax.data.limits import Counts, Form
from okd_jax.data.loader import each_alone, eval_batches, train_loader
from okd_jax.data.pack import PAD_ID, Packs, pack, pack_row, pad_row, positions
from okd_jax.data.pairing import pair
from okd_jax.data.rows import Rows
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
  "Form",
  "Packs",
  "Record",
  "Rows",
  "check_vocabulary",
  "compare_tokenizers",
  "each_alone",
  "encode",
  "eval_batches",
  "load_records",
  "make_tokenizer",
  "pack",
  "pair",
  "pack_row",
  "pad_row",
  "positions",
  "prepare",
  "read_predictions",
  "read_references",
  "show_example",
  "stop_ids",
  "train_loader",
]
