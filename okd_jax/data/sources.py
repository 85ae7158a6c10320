"""Reads records from files, folders, the Hugging Face hub or the embedded data.

Whatever a record looks like on disk, it leaves here checked and as one `Record`
that knows which file and line it came from. Nothing is skipped but blank lines: a
row that cannot be used is an error that names it.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from okd_jax.data.files import shards
from okd_jax.data.shard import Row, Shard
from okd_jax.data.values import FORMS_HELP, loads, quoted, short, text, type_name
from okd_jax.errors import UserError

Spec = str | Sequence[object]  # from a config: that all are names is checked here

FORMS = {  # kind: the keys that a row of this form must have
  "instruction": ("instruction", "output"),
  "completion": ("prompt", "completion"),
  "messages": ("messages",),
  "text": ("text",),
}
_DOLLY_NAMES = {"context": "input", "response": "output"}  # databricks-dolly-15k's
_NAMED = 3  # sources in a message
_PROMPTLESS, _CONVERSATIONS = ("text",), ("messages",)  # kinds that stand apart


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
  """One row of data, in one shape whichever form it came in.

  Attributes:
    kind: `instruction`: `prompt` is the instruction and `input` (often empty) what
      it applies to. `completion`: `prompt` is used as it stands. `messages`:
      `messages` are those before the final one of the assistant, with all their keys;
      `final` has the keys of that one beside role and content. `text`: all of `text`
      is trained on, and there is no prompt.
    tools: what a conversation may call, as chat templates take it; None for nothing.
    where: file and line, for messages.
    references: acceptable responses; the first is trained on. None for `text`.
    ended: False where the response was cut off, so that no end is trained after it.
    teacher_prompt: what the teacher reads in place of `prompt`; '' for the same.
    teacher_messages: what the teacher reads in place of the whole conversation before
      the answer; () for the same.
  """

  kind: str
  where: str
  prompt: str = ""
  input: str = ""
  messages: tuple[Mapping[str, Any], ...] = ()
  final: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  tools: tuple[Any, ...] | None = None
  text: str = ""
  references: tuple[str, ...] = ()
  ended: bool = True
  teacher_prompt: str = ""
  teacher_messages: tuple[Mapping[str, Any], ...] = ()

  @property
  def is_text(self) -> bool:
    """Whether it is plain text, which has no prompt."""
    return self.kind in _PROMPTLESS

  @property
  def is_chat(self) -> bool:
    """Whether its prompt is a conversation."""
    return self.kind in _CONVERSATIONS

  @property
  def asked(self) -> str:
    """The prompt for people to read, without a template.

    >>> Record("instruction", "f:1", prompt="Add.", input="1, 2").asked
    'Add.\\n\\n1, 2'
    >>> Record("messages", "f:2", messages=({"role": "user", "content": "Hi"},)).asked
    'user: Hi'
    """
    turns = [f"{turn['role']}: {turn.get('content', '')}" for turn in self.messages]
    return "\n\n".join(part for part in (self.prompt, self.input, *turns) if part)


def load_records(spec: Spec) -> list[Record]:
  """Reads every record of one source or of several, in the order given.

  Args:
    spec: a file (`.jsonl`, `.json`, `.csv`, `.tsv`, `.txt`, each also `.gz` or `.zst`,
      `.parquet`, `.arrow`), a folder of such files or one written by `save_to_disk`, a
      pattern such as `data/*.jsonl`, a hub id, or `embedded`; or a list of these.
      Folders and ids take `:split`, ids `@config` too (`id@config:split`).

  Returns:
    The records, each with the file and line that it came from.

  Raises:
    UserError: if a source is missing or a row unusable; it names file and line.

  Source: the forms are those of Alpaca and Dolly (instruction), of TRL (completion,
  messages) and of language modelling (text).

  >>> import tempfile
  >>> with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
  ...   _ = file.write('{"prompt": "1 + 1 =", "completion": " 2"}')
  ...   file.flush()
  ...   [record] = load_records(file.name)
  >>> record.kind, record.prompt, record.references
  ('completion', '1 + 1 =', (' 2',))
  """
  return list(iter_records(spec))


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
  return [_references_of(row, where) for row, where in read_rows(spec)]


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


def iter_records(spec: Spec) -> Iterator[Record]:
  """The records of `load_records`, read as they are asked for."""
  for shard in shards_of(spec):
    for row, where in shard.rows():
      yield parse_record(row, where)


def shards_of(spec: Spec) -> list[Shard]:
  """The shards of one source or several, in their order.

  Raises:
    UserError: if nothing is named, or a source is not there.
  """
  sources = [spec] if isinstance(spec, str) else list(spec)
  if not sources or not all(isinstance(s, str) and s.strip() for s in sources):
    raise UserError(
      f"{spec!r} names no data; give a path, a hub id, 'embedded', or a list of them"
    )
  return [shard for source in sources for shard in shards(source)]


def parse_record(row: object, where: str) -> Record:
  """Checks one raw row and turns it into a `Record`."""
  row = _known_names(row, where)
  kind, ended = _kind(row, where), _ended(row, where)
  if kind in _PROMPTLESS:
    return Record(kind, where, text=text(row, "text", where), ended=ended)
  fields: dict[str, Any] = {"references": _references_of(row, where), "ended": ended}
  match kind:
    case "messages":
      *before, final = _messages(row, where)
      extra = {k: v for k, v in final.items() if k not in ("role", "content")}
      fields |= {"messages": tuple(before), "final": extra}
      fields["tools"] = _tools(row, where)
    case "completion":
      fields["prompt"] = text(row, "prompt", where)
    case "instruction":
      fields["prompt"] = text(row, "instruction", where)
      if row.get("input") is not None:
        fields["input"] = text(row, "input", where, blank=True)
  return Record(kind, where, **fields)


# Rows


def _known_names(row: object, where: str) -> Mapping[str, Any]:
  """The row if it is one, Dolly's own names for input and output turned into ours.

  What is null is not there: data sets that were put together have all the others' keys.
  """
  if not isinstance(row, Mapping):
    raise UserError(f"{where}: is {type_name(row)}, not an object; {FORMS_HELP}")
  others = [keys for kind, keys in FORMS.items() if kind != "instruction"]
  if any(all(row.get(key) is not None for key in keys) for keys in others):
    return row
  row = dict(row)
  for theirs, ours in _DOLLY_NAMES.items():
    value, own = row.pop(theirs, None), row.get(ours)
    if value is None or (value == "" and own is not None):
      continue
    if own not in (None, "", value):
      raise UserError(
        f"{where}: {ours!r} is {short(own)} and {theirs!r} is {short(value)}, two "
        "names of one thing; remove one of them"
      )
    row[ours] = value
  return row


def _kind(row: Mapping[str, Any], where: str) -> str:
  """The first form whose keys are all there; published sets mix in others."""
  present = [key for key in row if row[key] is not None]
  for kind, keys in FORMS.items():
    if all(key in present for key in keys):
      return kind
  for keys in FORMS.values():
    missing = [key for key in keys if key not in present]
    if len(missing) < len(keys):
      state = "is null" if missing[0] in row else "is missing"
      raise UserError(f"{where}: key {missing[0]!r} {state}; {FORMS_HELP}")
  raise UserError(f"{where}: no usable keys (found: {quoted(present)}); {FORMS_HELP}")


def _ended(row: Mapping[str, Any], where: str) -> bool:
  """The key 'ended', which says whether the response is whole; by default it is."""
  ended = row.get("ended")
  if not isinstance(ended, bool | None):
    raise UserError(f"{where}: 'ended' is {type_name(ended)}, not true or false")
  return ended is not False


def _references_of(row: object, where: str) -> tuple[str, ...]:
  """Acceptable responses of a raw row, from whichever key holds them."""
  row = _known_names(row, where)
  for key in ("output", "completion"):
    if row.get(key) is not None:
      return _strings(row, key, where)
  if row.get("messages") is not None:
    return (_messages(row, where)[-1].get("content", ""),)
  raise UserError(
    f"{where}: no reference to compare with (found keys: {quoted(row)}); add 'output', "
    "'completion' or 'messages'"
  )


def _strings(row: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
  """A string, or a non-empty list of them."""
  if not isinstance(row[key], (list, tuple)):
    return (text(row, key, where),)
  if not row[key]:
    raise UserError(f"{where}: {key!r} is an empty list; give at least one response")
  items = {f"{key}[{i}]": value for i, value in enumerate(row[key])}
  return tuple(text(items, item, where) for item in items)


def _tools(row: Mapping[str, Any], where: str) -> tuple[Any, ...] | None:
  """What a conversation may call; some data sets write the list out as JSON."""
  tools = row.get("tools")
  if isinstance(tools, str):
    tools = loads(tools.encode(), f"{where}: 'tools'", "value") if tools else None
  if not tools:
    return None
  if not isinstance(tools, (list, tuple)):
    raise UserError(f"{where}: 'tools' is {type_name(tools)}, not a list")
  return tuple(tools)


def _messages(row: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
  """Checked messages with all that is not null in them, the last the assistant's.

  One that calls a tool needs no content.
  """
  messages = row["messages"]
  if not isinstance(messages, (list, tuple)) or len(messages) < 2:
    raise UserError(
      f"{where}: 'messages' must be a list of at least two, the last by the assistant"
    )
  checked = []
  for i, message in enumerate(messages):
    place = f"{where}: message {i + 1}"
    if not isinstance(message, Mapping):
      raise UserError(f"{place} is {type_name(message)}, not an object")
    message = {key: value for key, value in message.items() if value is not None}
    calls = bool(message.get("tool_calls"))
    for key in ("role",) if calls else ("role", "content"):
      if key not in message:
        raise UserError(f"{place}: key {key!r} is missing or null")
    text(message, "role", place)
    # Only the last is trained on: an empty system message is odd, but harmless.
    last = i == len(messages) - 1
    if "content" in message:
      text(message, "content", place, blank=calls or not last)
    checked.append(message)
  if checked[-1]["role"] != "assistant":
    raise UserError(
      f"{where}: the last message is by {checked[-1]['role']!r}; it must be by "
      "'assistant', since it is what is trained on"
    )
  return checked
