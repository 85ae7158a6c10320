"""Rows in Arrow files: read one by one, never as a whole.

    DIR/index.arrow  of each row what a run asks of all at once, some 40 bytes
    DIR/rows.arrow   tokens and texts, in batches that are read where one is asked for
    DIR/about.json   what the rows were made of, and what became of the records

Local files are mapped into memory; of others, such as gs://, the batches that are asked
for are read.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
from jaxtyping import Int, Shaped

from okd_jax.data.example import Example
from okd_jax.errors import UserError
from okd_jax.runtime.files import local, parse_json

_IDS = pa.list_(pa.int32())
INDEX = pa.schema(
  [
    ("length", pa.int32()),
    ("prompt_length", pa.int32()),
    ("teacher_length", pa.int32()),  # with the teacher's own prompt; 0: it has none
    ("source", pa.int32()),  # the place of its file among the sources
    ("number", pa.int64()),  # of the record that it was made of
    ("key", pa.binary(16)),  # the same for rows that train the same tokens alike
  ]
)
CONTENT = pa.schema(
  [
    ("tokens", _IDS),
    ("trained", _IDS),  # starts and stops in turn; null for all behind the prompt
    ("teacher_prompt", _IDS),  # null for the prompt itself
    ("references", pa.list_(pa.string())),
    ("asked", pa.string()),
    ("where", pa.string()),
    ("kind", pa.string()),
  ]
)
FILES = ("index.arrow", "rows.arrow", "about.json")
_LISTS = ("tokens", "trained", "teacher_prompt")
_RECENT = 32  # batches whose columns stay at hand

Index = Mapping[str, Shaped[np.ndarray, " N"]]
Batch = tuple[pa.RecordBatch, pa.RecordBatch]  # of INDEX and of CONTENT


class Rows(Sequence[Example]):
  """Examples that lie in batches, or some of them in another order.

  index: the columns of `INDEX` by name.
  read: gives a batch of `CONTENT` by its number.
  ends: where each batch ends, in rows.
  chosen: numbers of rows; None for all.
  name: of the folder that they lie in, for messages.

  Raises:
    UserError: where a row is asked for that is not as it was written.
  """

  def __init__(
    self,
    index: Index,
    read: Callable[[int], pa.RecordBatch],
    ends: Sequence[int],
    chosen: Int[np.ndarray, " M"] | None = None,
    name: str = "",
  ):
    self._index, self._read, self._ends, self._chosen = index, read, ends, chosen
    self._name = name
    self._columns = functools.lru_cache(_RECENT)(self._split)

  def __len__(self) -> int:
    return len(self._index["length"] if self._chosen is None else self._chosen)

  def __getitem__(self, at: Any) -> Any:  # an Example; of a slice, Rows
    if isinstance(at, slice):
      return self.take(np.arange(len(self))[at])
    at = range(len(self))[at]  # counts from the end, or raises IndexError
    row = at if self._chosen is None else int(self._chosen[at])
    batch = int(np.searchsorted(self._ends, row, side="right"))
    columns = self._columns(batch)
    i = row - (int(self._ends[batch - 1]) if batch else 0)
    found = {
      name: _ids(column, i) if name in _LISTS else column[i].as_py()
      for name, column in columns.items()
    }
    trained = found.pop("trained")
    example = Example(
      prompt_length=int(self._index["prompt_length"][row]),
      number=int(self._index["number"][row]),
      trained=None if trained is None else _pairs(trained),
      references=tuple(found.pop("references")),
      **found,
    )
    if key(example) != self._index["key"][row].tobytes():
      raise self._damaged(f"row {row} is not as it was written")
    return example

  def __iter__(self) -> Iterator[Example]:
    return (self[i] for i in range(len(self)))

  def _split(self, batch: int) -> dict[str, Any]:
    """The columns of a batch by name; ids as (the lists, their values, offsets)."""
    start = int(self._ends[batch - 1]) if batch else 0
    try:
      own = self._read(batch)
      own.validate(full=True)  # else a wrong offset ends the process
    except (pa.ArrowException, ValueError, OSError) as error:
      raise self._damaged(str(error)) from error
    if len(own) != self._ends[batch] - start:
      raise self._damaged(f"batch {batch} has {len(own)} rows")
    columns = dict(zip(own.schema.names, own.columns, strict=True))
    for name in _LISTS:
      lists = columns[name]
      columns[name] = lists, lists.values.to_numpy(), lists.offsets.to_numpy()
    return columns

  def _damaged(self, why: str) -> UserError:
    return UserError(
      f"{self._name} holds damaged rows ({why}); delete the folder to have it made anew"
    )

  def take(self, rows: Sequence[int] | Int[np.ndarray, " M"]) -> "Rows":
    """These rows, in this order; nothing is copied but their numbers."""
    rows = np.asarray(rows, np.int64)
    chosen = rows if self._chosen is None else self._chosen[rows]
    return Rows(self._index, self._read, self._ends, chosen, self._name)

  def column(self, name: str) -> Shaped[np.ndarray, " N"]:
    """A column of the index."""
    whole = self._index[name]
    return whole if self._chosen is None else whole[self._chosen]


def _ids(
  column: tuple[pa.ListArray, np.ndarray, np.ndarray], i: int
) -> Int[np.ndarray, " T"] | None:
  """One list of a column, without a copy; None where it is null."""
  lists, values, offsets = column
  if lists.null_count and not lists[i].is_valid:
    return None
  return values[offsets[i] : offsets[i + 1]]


def _pairs(flat: Int[np.ndarray, " T"]) -> tuple[tuple[int, int], ...]:
  return tuple(zip(flat[::2].tolist(), flat[1::2].tolist(), strict=True))


# From examples to batches


def to_batch(examples: Sequence[Example], sources: Sequence[int]) -> Batch:
  """Examples as columns; sources: of each, the place of its file among them."""
  index = {
    "length": [len(e.tokens) for e in examples],
    "prompt_length": [e.prompt_length for e in examples],
    "teacher_length": [_teacher_length(e) for e in examples],
    "source": list(sources),
    "number": [e.number for e in examples],
    "key": [key(e) for e in examples],
  }
  content = {
    "tokens": [e.tokens for e in examples],
    "trained": [None if e.trained is None else np.ravel(e.trained) for e in examples],
    "teacher_prompt": [e.teacher_prompt for e in examples],
    "references": [list(e.references) for e in examples],
    "asked": [e.asked for e in examples],
    "where": [e.where for e in examples],
    "kind": [e.kind for e in examples],
  }
  return _batch(INDEX, index), _batch(CONTENT, content)


def _batch(schema: pa.Schema, columns: Mapping[str, list]) -> pa.RecordBatch:
  arrays = [pa.array(columns[field.name], field.type) for field in schema]
  return pa.record_batch(arrays, schema=schema)


def _teacher_length(example: Example) -> int:
  own = example.teacher_prompt
  return 0 if own is None else len(own) + len(example.tokens) - example.prompt_length


def key(example: Example) -> bytes:
  """16 bytes that two rows share only if they train the same tokens alike."""
  own = example.teacher_prompt
  head = [len(example.tokens), example.prompt_length, -1 if own is None else len(own)]
  parts = [np.array(head, "<i8"), np.asarray(example.tokens, "<i4")]
  parts += [] if own is None else [np.asarray(own, "<i4")]
  parts += [] if example.trained is None else [np.array(example.trained, "<i8")]
  found = hashlib.blake2b(digest_size=16)
  for part in parts:
    found.update(part.tobytes())
  return found.digest()


def of(examples: Sequence[Example], sources: Sequence[int] | None = None) -> Rows:
  """Examples as rows in memory; sources: the place of each one's file, 0 by default."""
  index, content = to_batch(examples, sources or [0] * len(examples))
  return Rows(_index(pa.table(index)), [content].__getitem__, [len(examples)])


# Files


def write(folder: str, batches: Iterable[Batch], about: Callable[[], dict]) -> None:
  """Writes a folder of rows.

  about: gives, after the last batch, what about.json is to say beside their ends.
  """
  ends, base = [0], str(folder)
  with (
    pa.OSFile(f"{base}/{FILES[0]}", "wb") as first,
    pa.OSFile(f"{base}/{FILES[1]}", "wb") as second,
    pa.ipc.new_file(first, INDEX) as index,
    pa.ipc.new_file(second, CONTENT) as content,
  ):
    for rows, texts in batches:
      index.write_batch(rows)
      content.write_batch(texts)
      ends.append(ends[-1] + len(rows))
  with open(f"{base}/{FILES[2]}", "w", encoding="utf-8") as file:
    json.dump({"ends": ends[1:], **about()}, file, indent=1)


def read_about(folder: str) -> dict[str, Any]:
  """What about.json says.

  Raises:
    UserError: if the folder holds no rows.
  """
  try:
    with fsspec.open(f"{place(folder)}/{FILES[2]}", "rb") as file:
      found = parse_json(file.read().decode())
    ends = found["ends"]
    whole = isinstance(ends, list) and all(type(end) is int for end in ends)
    if not whole or sorted({0, *ends}) != [0, *ends]:
      raise TypeError("its ends are no ascending numbers")
    return found
  except FileNotFoundError:
    raise UserError(f"{folder} holds no tokenised rows") from None
  except ImportError as error:  # of what reads gs:// or s3://
    raise UserError(f"{folder}: cannot be read ({error})") from error
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise UserError(f"{folder}/{FILES[2]} is damaged ({error})") from error


def open_rows(folder: str) -> Rows:
  """The rows of a folder, local or wherever fsspec reads from.

  Raises:
    UserError: if it holds none, or damaged ones.
  """
  ends = read_about(folder)["ends"]
  try:
    index, content = (
      pa.ipc.open_file(_opened(f"{place(folder)}/{name}")) for name in FILES[:2]
    )
    table = index.read_all()
    table.validate(full=True)
    columns = _index(table)
    if (index.schema, content.schema) != (INDEX, CONTENT):
      raise pa.ArrowInvalid("other columns than these")
    if len(columns["length"]) != (ends[-1] if ends else 0):
      raise pa.ArrowInvalid("rows are missing")
    if content.num_record_batches != len(ends):
      raise pa.ArrowInvalid("batches are missing")
  except (OSError, pa.ArrowException, KeyError, ValueError) as error:
    raise UserError(f"{folder} holds damaged rows ({error})") from error
  return Rows(columns, content.get_batch, ends, name=folder)


def place(folder: str) -> str:
  """Where a folder is: a local one as people write it, any other as fsspec names it."""
  return folder if "://" in folder else str(local(folder))


def _opened(path: str) -> Any:
  if "://" not in path:
    return pa.memory_map(path)
  return pa.PythonFile(fsspec.open(path, "rb").open(), mode="r")


def _index(table: pa.Table) -> dict[str, np.ndarray]:
  """The columns as arrays, the keys as 16 bytes each."""
  found = {name: table[name].to_numpy() for name in INDEX.names if name != "key"}
  keys = (
    chunk.buffers()[1].slice(16 * chunk.offset, 16 * len(chunk)).to_pybytes()
    for chunk in table["key"].chunks
    if len(chunk)
  )
  return found | {"key": np.frombuffer(b"".join(keys), "V16")}


# Of any examples


def column(examples: Sequence[Example], name: str) -> Shaped[np.ndarray, " N"]:
  """A column of the index, of rows or of any other examples."""
  found = examples if isinstance(examples, Rows) else of(examples)
  return found.column(name)


def digest(examples: Sequence[Example]) -> str:
  """64 hexadecimal digits of what all rows train, in their order."""
  return hashlib.sha256(column(examples, "key").tobytes()).hexdigest()


def privileged(examples: Sequence[Example]) -> bool:
  """Whether the teacher reads another prompt than the student in any row."""
  return bool(column(examples, "teacher_length").any())
