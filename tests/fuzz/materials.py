"""Sound files of each kind, small, from which unsound ones are made."""

import dataclasses
import functools
import io
import json
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from flax import traverse_util

from okd_jax import models
from okd_jax.data import make_tokenizer, rows
from okd_jax.data.encode import encode
from okd_jax.data.sources import Record
from okd_jax.models import adapters
from okd_jax.runtime.workdir import writes
from okd_jax.teachers import store

KEY = {"teacher": "t"}  # what the stored teacher was begun with
_TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "b"}]
ROWS = [
  {"instruction": "Add.", "input": "1, 2", "output": "3"},
  {"prompt": "Once", "completion": " upon", "ended": False},
  {
    "messages": [
      {"role": "user", "content": "Hi"},
      {"role": "assistant", "content": "b"},
    ]
  },
  {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "b"}]},
  {"text": "All of it."},
]


@dataclasses.dataclass(frozen=True)
class Materials:
  """Files by name, of one folder each; the GGUF file's bytes."""

  model: dict[str, bytes]
  adapter: dict[str, bytes]
  prepared: dict[str, bytes]
  cache: dict[str, bytes]
  gguf: bytes
  parquet: bytes
  arrow: bytes
  config: models.ModelConfig


@functools.cache
def materials() -> Materials:
  """All of them, made once a process."""
  assert writes()
  config = models.ModelConfig(
    vocab_size=320, hidden_size=8, num_layers=2, num_heads=2, max_length=64
  )
  tokenizer = make_tokenizer("bpe:300", [Record("text", "f", text="the cat " * 9)])
  draw = np.random.default_rng(0)  # where `models.init` would compile
  shapes = models.parameter_shapes(config)
  flat = {name: draw.normal(size=x.shape).astype("f4") for name, x in shapes.items()}
  params = traverse_util.unflatten_dict(flat, sep="/")
  lora = adapters.Lora(rank=2)
  tree = {
    "layers": {
      "attention": {
        name: {"down": np.ones((2, 8, 2), "f4"), "up": np.ones((2, 2, 8), "f4")}
        for name in lora.targets
      }
    }
  }
  with tempfile.TemporaryDirectory() as folder:
    place = Path(folder)
    models.save(place / "model", params, config, tokenizer)
    models.save_gguf(place / "m.f32.gguf", params, config, tokenizer)
    models.save_adapter(place / "adapter", tree, lora, config, "base")
    _prepared(place / "prepared", tokenizer)
    _cache(place / "cache")
    kinds = ("model", "adapter", "prepared", "cache")
    found = {kind: _files(place / kind) for kind in kinds}
    return Materials(
      gguf=(place / "m.f32.gguf").read_bytes(), config=config, **found, **_tables()
    )


def _files(folder: Path) -> dict[str, bytes]:
  return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}


def _prepared(folder: Path, tokenizer: object) -> None:
  folder.mkdir()
  record = Record("completion", "f:1", prompt="Once", references=(" upon",))
  batch = rows.to_batch(encode(record, tokenizer) * 3, [0, 0, 0])
  rows.write(str(folder), [batch, batch], lambda: {"counts": {"rows": 6}})


def _cache(folder: Path) -> None:
  kept = store.begin(folder, 4, KEY)
  row = {"ids": np.ones((3, 2), np.int32), "log_probs": np.ones((3, 2), np.float32)}
  kept.write([0, 1], [row, row])
  kept.write([2, 3], [row, row])


def _tables() -> dict[str, bytes]:
  table = pa.Table.from_pylist([ROWS[0]] * 3 + [{"instruction": "a", "output": "b"}])
  parquet, arrow = io.BytesIO(), io.BytesIO()
  pq.write_table(table, parquet)
  with pa.ipc.new_file(arrow, table.schema) as writer:
    writer.write_table(table)
  return {"parquet": parquet.getvalue(), "arrow": arrow.getvalue()}


def lines(values: list) -> bytes:
  """JSON lines; what JSON cannot say is said as Python does."""
  return "".join(json.dumps(value) + "\n" for value in values).encode()
