"""The day that chat templates write, so that rows do not depend on the clock."""

import contextlib
import contextvars
import datetime
from collections.abc import Iterator

from transformers import PreTrainedTokenizerBase

_DAY = contextvars.ContextVar[datetime.date | None]("day", default=None)


def day() -> datetime.date:
  """The day that chat templates write: today, unless `written_on` says another."""
  return _DAY.get() or datetime.date.today()


@contextlib.contextmanager
def written_on(date: datetime.date | None) -> Iterator[None]:
  """Has chat templates write this day, so that rows do not depend on the clock.

  None: today, and the same to the end even if that is tomorrow.
  """
  token = _DAY.set(date or datetime.date.today())
  try:
    yield
  finally:
    _DAY.reset(token)


def names_the_day(tokenizer: PreTrainedTokenizerBase, *templates: str) -> bool:
  """Whether rows of one of these templates depend on the day they are written."""
  return "chat" in templates and "strftime_now" in str(tokenizer.chat_template)
