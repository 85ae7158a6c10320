"""Phase 3, data: training and held-out rows in the tokens of one tokenizer or two."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from okd_jax.config.schema import DataSettings, EvalSettings
from okd_jax.data import (
  Example,
  Record,
  check_vocabulary,
  each_alone,
  load_records,
  pack,
  pair,
  positions,
  prepare,
  shared_text,
  show_example,
)
from okd_jax.data.hold_out import hold_out
from okd_jax.data.sources import called
from okd_jax.errors import UserError
from okd_jax.run.outline import Outline

_log = logging.getLogger(__name__)

Pack = tuple[int, ...]  # the texts of one row, by their indices


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
  """

  packs: Sequence[Pack] = ()
  other: Reading | None = None

  def where(self, rows: np.ndarray) -> str:
    """Where some rows of packs come from; a packed one says how many texts it holds."""
    named = []
    for row in rows[:8]:
      first, *others = self.packs[row]
      more = f" and {len(others)} texts with it" if others else ""
      named.append(self.train[first].where + more)
    return ", ".join(named) + (", …" if len(rows) > 8 else "")


def read_data(
  data: DataSettings,
  evaluation: EvalSettings,
  outline: Outline,
  records: Sequence[Record],
) -> Data:
  """Training and evaluation rows; without data.eval, some are held out.

  Raises:
    UserError: for rows that cannot be used, or tokens that a model does not have.
  """
  readers = [(outline.tokenizer, "")]
  if outline.teacher_tokenizer is not None:
    readers.append((outline.teacher_tokenizer, ", in the teacher's tokens"))
    records = shared_text(records, [own for own, _ in readers])
  rows = [_training_rows(data, *reader, records) for reader in readers]
  if len(rows) > 1:
    rows = pair(*rows)
  chosen = None if data.eval_sources else _held_out(data, rows[0])
  own, *other = [
    _with_held_out(data, evaluation, *reader, train, chosen)
    for reader, train in zip(readers, rows, strict=True)
  ]
  _log.info(
    "first row, trained part marked:\n%s", show_example(own.train[0], own.tokenizer)
  )
  other = other[0] if other else None
  _check_tokens(outline, own, other)
  packs = make_packs(data, own.train)
  return Data(own.tokenizer, own.train, own.eval, packs, other)


def make_packs(data: DataSettings, train: Sequence[Example]) -> list[Pack]:
  """Which texts share a row: with `data.pack` as many as fit, else each has its own."""
  lengths, length = np.array([positions(e) for e in train]), data.max_length
  packs = pack(lengths, length) if data.pack else each_alone(train)
  _log.info(
    "%d texts in %d rows of %d tokens, %.1f %% of them padding",
    len(train),
    len(packs),
    length,
    100 * (1 - lengths.sum() / (length * len(packs))),
  )
  return packs


def _check_tokens(outline: Outline, own: Reading, other: Reading | None) -> None:
  sizes = {name: config.vocab_size for name, config in outline.teachers.items()}
  if other:
    check_vocabulary(_called(sizes), [*other.train, *other.eval])
    sizes = {}
  sizes = {"student": outline.student.vocab_size} | _called(sizes)
  check_vocabulary(sizes, [*own.train, *own.eval])


def _called(teachers: Mapping[str, Any]) -> dict[str, Any]:
  """The teachers by what a message calls them."""
  if len(teachers) == 1:
    return {"teacher": next(iter(teachers.values()))}
  return {f"teacher {name}": value for name, value in teachers.items()}


def _options(data: DataSettings) -> dict[str, Any]:
  keys = ("template", "max_length", "max_prompt_length")
  return {key: getattr(data, key) for key in keys}


def _training_rows(
  data: DataSettings,
  tokenizer: PreTrainedTokenizerBase,
  note: str,
  records: Sequence[Record],
) -> list[Example]:
  rows, _ = prepare(
    records,
    tokenizer,
    overlong_prompt=data.overlong_prompt,
    overlong_row=data.overlong_row,
    name=called(data.sources) + note,
    **_options(data),
  )
  return rows


def _held_out(
  data: DataSettings, train: Sequence[Example]
) -> tuple[list[int], list[int]]:
  """(rows to train on, rows held out)."""
  if not 0 < data.holdout < len(train):
    raise UserError(
      f"data.holdout={data.holdout} must be at least 1 and less than the "
      f"{len(train)} rows of {called(data.sources)}; or set data.eval"
    )
  rest, held_out, same = hold_out(train, data.holdout, data.holdout_seed)
  if same and same == len(train) - len(held_out):
    _log.warning("all %d rows are the same as one held out: they are trained on", same)
  elif same:
    _log.info("%d rows are left out: each is the same as one held out", same)
  return rest, held_out


def _with_held_out(
  data: DataSettings,
  evaluation: EvalSettings,
  tokenizer: PreTrainedTokenizerBase,
  note: str,
  train: Sequence[Example],
  chosen: tuple[Sequence[int], Sequence[int]] | None,
) -> Reading:
  """Evaluation rows beside those to train on, or the rows `chosen` for the two."""
  if chosen is None:
    held_out, _ = prepare(
      load_records(data.eval_sources, columns=data.renames)[: evaluation.limit or None],
      tokenizer,
      overlong_prompt="truncate",
      overlong_row="truncate",
      name=called(data.eval_sources) + note,
      **_options(data),
    )
  else:
    train, held_out = ([train[i] for i in rows] for rows in chosen)
  return Reading(tokenizer, train, held_out[: evaluation.limit or None])
