"""Conversations in the shapes that data sets have, as one list of checked messages."""

from collections.abc import Mapping, Sequence
from typing import Any

from okd_jax.data.values import loads, text, type_name
from okd_jax.errors import UserError

PROMPTS_HELP = (
  "prompts alone are for okd_jax.sample and for methods that write their own answers"
)
_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"}
_ROLES |= {role: role for role in ("user", "assistant", "system", "tool")}
_CALL = "function_call"
_NULLABLE = ("arguments", "default", "const")


def turns(row: Mapping[str, Any], form: str, where: str) -> Any:
  """The messages of a row of this form, not checked yet: the answer's is the last.

  form: 'messages', 'conversations' (ShareGPT), or 'completion' with a list as its
    prompt (TRL).
  """
  match form:
    case "messages" if isinstance(row["messages"], list | tuple):
      return _after_system(list(row["messages"]), row, where)
    case "messages":
      return row["messages"]
    case "conversations":
      return _sharegpt(row, where)
  answer = row.get("completion")
  if isinstance(answer, str):
    answer = [{"role": "assistant", "content": answer}]
  if not isinstance(answer or [], list | tuple):
    raise UserError(
      f"{where}: 'completion' is {type_name(answer)}, not text or a list of messages"
    )
  return [*row["prompt"], *(answer or [])]


def checked(
  messages: Any, where: str, key: str = "messages", prompts: bool = False
) -> list[dict[str, Any]]:
  """Messages with all that is not null in them, the last the assistant's.

  One that calls a tool needs no content.

  prompts: the last may be by the user or a tool.

  Raises:
    UserError: for whatever is no conversation.
  """
  listed = isinstance(messages, list | tuple)
  if not listed or len(messages) < (1 if prompts else 2):
    least = "at least one" if prompts else "at least two, the last by the assistant"
    found = "" if listed else f", and is {type_name(messages)}"
    raise UserError(f"{where}: {key!r} must be a list of {least}{found}")
  found = []
  for i, message in enumerate(messages, 1):
    place = f"{where}: message {i}"
    if key == "teacher_messages":
      place = f"{where}: {key}, message {i}"
    found.append(_checked_message(message, place, last=i == len(messages)))
  role = found[-1]["role"]
  if role == "assistant" and len(found) < 2:
    raise UserError(f"{where}: {key!r} must be a list of at least two with the answer")
  if role != "assistant" and not (prompts and role in ("user", "tool")):
    raise UserError(
      f"{where}: the last message is by {role!r}; it must be by 'assistant', since it "
      f"is what is trained on ({PROMPTS_HELP})"
    )
  return found


def tools(row: Mapping[str, Any], where: str) -> tuple[Any, ...] | None:
  """What a conversation may call; some data sets write the list out as JSON."""
  found = row.get("tools")
  if isinstance(found, str):
    found = loads(found.encode(), f"{where}: 'tools'", "value") if found else None
  if not found:
    return None
  if not isinstance(found, (list, tuple)):
    raise UserError(f"{where}: 'tools' is {type_name(found)}, not a list")
  return tuple(_present(found))


def _present(value: Any) -> Any:
  """Without the keys that are null, which structs have from one another in Parquet.

  What a call passes is left as it is, and so is what a schema may say is null.
  """
  if isinstance(value, list | tuple):
    return [_present(one) for one in value]
  if not isinstance(value, Mapping):
    return value
  return {
    key: inner if key in _NULLABLE else _present(inner)
    for key, inner in value.items()
    if inner is not None or key in _NULLABLE
  }


def _checked_message(message: Any, place: str, last: bool) -> dict[str, Any]:
  if not isinstance(message, Mapping):
    raise UserError(f"{place} is {type_name(message)}, not an object")
  message = {key: value for key, value in message.items() if value is not None}
  calls = bool(message.get("tool_calls"))
  if calls:
    message["tool_calls"] = _present(message["tool_calls"])
  for key in ("role",) if calls else ("role", "content"):
    if key not in message:
      raise UserError(f"{place}: key {key!r} is missing or null")
  text(message, "role", place)
  if "content" in message:
    message["content"] = _joined(message["content"], place)
    # Only the last is trained on: an empty system message is odd, but harmless.
    text(message, "content", place, blank=calls or not last)
  weight = message.get("weight", 1)
  if message["role"] == "assistant" and (
    isinstance(weight, bool) or weight not in (0, 1)
  ):
    raise UserError(f"{place}: 'weight' is {weight!r}; it must be 0 or 1")
  return message


def _joined(content: Any, place: str) -> Any:
  """A content as text, if it is a list of parts that are; else as it is."""
  if not isinstance(content, list | tuple):
    return content
  for part in content:
    if not isinstance(part, Mapping):
      raise UserError(f"{place}: a part of 'content' is {type_name(part)}")
    if part.get("type") != "text":
      raise UserError(
        f"{place}: 'content' has a part of type {part.get('type')!r}; models here "
        "read text alone"
      )
    text({"text": None} | part, "text", f"{place}: a part of 'content'", blank=True)
  return "".join(part["text"] for part in content)


# ShareGPT


def _sharegpt(row: Mapping[str, Any], where: str) -> Any:
  """Its turns as messages, behind the system prompt that stands beside them."""
  said = row["conversations"]
  if not isinstance(said, list | tuple):
    raise UserError(
      f"{where}: 'conversations' is {type_name(said)}, not a list of turns"
    )
  found = [_turn(turn, f"{where}: turn {i}") for i, turn in enumerate(said, 1)]
  return _after_system(found, row, where)


def _after_system(found: list[Any], row: Mapping[str, Any], where: str) -> list[Any]:
  """The messages behind the system prompt that stands beside them, if one does."""
  if not row.get("system"):
    return found
  system = text(row, "system", where, blank=True)
  if not system.strip():
    return found
  first = found[0] if found and isinstance(found[0], Mapping) else {}
  if first.get("role") == "system":
    if first.get("content") == system:
      return found
    raise UserError(
      f"{where}: 'system' and the first turn are two system prompts; remove one"
    )
  return [{"role": "system", "content": system}, *found]


def _turn(turn: Any, place: str) -> Mapping[str, Any]:
  if not isinstance(turn, Mapping):
    raise UserError(f"{place} is {type_name(turn)}, not an object")
  if turn.get("from") is None:  # with role and content, like other messages
    role = turn.get("role")
    known = isinstance(role, str) and role in _ROLES
    return {**turn, "role": _ROLES[role]} if known else turn
  role = text(turn, "from", place)
  rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
  if role == _CALL:
    return rest | {"role": "assistant", "tool_calls": _calls(turn, place)}
  if role not in _ROLES:
    raise UserError(
      f"{place}: 'from' is {role!r}; it must be one of {', '.join([*_ROLES, _CALL])}"
    )
  if turn.get("value") is None:
    raise UserError(f"{place}: key 'value' is missing or null")
  return rest | {"role": _ROLES[role], "content": turn["value"]}


def _calls(turn: Mapping[str, Any], place: str) -> Sequence[Mapping[str, Any]]:
  """The calls that a turn spells out as JSON, a single one or a list."""
  value = turn.get("value")
  if isinstance(value, str):
    value = loads(value.encode("utf-8", "replace"), f"{place}: 'value'", "value")
  calls = list(value) if isinstance(value, list | tuple) else [value]
  for call in calls or [None]:
    if not isinstance(call, Mapping) or not isinstance(call.get("name"), str):
      raise UserError(
        f'{place}: a {_CALL} must be {{"name": …, "arguments": …}}, or a list of these'
      )
  return [{"type": "function", "function": dict(call)} for call in calls]
