"""Phase 3, data: training and held-out rows in the tokens of one tokenizer or two."""

import dataclasses
import fnmatch
import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from okd_jax.config.schema import DataSettings, EvalSettings
from okd_jax.data import (
  Example,
  Record,
  Rows,
  each_alone,
  kept,
  pair,
  prepared,
  rows,
  show_example,
)
from okd_jax.data.hold_out import hold_out
from okd_jax.data.pack import packed
from okd_jax.data.sources import called, iter_records, parse_record, shards_of
from okd_jax.data.stream import Stream
from okd_jax.data.tokenizer import check_largest
from okd_jax.errors import UserError
from okd_jax.run.outline import Outline
from okd_jax.runtime.files import local

_log = logging.getLogger(__name__)

Pack = tuple[int, ...]  # the texts of one row, by their indices


@dataclasses.dataclass(frozen=True)
class Facts:
  """What became of the records, in the run's own tokens.

  train, eval: of each, what `kept.keep` knows; eval is None where rows of the former
    are held out.
  held_out: rows, before eval.limit.
  twins: rows that are not trained on, since each is the same as one held out.
  """

  train: Mapping[str, Any]
  eval: Mapping[str, Any] | None
  held_out: int
  twins: int = 0


@dataclasses.dataclass(frozen=True)
class Reading:
  """The data in one tokenizer's tokens."""

  tokenizer: PreTrainedTokenizerBase
  train: Sequence[Example]
  eval: Sequence[Example]


@dataclasses.dataclass(frozen=True)
class Data(Reading):
  """The rows of a run.

  packs: the texts of `train` that are one row: one or several.
  other: the same records in the teacher's own tokens, `train` row by row beside this
    one's; None where all models share one tokenizer.
  teacher_length: of the rows that the teacher reads, where its prompts are others than
    the student's; 0 where they are the same.
  facts: what became of the records; None for rows that somebody put together.
  stream: gives the batches to train on, where nobody has all rows (`run.streamed`).
  """

  packs: Sequence[Pack] = ()
  other: Reading | None = None
  teacher_length: int = 0
  facts: Facts | None = None
  stream: Stream | None = None

  @property
  def kinds(self) -> set[str]:
    """Of the records that `train` was made of."""
    if self.facts is None:
      return {example.kind for example in self.train}
    return set(self.facts.train["kinds"])

  def where(self, rows: np.ndarray) -> str:
    """Some rows of packs by their numbers, and where they come from.

    A packed one says how many texts it holds.
    """
    where = self.stream.where if self.stream else self._where
    named = [f"{row} ({where(int(row))})" for row in rows[:8]]
    return ", ".join(named) + (", …" if len(rows) > 8 else "")

  def _where(self, row: int) -> str:
    first, *others = self.packs[row]
    more = f" and {len(others)} texts with it" if others else ""
    return self.train[first].where + more


def read_data(
  data: DataSettings,
  evaluation: EvalSettings,
  outline: Outline,
  prompts: bool = False,
) -> Data:
  """Training and evaluation rows; without data.eval, some are held out.

  prompts: whether rows may be prompts alone.

  Raises:
    UserError: for rows that cannot be used, or tokens that a model does not have.
  """
  readers = [(outline.tokenizer, "")]
  if outline.teacher_tokenizer is not None:
    readers.append((outline.teacher_tokenizer, ", in the teacher's tokens"))
  train, held_out, facts = _both(data, outline, readers, prompts)
  own, *other = (
    Reading(tokenizer, own, out[: evaluation.limit or None])
    for (tokenizer, _), own, out in zip(readers, train, held_out, strict=True)
  )
  _log.info(
    "first row, trained part marked:\n%s", show_example(own.train[0], own.tokenizer)
  )
  packs = make_packs(data, own.train)
  apart = any(rows.privileged(part) for part in (own.train, own.eval))
  return Data(
    own.tokenizer,
    own.train,
    own.eval,
    packs,
    other[0] if other else None,
    data.form.teacher_length if apart else 0,
    facts,
  )


def records(data: DataSettings) -> Iterator[Record]:
  """The records that a tokenizer is trained on, where that is wanted."""
  return iter_records(data.sources, prompts=True, columns=data.renames)


def making(
  data: DataSettings,
  outline: Outline,
  prompts: bool,
  held_out: bool = False,
  tokenizer: PreTrainedTokenizerBase | None = None,
) -> kept.Making:
  """How rows to train on, or those held out, are made of records.

  tokenizer: the reader's own; None for the run's.
  """
  changes, others, tokenizer = {}, (), tokenizer or outline.tokenizer
  if outline.teacher_tokenizer is not None:
    both = (outline.tokenizer, outline.teacher_tokenizer)
    others = tuple(other for other in both if other is not tokenizer)
    changes["turns"] = "last"  # a record is one row, that its pair may be found
  if held_out:
    changes |= {"overlong_prompt": "truncate", "overlong_row": "truncate"}
  form = dataclasses.replace(data.form, **changes)
  parse = functools.partial(parse_record, prompts=prompts, columns=data.renames)
  return kept.Making(tokenizer, form, parse, others)


def _both(
  data: DataSettings,
  outline: Outline,
  readers: Sequence[tuple[PreTrainedTokenizerBase, str]],
  prompts: bool,
) -> tuple[Sequence[Rows], Sequence[Rows], Facts]:
  """(rows to train on, rows held out), of each reader, and what became of records."""
  read = functools.partial(read_part, data, outline)
  found = [read("train", prompts, *reader) for reader in readers]
  train, about = zip(*found, strict=True)
  if len(readers) > 1:
    train = pair(*train)
  if _has_eval(data):
    found = [read("eval", prompts, *reader) for reader in readers]
    out, about_eval = zip(*found, strict=True)
    return train, out, Facts(about[0], about_eval[0], len(out[0]))
  rest, out, twins = _held_out(data, train[0])
  both = zip(*((x.take(rest), x.take(out)) for x in train), strict=True)
  return *both, Facts(about[0], None, len(out), twins)


def _has_eval(data: DataSettings) -> bool:
  """Whether held-out rows are others than those of data.train."""
  there = data.prepared and prepared.holds(f"{data.prepared}/eval")
  return bool(there or data.eval_sources)


def make_packs(data: DataSettings, train: Sequence[Example]) -> Sequence[Pack]:
  """Which texts share a row: with `data.pack` as many as fit, else each has its own."""
  lengths, length = rows.column(train, "length") - 1, data.max_length
  if data.pack:
    # A row of the teacher's holds the same texts as that of the student.
    lengths = np.maximum(lengths, rows.column(train, "teacher_length") - 1)
    if lengths.max() > length:
      raise UserError(
        f"data.pack: rows of {length} tokens cannot hold the teacher's of "
        f"data.max_teacher_length={data.max_teacher_length}; set data.pack=False"
      )
    packs = packed(lengths, length)
  else:
    packs = each_alone(train)
  _log.info(
    "%d texts in %d rows of %d tokens, %.1f %% of them padding",
    len(train),
    len(packs),
    length,
    100 * (1 - lengths.sum() / (length * len(packs))),
  )
  return packs


def read_part(
  data: DataSettings,
  outline: Outline,
  part: str,
  prompts: bool = False,
  tokenizer: PreTrainedTokenizerBase | None = None,
  note: str = "",
) -> tuple[Rows, dict[str, Any]]:
  """Rows of 'train' or 'eval' in the tokens of one of the models, and their facts.

  note: what the log says beside the sources.
  """
  made = making(data, outline, prompts, part == "eval", tokenizer)
  if data.prepared and (part == "train" or prepared.holds(f"{data.prepared}/{part}")):
    found, facts = prepared.read(data.prepared, part, made)
    if part == "eval" and not all(_named(n, data) for n in facts["sources"]):
      _log.warning(
        "data.eval=%s is not read: the held-out rows are those of %s/eval, made of %s",
        called(data.eval_sources),
        data.prepared,
        called(facts["sources"]),
      )
  else:
    sources = data.sources if part == "train" else data.eval_sources
    name = called(sources) + note
    found, facts = kept.keep(shards_of(sources), made, name, data.num_proc)
  check_largest(sizes(outline, made.tokenizer), facts["largest"])
  return found, facts


def _named(name: str, data: DataSettings) -> bool:
  """Whether data.eval, if it is set, names a file or what holds it."""
  asked = [str(local(source)) for source in data.eval_sources] if data.eval else [name]
  return any(name.startswith(a) or fnmatch.fnmatch(name, a) for a in asked)


def sizes(outline: Outline, tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
  """The vocabularies that must hold this tokenizer's ids, by what a message calls."""
  found = _called({n: shape.vocab_size for n, shape in outline.teachers.items()})
  if outline.teacher_tokenizer is None:
    return {"student": outline.student.vocab_size} | found
  ours = tokenizer is outline.tokenizer
  return {"student": outline.student.vocab_size} if ours else found


def _called(teachers: Mapping[str, Any]) -> dict[str, Any]:
  """The teachers by what a message calls them."""
  if len(teachers) == 1:
    return {"teacher": next(iter(teachers.values()))}
  return {f"teacher {name}": value for name, value in teachers.items()}


def _held_out(data: DataSettings, train: Rows) -> tuple[np.ndarray, np.ndarray, int]:
  """(rows to train on, rows held out, how many others these leave out)."""
  if not 0 < data.holdout < len(train):
    raise UserError(
      f"data.holdout={data.holdout} must be at least 1 and less than the "
      f"{len(train)} rows of {data.prepared or called(data.sources)}; or set data.eval"
    )
  rest, held_out, same = hold_out(train, data.holdout, data.holdout_seed)
  if same and same == len(train) - len(held_out):
    _log.warning("all %d rows are the same as one held out: they are trained on", same)
    same = 0
  elif same:
    _log.info("%d rows are left out: each is the same as one held out", same)
  return rest, held_out, same
