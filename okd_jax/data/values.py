"""Checks of single values in rows, and what messages call them."""

import json
from collections.abc import Mapping
from typing import Any

from okd_jax.errors import UserError
from okd_jax.runtime.files import parse_json

FORMS_HELP = (
  "a record has 'instruction' and 'output' (and 'input'), 'prompt' and 'completion', "
  "'messages', 'conversations', or 'text'"
)
_SHOWN = 40  # characters of a value in a message


def text(row: Mapping[str, Any], key: str, where: str, blank: bool = False) -> str:
  """A string that can be encoded; not blank, unless it may be.

  Raises:
    UserError: for any other value.
  """
  value = row[key]
  if not isinstance(value, str):
    raise UserError(f"{where}: {key!r} is {type_name(value)}, not a string")
  if not blank and not value.strip():
    raise UserError(f"{where}: {key!r} is empty; fill it in or remove the record")
  try:
    value.encode("utf-8")
  except UnicodeEncodeError as error:  # JSON may escape half a surrogate pair
    raise UserError(
      f"{where}: {key!r} holds half a surrogate pair at character {error.start + 1}; "
      "repair the text"
    ) from error
  return value


def decode(content: bytes, where: str) -> str:
  """Bytes as text; a UserError if they are none."""
  try:
    return content.decode("utf-8")
  except UnicodeDecodeError as error:
    raise UserError(
      f"{where}: not UTF-8 text ({error.reason} at byte {error.start + 1}); "
      "save the file as UTF-8"
    ) from error


def loads(content: bytes, where: str, what: str) -> Any:
  """Whatever JSON says; a UserError that names where, and what is to be mended."""
  try:
    return parse_json(decode(content, where))
  except UserError:
    raise
  except json.JSONDecodeError as error:
    reason = f"{error.msg} at column {error.colno}"
    if what == "file":
      reason = f"{error.msg} at line {error.lineno} column {error.colno}"
  except ValueError as error:  # endless digits or nesting
    reason = cause(error)
  raise UserError(f"{where}: not valid JSON ({reason}); fix or remove the {what}")


def short(value: object) -> str:
  """A value for a message."""
  shown = repr(value)
  return shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}…"


def quoted(names: Any) -> str:
  """Names for a message: 'a', 'b'."""
  return ", ".join(map(repr, names)) or "none"


def type_name(value: object) -> str:
  """A value's type as JSON calls it."""
  if value is None:
    return "null"
  names = {bool: "true or false", int: "a number", float: "a number", str: "a string"}
  names |= {list: "a list", tuple: "a list", dict: "an object"}
  return names.get(type(value), f"a {type(value).__name__}")


def cause(error: BaseException) -> str:
  """The first line of an error's text; its class when it has none."""
  lines = str(error).strip().splitlines()
  return lines[0].rstrip(".") if lines else type(error).__name__
