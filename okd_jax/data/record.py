"""One row of data: what forms it may have, and the `Record` that they all become."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from okd_jax.data import chats
from okd_jax.data.chats import PROMPTS_HELP
from okd_jax.data.columns import renamed
from okd_jax.data.values import FORMS_HELP, quoted, short, text, type_name
from okd_jax.errors import UserError

FORMS = {  # the keys that a row of this form must have; the first one wins
  "instruction": ("instruction", "output"),
  "completion": ("prompt", "completion"),
  "messages": ("messages",),
  "conversations": ("conversations",),
  "text": ("text",),
}
_PROMPTS = {"instruction": ("instruction",), "completion": ("prompt",)}
_ANSWERS = ("output", "completion")
_DOLLY_NAMES = {"context": "input", "response": "output"}  # databricks-dolly-15k's
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
    references: acceptable responses; the first is trained on. None for `text`, nor for
      a prompt alone.
    ended: False where the response was cut off, so that no end is trained after it.
    teacher_prompt: what the teacher alone reads in the prompt's place, '' for nothing.
    teacher_messages: likewise, a conversation up to the answer.
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


def parse_record(
  row: object,
  where: str,
  *,
  prompts: bool = False,
  columns: Mapping[str, str] | None = None,
) -> Record:
  """Checks one raw row and turns it into a `Record`.

  Args:
    row: what was read.
    where: its place, for messages.
    prompts: whether a row may do without an answer.
    columns: the row's names of our keys, see `columns.renamed`.

  Raises:
    UserError: for a row that cannot be used.
  """
  row = _known_names(renamed(_object(row, where), columns or {}, where), where)
  form = _form(row, where, prompts)
  kind, ended = _kind(row, form), _ended(row, where)
  fields = {"ended": ended} | _privileged(row, kind, where)
  if kind == "text":
    fields["text"] = text(row, "text", where)
  elif kind == "messages":
    said = chats.checked(chats.turns(row, form, where), where, prompts=prompts)
    fields |= _conversation(said) | {"tools": chats.tools(row, where)}
  else:
    fields |= _prompt_and_answer(row, form, where)
  return Record(kind, where, **fields)


def references_of(row: object, where: str) -> tuple[str, ...]:
  """Acceptable responses of a raw row, from whichever key holds them; no prompt needed.

  Raises:
    UserError: for a row that has none.
  """
  row = _known_names(_object(row, where), where)
  for form, key in (("instruction", "output"), ("completion", "completion")):
    if row.get(key) is not None and _kind(row, form) != "messages":
      return _strings(row, key, where)
  for form in ("messages", "conversations", "completion"):
    if all(row.get(key) is not None for key in FORMS[form]):
      said = chats.checked(chats.turns(row, form, where), where)
      return (said[-1].get("content", ""),)
  raise UserError(
    f"{where}: no reference to compare with (found keys: {quoted(row)}); add 'output', "
    "'completion', 'messages' or 'conversations'"
  )


# Forms


def _object(row: object, where: str) -> Mapping[str, Any]:
  if not isinstance(row, Mapping):
    raise UserError(f"{where}: is {type_name(row)}, not an object; {FORMS_HELP}")
  return row


def _known_names(row: Mapping[str, Any], where: str) -> Mapping[str, Any]:
  """The row, Dolly's own names for input and output turned into ours.

  What is null is not there: data sets that were put together have all the others' keys.
  """
  others = [keys for form, keys in FORMS.items() if form != "instruction"]
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


def _form(row: Mapping[str, Any], where: str, prompts: bool) -> str:
  """The first form whose keys are all there; published sets mix in others."""
  present = [key for key in row if row[key] is not None]
  forms = list(FORMS.items())
  if prompts:  # before 'text', which nothing can answer
    forms[-1:-1] = _PROMPTS.items()
  for form, keys in forms:
    if all(key in present for key in keys):
      return form
  for keys in FORMS.values():
    missing = [key for key in keys if key not in present]
    if len(missing) < len(keys):
      state = "is null" if missing[0] in row else "is missing"
      hint = f"; {PROMPTS_HELP}" if missing[0] in _ANSWERS else ""
      raise UserError(f"{where}: key {missing[0]!r} {state}; {FORMS_HELP}{hint}")
  raise UserError(f"{where}: no usable keys (found: {quoted(present)}); {FORMS_HELP}")


def _kind(row: Mapping[str, Any], form: str) -> str:
  """A record's kind: whatever is a list of messages is a conversation."""
  listed = form == "completion" and isinstance(row.get("prompt"), list | tuple)
  return "messages" if listed or form == "conversations" else form


def _prompt_and_answer(row: Mapping[str, Any], form: str, where: str) -> dict[str, Any]:
  """The fields of an instruction or a completion, which may be a prompt alone."""
  prompt, answer = FORMS[form]
  fields: dict[str, Any] = {"prompt": text(row, prompt, where)}
  if form == "instruction" and row.get("input") is not None:
    fields["input"] = text(row, "input", where, blank=True)
  if row.get(answer) is None:  # so it is not cut off either
    return fields | {"ended": True}
  return fields | {"references": _strings(row, answer, where)}


def _conversation(said: list[dict[str, Any]]) -> dict[str, Any]:
  """The fields of a conversation, whose last message may be an answer."""
  if said[-1]["role"] != "assistant":
    return {"messages": tuple(said), "ended": True}
  *before, final = said
  extra = {k: v for k, v in final.items() if k not in ("role", "content")}
  answer = (final.get("content", ""),)
  return {"messages": tuple(before), "final": extra, "references": answer}


# Keys


def _ended(row: Mapping[str, Any], where: str) -> bool:
  """The key 'ended', which says whether the response is whole; by default it is."""
  ended = row.get("ended")
  if not isinstance(ended, bool | None):
    raise UserError(f"{where}: 'ended' is {type_name(ended)}, not true or false")
  return ended is not False


def _privileged(row: Mapping[str, Any], kind: str, where: str) -> dict[str, Any]:
  """What the teacher reads in the prompt's place, if anything."""
  keys = ("teacher_prompt", "teacher_messages")
  given = [key for key in keys if row.get(key) is not None]
  if len(given) == 2:
    raise UserError(f"{where}: has both {' and '.join(map(repr, keys))}; remove one")
  if not given:
    return {}
  [key] = given
  if kind in _PROMPTLESS:
    raise UserError(f"{where}: has {key!r}, but a text has no prompt to be replaced")
  if key == "teacher_prompt":
    if kind in _CONVERSATIONS:
      raise UserError(
        f"{where}: has 'teacher_prompt', but the row is a conversation; give "
        "'teacher_messages'"
      )
    return {key: text(row, key, where)}
  said = chats.checked(row[key], where, key, prompts=True)
  if said[-1]["role"] == "assistant":
    raise UserError(
      f"{where}: the last of 'teacher_messages' is by 'assistant'; leave the answer out"
    )
  return {key: tuple(said)}


def _strings(row: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
  """A string, or a non-empty list of them."""
  if not isinstance(row[key], (list, tuple)):
    return (text(row, key, where),)
  if not row[key]:
    raise UserError(f"{where}: {key!r} is an empty list; give at least one response")
  items = {f"{key}[{i}]": value for i, value in enumerate(row[key])}
  return tuple(text(items, item, where) for item in items)
