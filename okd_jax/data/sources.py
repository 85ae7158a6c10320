"""Reads records from files, folders, the Hugging Face hub or the embedded data.

Whatever a record looks like on disk, it leaves here checked and as one `Record`
that knows which file and line it came from. Nothing is skipped but blank lines: a
row that cannot be used is an error that names it.
"""

from collections.abc import Iterator, Mapping, Sequence

from okd_jax.data.files import shards
from okd_jax.data.record import Record, parse_record, references_of
from okd_jax.data.shard import Row, Shard
from okd_jax.errors import UserError

__all__ = [
  "Record",
  "called",
  "iter_records",
  "load_records",
  "parse_record",
  "read_predictions",
  "read_references",
  "read_rows",
  "shards_of",
  "source_list",
]

Spec = str | Sequence[object]  # from a config: that all are names is checked here

_NAMED = 3  # sources in a message


def load_records(
  spec: Spec, *, prompts: bool = False, columns: Mapping[str, str] | None = None
) -> list[Record]:
  """Reads every record of one source or of several, in the order given.

  Args:
    spec: a file (`.jsonl`, `.json`, `.csv`, `.tsv`, `.txt`, each also `.gz` or `.zst`,
      `.parquet`, `.arrow`), a folder of such files or one written by `save_to_disk`, a
      pattern such as `data/*.jsonl`, a hub id, or `embedded`; or a list of these.
      Folders and ids take `:split`, ids `@config` too (`id@config:split`).
    prompts: whether rows may do without an answer.
    columns: what the rows call our keys, {'prompt': 'question'} for one.

  Returns:
    The records, each with the file and line that it came from.

  Raises:
    UserError: if a source is missing or a row unusable; it names file and line.

  Source: the forms are those of Alpaca and Dolly (instruction), of TRL (completion,
  messages), of ShareGPT (messages) and of language modelling (text).

  >>> import tempfile
  >>> with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
  ...   _ = file.write('{"prompt": "1 + 1 =", "completion": " 2"}')
  ...   file.flush()
  ...   [record] = load_records(file.name)
  >>> record.kind, record.prompt, record.references
  ('completion', '1 + 1 =', (' 2',))
  """
  return list(iter_records(spec, prompts=prompts, columns=columns))


def iter_records(
  spec: Spec, *, prompts: bool = False, columns: Mapping[str, str] | None = None
) -> Iterator[Record]:
  """The records of `load_records`, read as they are asked for."""
  for shard in shards_of(spec):
    for row, where in shard.rows():
      yield parse_record(row, where, prompts=prompts, columns=columns)


def source_list(spec: str | Sequence[str]) -> list[str]:
  """The sources in a comma-separated text, or in a list, whose names may have commas.

  >>> source_list("a.jsonl, b/*.parquet"), source_list(["a,b.csv"])
  (['a.jsonl', 'b/*.parquet'], ['a,b.csv'])
  """
  if isinstance(spec, str):
    return [part.strip() for part in spec.split(",") if part.strip()]
  return list(spec)


def called(sources: Sequence[str]) -> str:
  """Sources for people to read.

  >>> called(["a", "b"]), called(["a", "b", "c", "d", "e"])
  ('a, b', 'a, b, c and 2 more')
  """
  more = f" and {len(sources) - _NAMED} more" if len(sources) > _NAMED + 1 else ""
  return ", ".join(sources[:_NAMED] if more else sources) + more


def read_references(spec: Spec) -> list[tuple[str, ...]]:
  """The references of every row alone; the rows need not hold a prompt."""
  return [references_of(row, where) for row, where in read_rows(spec)]


def read_predictions(path: str) -> list[str]:
  """The `text` of every line; an empty answer is an answer, and scores nothing."""
  predictions = []
  for row, where in read_rows(path):
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
      raise UserError(f'{where}: a prediction must look like {{"text": "..."}}')
    predictions.append(row["text"])
  return predictions


def read_rows(spec: Spec) -> list[Row]:
  """Raw rows of one source or several, each with its place; none may be empty."""
  return [row for shard in shards_of(spec) for row in shard.rows()]


def shards_of(spec: Spec, streamed: bool = False) -> list[Shard]:
  """The shards of one source or several, in their order; see `files.shards`.

  Raises:
    UserError: if nothing is named, or a source is not there.
  """
  sources = [spec] if isinstance(spec, str) else list(spec)
  if not sources or not all(isinstance(s, str) and s.strip() for s in sources):
    raise UserError(
      f"{spec!r} names no data; give a path, a hub id, 'embedded', or a list of them"
    )
  return [shard for source in sources for shard in shards(source, streamed)]
