"""Columns by other names: `data.columns` says what a data set calls ours."""

from collections.abc import Iterator, Mapping
from typing import Any

from okd_jax.data.values import quoted
from okd_jax.errors import UserError

KEYS = ("instruction", "input", "output", "context", "response")
KEYS += ("prompt", "completion", "messages", "conversations", "system", "tools")
KEYS += ("text", "ended", "teacher_prompt", "teacher_messages")  # of all forms of rows

_NOTHING = object()
_FORMS = (
  {"instruction", "input", "output", "context", "response"},
  {"prompt", "completion"},
  {"messages"},
  {"conversations"},
  {"text"},
)


def renamed(
  row: Mapping[str, Any], columns: Mapping[str, str], where: str
) -> Mapping[str, Any]:
  """The row with its values under our keys, and no longer under its own.

  columns: our key and theirs; a dot reaches into an object, which then stays.

  Raises:
    UserError: for a column that the row does not have.

  >>> row = {"question": "1 + 1", "answers": {"text": ["2"]}}
  >>> renamed(row, {"prompt": "question", "completion": "answers.text"}, "a.jsonl:1")
  {'answers': {'text': ['2']}, 'prompt': '1 + 1', 'completion': ['2']}
  """
  if not columns:
    return row
  found = {ours: _value(row, theirs) for ours, theirs in columns.items()}
  for ours, value in found.items():
    if value is _NOTHING:
      raise UserError(
        f"{where}: there is no column {columns[ours]!r}, which data.columns.{ours} "
        f"names; the row has {quoted(row)}"
      )
  gone = set(columns.values()) | _others(columns)
  return {key: value for key, value in row.items() if key not in gone} | found


def _others(columns: Mapping[str, str]) -> set[str]:
  """The keys of forms that the named columns are no part of: these would go first."""
  named = [form for form in _FORMS if form & set(columns)]
  return set().union(*(form for form in _FORMS if named and form not in named))


def problems(columns: Mapping[str, Any]) -> Iterator[str]:
  """What is wrong with such names, each in a sentence."""
  for ours, theirs in columns.items():
    if ours not in KEYS:
      yield f"data.columns.{ours} is no key of a row; these are {', '.join(KEYS)}"
    if not isinstance(theirs, str):
      yield f"data.columns.{ours}={theirs!r} must be the name of a column"


def _value(row: Mapping[str, Any], name: str) -> Any:
  """The value of a column, of a.b in the object a; `_NOTHING` if there is none."""
  if name in row:
    return row[name]
  value: Any = row
  for part in name.split("."):
    if value is None:  # null is absence, and so is what it would hold
      return None
    if not isinstance(value, Mapping) or part not in value:
      return _NOTHING
    value = value[part]
  return value
