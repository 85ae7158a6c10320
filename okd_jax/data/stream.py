"""Batches of a text corpus that is read as they are asked for, never as a whole.

Texts are tokenised on the fly and cut into windows of a row's length; what is shorter
shares rows, in its order. Shards come in another order each epoch, rows are shuffled
in blocks. A position is a small dict: where the block began, and how far in it we are.
Every process reads all of it, so that batches do not depend on how many there are.
"""

import collections
import concurrent.futures
import copy
import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from transformers import PreTrainedTokenizerBase

from okd_jax.data.encode import make_encoder
from okd_jax.data.example import Example
from okd_jax.data.limits import Form
from okd_jax.data.loader import Batch
from okd_jax.data.pack import pack_row, positions
from okd_jax.data.shard import Shard, digest_of_text
from okd_jax.data.sources import Record, parse_record
from okd_jax.data.tokenizer import check_largest
from okd_jax.errors import UserError

BLOCK = 1024  # rows that are shuffled among themselves
_RECORDS = 64  # texts that are tokenised at once
# Branches of the seed's draws: in which order shards come, and rows of a block.
_SHARDS, _ROWS = 0, 1

Texts = tuple[Example, ...]  # of one row


@dataclasses.dataclass(frozen=True)
class Place:
  """What is read next: a piece of a record, of a shard by its place in the epoch."""

  epoch: int = 0
  shard: int = 0
  record: int = 0
  piece: int = 0


@dataclasses.dataclass(frozen=True)
class Begin:
  """Where a block begins, and what texts of before have no full row yet."""

  place: Place = Place()
  open: Texts = ()
  block: int = 0

  def state(self) -> dict[str, Any]:
    """The same as JSON takes it."""
    texts = [[e.where, e.tokens.tolist()] for e in self.open]
    return {"place": vars(self.place), "open": texts, "block": self.block}

  @classmethod
  def of(cls, state: Mapping[str, Any]) -> "Begin":
    """What `state` gave."""
    texts = tuple(_text(np.array(ids, np.int32), w) for w, ids in state["open"])
    return cls(Place(**state["place"]), texts, state["block"])


@dataclasses.dataclass(frozen=True)
class Block:
  """Rows that are shuffled among themselves.

  rows: in the order of their reading.
  order: the one in which they come.
  end: where the next block begins.
  """

  number: int
  rows: list[Texts]
  order: Int[np.ndarray, " N"]
  end: Begin


def _text(tokens: Int[np.ndarray, " L"], where: str) -> Example:
  return Example(tokens, 0, (), where, kind="text")


@dataclasses.dataclass(frozen=True)
class Corpus:
  """A corpus and how its texts become rows.

  shards: at least one.
  length: of a row.
  sizes: the vocabularies that must hold its ids, by what a message calls them.
  renames: what its rows call our keys.
  """

  shards: Sequence[Shard]
  tokenizer: PreTrainedTokenizerBase
  length: int
  seed: int
  sizes: Mapping[str, int]
  renames: Mapping[str, str] = dataclasses.field(default_factory=dict)

  @property
  def digest(self) -> str:
    """Of the names and sizes of the shards: to read them all would take hours."""
    return digest_of_text(map(_name_and_size, self.shards))

  def blocks(self, begin: Begin) -> Iterator[Block]:
    """Block after block, without an end.

    Raises:
      UserError: for a row that cannot be used.
    """
    rows = self._rows(begin)
    for number in itertools.count(begin.block):
      found = list(itertools.islice(rows, BLOCK))
      texts, (_, place, open_) = [row for row, *_ in found], found[-1]
      largest = max(int(e.tokens.max()) for row in texts for e in row)
      check_largest(self.sizes, largest)
      draw = np.random.default_rng((self.seed, _ROWS, number))
      end = Begin(place, open_, number + 1)
      yield Block(number, texts, draw.permutation(BLOCK), end)

  def _rows(self, begin: Begin) -> Iterator[tuple[Texts, Place, Texts]]:
    """(a row's texts, what is read after it, what is open then)."""
    open_ = begin.open
    for piece, place in self._pieces(begin.place):
      if len(piece.tokens) >= self.length:  # a window alone; the others still wait
        yield (piece,), place, open_
      elif sum(map(positions, (*open_, piece))) > self.length:
        full, open_ = open_, (piece,)
        yield full, place, open_
      else:
        open_ = (*open_, piece)

  def _pieces(self, place: Place) -> Iterator[tuple[Example, Place]]:
    """(a window or a short text, what is read after it), epoch after epoch."""
    for epoch in itertools.count(place.epoch):
      draw = np.random.default_rng((self.seed, _SHARDS, epoch))
      order = draw.permutation(len(self.shards))
      for i in range(place.shard, len(order)):
        for record, piece, example in self._of_shard(self.shards[order[i]], place):
          yield example, Place(epoch, i, record, piece + 1)
        place = Place(epoch, i + 1)
      place = Place(epoch + 1)

  def _of_shard(self, shard: Shard, place: Place) -> Iterator[tuple[int, int, Example]]:
    """(number of the record, of the piece in it, piece), what was read left out."""
    encoder = make_encoder(self.tokenizer, Form(max_length=self.length))
    rows = itertools.islice(enumerate(shard.rows()), place.record, None)
    while chunk := list(itertools.islice(rows, _RECORDS)):
      records = [self._record(row, where) for _, (row, where) in chunk]
      examples, _ = encoder(records, chunk[0][0])  # numbers them from there
      for number, pieces in itertools.groupby(examples, key=lambda e: e.number):
        done = place.piece if number == place.record else 0
        for piece, example in itertools.islice(enumerate(pieces), done, None):
          yield number, piece, example

  def _record(self, row: object, where: str) -> Record:
    record = parse_record(row, where, columns=self.renames)
    if not record.is_text:
      raise UserError(
        f"{where}: data.stream reads plain texts, but this row has a prompt; set "
        "data.stream=False"
      )
    return record


def _name_and_size(shard: Shard) -> str:
  """Of files; of a data set on the hub, its revision."""
  path = Path(shard.name)
  if path.is_file():
    return f"{path.name} {path.stat().st_size}"
  if path.is_dir():
    found = sorted(p for p in path.iterdir() if p.is_file())
    return " ".join(f"{p.name} {p.stat().st_size}" for p in found)
  return f"{shard.name} {shard.digest()}"


class Stream:
  """Batches of this process's rows, with a position that is saved and restored.

  Global batch n is the same for any number of processes. A batch is as `train_loader`
  has it; its rows are numbered in the order in which they are read, block after block.

  own: which rows of a batch are this process's; None: all.
  """

  def __init__(
    self,
    corpus: Corpus,
    *,
    batch_size: int,
    pad_id: int,
    own: Int[np.ndarray, " M"] | None = None,
  ):
    if batch_size < 1:
      raise ValueError(f"batch size {batch_size} is none")
    # A tokenizer is no thread's but its own: "Already borrowed" it says to others.
    tokenizer = copy.deepcopy(corpus.tokenizer)
    self._corpus = dataclasses.replace(corpus, tokenizer=tokenizer)
    self._size, self._pad = batch_size, pad_id
    self._own = np.arange(batch_size) if own is None else own
    self._ahead = concurrent.futures.ThreadPoolExecutor(1, "okd_jax stream")
    self._recent: collections.deque = collections.deque(maxlen=3)
    self.set_state({"begin": Begin().state(), "at": 0})

  def __iter__(self) -> "Stream":
    return self

  def __next__(self) -> Batch:
    rows = [self._next_row() for _ in range(self._size)]
    texts = [rows[i][1] for i in self._own]
    made = [pack_row(row, self._corpus.length, self._pad) for row in texts]
    batch = {name: np.stack([row[name] for row in made]) for name in made[0]}
    numbers = np.array([number for number, _ in rows])
    return batch | {"row": numbers[self._own], "all_rows": numbers}

  def first(self) -> list[Texts]:
    """The rows of the block that the next row is of, in the order of their reading."""
    return self._block().rows

  @property
  def digest(self) -> str:
    """See `Corpus.digest`."""
    return self._corpus.digest

  @property
  def shards(self) -> int:
    """How many there are."""
    return len(self._corpus.shards)

  def where(self, row: int) -> str:
    """Where a row comes from, if it is of the last blocks."""
    for block in self._recent:
      if block.number == row // BLOCK:
        first, *others = (e.where for e in block.rows[row % BLOCK])
        return first + (f" and {len(others)} texts with it" if others else "")
    return f"row {row} of the stream"

  def get_state(self) -> dict[str, Any]:
    """The position, as JSON takes it."""
    if self._now and self._at == BLOCK:  # so that nothing of it is made again
      return {"begin": self._now.end.state(), "at": 0}
    return {"begin": self._begin.state(), "at": self._at}

  def set_state(self, state: Mapping[str, Any]) -> None:
    """Goes on at the row behind a position."""
    self._begin, self._at = Begin.of(state["begin"]), state["at"]
    self._blocks = self._corpus.blocks(self._begin)
    self._now: Block | None = None
    self._next: concurrent.futures.Future | None = None

  def _next_row(self) -> tuple[int, Texts]:
    if self._at == BLOCK:
      self._begin, self._at, self._now = self._block().end, 0, None
    block = self._block()
    row = int(block.order[self._at])
    self._at += 1
    return block.number * BLOCK + row, block.rows[row]

  def _block(self) -> Block:
    """The block that is read, the one behind it being made meanwhile."""
    if self._now is None:
      self._now = (self._next or self._read()).result()
      self._recent.append(self._now)
      self._next = self._read()
    return self._now

  def _read(self) -> concurrent.futures.Future:
    return self._ahead.submit(functools.partial(next, self._blocks))
