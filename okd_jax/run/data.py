"""Training and held-out rows: the data in the tokens of one tokenizer, or of two."""

import dataclasses
import logging
from typing import Any

import numpy as np

from okd_jax.data import (
  Example,
  each_alone,
  load_records,
  pack,
  pair,
  positions,
  prepare,
  shared_text,
  show_example,
)
from okd_jax.data.sources import source_list
from okd_jax.errors import UserError

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Reading:
  """The data in another tokenizer's tokens, `train` row by row beside the run's."""

  tokenizer: Any
  train: list[Example]
  eval: list[Example]


def read_rows(
  config, tokenizer, records, teacher
) -> tuple[list[Example], list[Example], Reading | None]:
  """Training and evaluation rows; without data.eval, the last ones are held out.

  Beside them what `teacher` reads, unless that is None.
  """
  readers = [(tokenizer, "")]
  if teacher:
    readers.append((_own_tokenizer(config, teacher), ", in the teacher's tokens"))
    records = shared_text(records, [own for own, _ in readers])
  rows = [_training_rows(config, *reader, records) for reader in readers]
  if teacher:
    rows = pair(*rows)
  rows = [
    _with_held_out(config, *reader, train)
    for reader, train in zip(readers, rows, strict=True)
  ]
  (train, held_out), *other = rows
  _log.info("first row, trained part marked:\n%s", show_example(train[0], tokenizer))
  return train, held_out, Reading(readers[1][0], *other[0]) if other else None


def make_packs(config, train: list[Example]) -> list[tuple[int, ...]]:
  """Which texts share a row: with `data.pack` as many as fit, else each has its own."""
  lengths, length = np.array([positions(e) for e in train]), config.data.max_length
  packs = pack(lengths, length) if config.data.pack else each_alone(train)
  _log.info(
    "%d texts in %d rows of %d tokens, %.1f %% of them padding",
    len(train),
    len(packs),
    length,
    100 * (1 - lengths.sum() / (length * len(packs))),
  )
  return packs


def _own_tokenizer(config, teacher):
  if teacher.tokenizer is None:
    raise UserError(
      f"method.cross_tokenizer: teacher.path={config.teacher.path} brings no tokenizer"
    )
  return teacher.tokenizer


def _options(config) -> dict[str, Any]:
  keys = ("template", "max_length", "max_prompt_length")
  return {key: config.data[key] for key in keys}


def _training_rows(config, tokenizer, note: str, records) -> list[Example]:
  data = config.data
  rows, _ = prepare(
    records,
    tokenizer,
    overlong_prompt=data.overlong_prompt,
    overlong_row=data.overlong_row,
    name=data.train + note,
    **_options(config),
  )
  return rows


def _with_held_out(
  config, tokenizer, note: str, train
) -> tuple[list[Example], list[Example]]:
  data = config.data
  if data.eval or data.train == "embedded":
    source = data.eval or "embedded:eval"
    held_out, _ = prepare(
      load_records(source_list(source))[: config.eval.limit or None],
      tokenizer,
      overlong_prompt="truncate",
      overlong_row="truncate",
      name=source + note,
      **_options(config),
    )
  else:
    if not 0 < data.holdout < len(train):
      raise UserError(
        f"data.holdout={data.holdout} must be at least 1 and less than the "
        f"{len(train)} rows of {data.train}; or set data.eval"
      )
    train, held_out = train[: -data.holdout], train[-data.holdout :]
  return train, held_out[: config.eval.limit or None]
