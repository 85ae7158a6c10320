"""Rows of .parquet and .arrow files, a batch at a time."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from okd_jax.data import unpack
from okd_jax.data.shard import Row
from okd_jax.data.values import cause
from okd_jax.errors import UserError

_BATCH = 1000  # rows in memory at once
_FILE = b"ARROW1"  # what Arrow files that are no streams begin with


def read_parquet(path: Path) -> Iterator[Row]:
  """Rows of a parquet file.

  Raises:
    UserError: if it cannot be read.
  """
  return _read(path, _parquet_batches)


def read_arrow(path: Path) -> Iterator[Row]:
  """Rows of an Arrow file, or of a stream in a file, as `datasets` keeps them.

  Raises:
    UserError: if it cannot be read.
  """
  return _read(path, _arrow_batches)


def _read(path: Path, batches: Any) -> Iterator[Row]:
  import pyarrow  # here, since it takes a moment that jsonl need not wait

  unpack.check_no_pointer(path)
  number = 0
  try:
    for schema, batch in batches(path):
      batch.validate(full=True)  # else a wrong offset ends the process
      decode = _decoder(schema)
      for row in batch.to_pylist():
        number += 1
        yield decode(row), f"{path} row {number}"
  except UserError:
    raise
  # ValueError, OverflowError: text that is no UTF-8, a date that Python has not.
  except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
    place = f"{path}: what follows row {number}" if number else path
    raise UserError(f"{place}: cannot be read ({cause(error)})") from error


def _parquet_batches(path: Path) -> Iterator[tuple[Any, Any]]:
  import pyarrow.parquet

  with pyarrow.parquet.ParquetFile(path) as file:
    for batch in file.iter_batches(_BATCH):
      yield file.schema_arrow, batch


def _arrow_batches(path: Path) -> Iterator[tuple[Any, Any]]:
  import pyarrow

  with pyarrow.memory_map(str(path)) as file:
    if file.read(len(_FILE)) == _FILE:
      reader = pyarrow.ipc.open_file(file)
      batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
    else:
      file.seek(0)
      batches = reader = pyarrow.ipc.open_stream(file)
    for batch in batches:
      for start in range(0, batch.num_rows, _BATCH):
        yield reader.schema, batch.slice(start, _BATCH)


def _decoder(schema: Any) -> Any:
  """What `datasets` has written as JSON text, since its rows' keys differ, is read."""
  if b'"Json"' not in (schema.metadata or {}).get(b"huggingface", b""):
    return lambda row: row
  import datasets

  return datasets.Features.from_arrow_schema(schema).decode_example
