"""Tokenised rows that are kept: made once, found again by what they were made of.

What they depend on (the data's bytes, tokenizer, template, limits, this code) gives a
folder its name. One that is there is whole, since it is written beside and renamed, and
whoever else wants it waits meanwhile.
"""

import contextlib
import dataclasses
import datetime
import functools
import hashlib
import importlib.metadata
import itertools
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import filelock
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from okd_jax.data import day, rows, workers
from okd_jax.data.encode import BATCH, Tally, counted, make_encoder
from okd_jax.data.format import template_text
from okd_jax.data.limits import Counts, Form, summary
from okd_jax.data.pairing import cleaned
from okd_jax.data.rows import Batch, Rows
from okd_jax.data.shard import Shard
from okd_jax.data.sources import Record, parse_record
from okd_jax.data.tokens import words
from okd_jax.errors import UserError
from okd_jax.runtime import files
from okd_jax.runtime.files import local

_log = logging.getLogger("okd_jax")

HERE = 20 * BATCH  # records; more than that is worth other processes
# What a folder of rows holds, and no other files.
OURS = re.compile("|".join(map(re.escape, rows.FILES)))

Parse = Callable[[object, str], Record]
Raw = tuple[int, list[tuple[object, str, int]]]  # first number, (row, where, file)


@dataclasses.dataclass(frozen=True)
class Making:
  """All that decides how raw rows become tokens.

  parse: turns a raw row into a record.
  others: tokenizers that read the same records, whose end tokens are no text either.
  """

  tokenizer: PreTrainedTokenizerBase
  form: Form
  parse: Parse = parse_record
  others: Sequence[PreTrainedTokenizerBase] = ()

  def about(self) -> dict[str, Any]:
    """Everything, in words that can be compared."""
    template, tokenizer = self.form.template, self.tokenizer
    dated = day.names_the_day(tokenizer, template, self.form.teacher_template)
    parse = getattr(self.parse, "keywords", {})
    return {
      "tokenizer": _short(words(tokenizer)),
      "others": [_short(words(other)) for other in self.others],
      "template": _short(template_text(template, tokenizer)),
      "teacher_template": _short(template_text(self.form.teacher_template, tokenizer)),
      "day": day.day().isoformat() if dated else "",
      "form": dataclasses.asdict(self.form),
      "parse": json.loads(json.dumps(parse, sort_keys=True, default=list)),
      "code": _code(),
      "versions": {n: importlib.metadata.version(n) for n in _LIBRARIES},
    }


_LIBRARIES = ("transformers", "tokenizers")


def keep(
  shards: Sequence[Shard], making: Making, name: str, processes: int = 1
) -> tuple[Rows, dict[str, Any]]:
  """The rows of all shards, found in the cache or made and kept there.

  Args:
    name: what the log calls them.
    processes: that tokenise, where there are many rows; 0 is as many as there are CPUs.

  Returns:
    (rows in the order of the records, what is known of them all): 'counts', what
    became of the records; 'largest', of all token ids; the 'kinds' of records; the
    names of 'sources'.

  Raises:
    UserError: if no row is left, one cannot be used, or nothing can be written.
  """
  about = making.about() | {"data": [[s.name, s.digest()] for s in shards]}
  folder = cache() / _short(json.dumps(about, sort_keys=True))
  found = _opened(folder)
  if found is None:
    try:
      folder.parent.mkdir(parents=True, exist_ok=True)
      with alone(Path(f"{folder}.lock")):
        found = _opened(folder) or _made(folder, shards, making, about, processes)
    except OSError as error:
      raise UserError(
        f"{folder}: the tokenised rows cannot be kept ({error}); make room, or name "
        "another folder by the variable OKD_JAX_ROWS"
      ) from error
  counts = Counts(**found[1]["counts"])
  _log.info("%s: %s", name, summary(counts, making.form))
  return found


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
  """While no other process holds this lock; whoever waits is told."""
  lock = filelock.FileLock(path)
  try:
    lock.acquire(timeout=0)
  except filelock.Timeout:
    _log.info("another process tokenises the same rows: waiting for it")
    lock.acquire()
  try:
    yield
  finally:
    lock.release()


def cache() -> Path:
  """Where rows are kept; whoever deletes it loses nothing but time."""
  own = os.environ.get("OKD_JAX_ROWS")
  return local(own) if own else files.cache_folder() / "rows"


def _opened(folder: Path) -> tuple[Rows, dict[str, Any]] | None:
  """What is kept in the folder, None if that is nothing or cannot be read."""
  if not folder.is_dir():
    return None
  try:
    about = rows.read_about(str(folder))
    Counts(**about["counts"])
    return rows.open_rows(str(folder)), about
  except (UserError, KeyError, TypeError) as error:
    _log.warning("%s: damaged (%s), made anew", folder, error)
    return None


def _made(
  folder: Path,
  shards: Sequence[Shard],
  making: Making,
  about: Mapping[str, Any],
  processes: int,
) -> tuple[Rows, dict[str, Any]]:
  with files.replacing(folder, OURS) as partial:
    write(partial, shards, making, about, processes)
  return rows.open_rows(str(folder)), rows.read_about(str(folder))


def write(
  folder: Path,
  shards: Sequence[Shard],
  making: Making,
  about: Mapping[str, Any],
  processes: int,
) -> None:
  """Makes the rows of all shards and writes them into a folder.

  Raises:
    UserError: as `keep`.
  """
  total, kinds = _Total(), set()

  def batches() -> Iterator[Batch]:
    """Batches of rows, counted as they pass."""
    hidden = not sys.stderr.isatty()
    with tqdm(desc="tokenising", unit=" rows", delay=2, disable=hidden) as bar:
      for part in _parts(shards, making, processes):
        total.add(part)
        kinds.update(part.kinds)
        bar.update(part.records)
        if len(part.batch[0]):
          yield part.batch

  def said() -> dict[str, Any]:
    counts = dataclasses.asdict(total.counts(making.form))
    facts = {"counts": counts, "largest": total.largest, "kinds": sorted(kinds)}
    return {**about, "sources": [shard.name for shard in shards], **facts}

  rows.write(str(folder), batches(), said)


@dataclasses.dataclass(frozen=True)
class _Part:
  """What became of some records that were encoded together."""

  batch: Batch
  records: int
  tally: Tally
  largest: int
  kinds: set[str]


@dataclasses.dataclass
class _Total:
  """Sums over all parts."""

  records: int = 0
  kept: int = 0
  largest: int = 0
  tally: Tally = dataclasses.field(default_factory=Tally)

  def add(self, part: _Part) -> None:
    self.records += part.records
    self.kept += len(part.batch[0])
    self.largest = max(self.largest, part.largest)
    self.tally += part.tally

  def counts(self, form: Form) -> Counts:
    return counted(self.tally, self.records, self.kept, form)


def _parts(shards: Sequence[Shard], making: Making, processes: int) -> Iterator[_Part]:
  """All parts in order: the first here, and many more by other processes."""
  count = processes or len(os.sched_getaffinity(0))
  chunks, arguments = _chunks(shards), (making, day.day())
  if count == 1:
    yield from map(_maker(*arguments), chunks)
    return
  yield from map(_maker(*arguments), itertools.islice(chunks, HERE // BATCH))
  for first in chunks:  # there is at least one more
    rest = itertools.chain([first], chunks)
    yield from workers.mapped(_maker, arguments, rest, count)


def _chunks(shards: Sequence[Shard]) -> Iterator[Raw]:
  """Raw rows of all shards, as many at a time as are encoded at once."""
  numbered = (
    (row, where, i) for i, shard in enumerate(shards) for row, where in shard.rows()
  )
  for first in itertools.count(0, BATCH):
    chunk = list(itertools.islice(numbered, BATCH))
    if not chunk:
      return
    yield first, chunk


def _maker(making: Making, today: datetime.date) -> Callable[[Raw], _Part]:
  """The function that makes a part of raw rows, here or in another process."""
  encoder = make_encoder(making.tokenizer, making.form)
  tokenizers = [making.tokenizer, *making.others]

  def make(raw: Raw) -> _Part:
    """The rows of some raw ones, and what became of them."""
    first, chunk = raw
    records = [making.parse(row, where) for row, where, _ in chunk]
    if making.others:
      records = [cleaned(record, tokenizers) for record in records]
    with day.written_on(today):
      examples, tally = encoder(records, first)
    return _Part(
      rows.to_batch(examples, [chunk[e.number - first][2] for e in examples]),
      len(records),
      tally,
      max((int(e.tokens.max()) for e in examples), default=0),
      {e.kind for e in examples},
    )

  return make


@functools.cache
def _code() -> str:
  """A digest of the code that makes rows: other code may make others."""
  folder = Path(__file__).parent
  return _short("".join(p.read_text("utf-8") for p in sorted(folder.glob("*.py"))))


def _short(text: str) -> str:
  return hashlib.sha256(text.encode()).hexdigest()[:16]
