"""Conversations as text, by the chat template of a tokenizer."""

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from okd_jax.data.chat_template import mask, spans_of, text_of
from okd_jax.data.sources import Record
from okd_jax.errors import UserError

_REASONING = ("reasoning_content", "reasoning", "thinking")
_MARK = "answer 6d61726b"  # stands for any answer that a template leaves alone

Message = Mapping[str, Any]
Write = Callable[..., str]


class Rendered(NamedTuple):
  """A record as text.

  Attributes:
    prompt: what comes before the response; empty for a `text` record.
    full: prompt and response; the prompt alone where there is no response.
    response: the response alone.
    chat: whether a chat template wrote it, so that special tokens are in the text.
    astray: whether the template writes the response in another way than behind its
      own prompt.
  """

  prompt: str
  full: str
  response: str
  chat: bool = False
  astray: bool = False


Render = Callable[[Record], Rendered]


def chat_render(tokenizer: PreTrainedTokenizerBase) -> Render:
  """The function that writes records out under the tokenizer's chat template.

  Raises:
    UserError: if it has none.
  """
  if not tokenizer.chat_template:
    raise UserError(
      "data.template=chat, but the tokenizer has no chat template; use default or "
      "alpaca, name one with data.chat_template=FILE, or take a tokenizer that has one"
    )
  said = functools.partial(write, tokenizer)
  proved: set[tuple[str, str]] = set()  # keys that the template has a place for

  def render(record: Record) -> Rendered:
    if record.is_text:
      return Rendered("", record.text, record.text)
    messages, tools = as_messages(record), record.tools
    prompt = said(messages, record, tools, prompt=True)
    text = next(iter(record.references), "")
    if not record.ended:  # the template would write the end of the turn
      _check_cut(record)
      return Rendered(prompt, prompt + text, text, chat=True)
    answer = {"role": "assistant", **record.final, "content": text}
    whole = [*messages, answer] if record.references else messages
    full = said(whole, record, tools)
    proved.update(_proven(said, whole, record, full, proved))
    if not record.references:
      return Rendered(prompt, prompt, "", chat=True)
    if full.startswith(prompt):
      return Rendered(prompt, full, full[len(prompt) :], chat=True)
    # Some templates rewrite earlier turns once there is an answer. What will be
    # asked at generation time is the prompt, so that is what must be trained on.
    response = _behind(said, record, prompt, full)
    return Rendered(prompt, prompt + response, response, chat=True, astray=True)

  return render


def write(
  tokenizer: PreTrainedTokenizerBase,
  messages: Sequence[Message],
  record: Record,
  tools: Sequence[Any] | None,
  prompt: bool = False,
) -> str:
  """Messages as the chat template has them; a UserError where it refuses them.

  prompt: whether the opening of an answer follows.
  """
  what = f"{record.where}: the tokenizer's chat template refuses the messages"
  return text_of(tokenizer, messages, what, tools=tools, prompt=prompt)


def marked(
  tokenizer: PreTrainedTokenizerBase, record: Record
) -> tuple[list[int], list[int]] | None:
  """(ids, 1 where the model speaks) of a whole conversation, as its template marks it.

  None for a template without {% generation %}, or a tokenizer that cannot tell where
  in the text its tokens lie.
  """
  if not tokenizer.is_fast:
    return None
  answer = {"role": "assistant", **record.final, "content": record.references[0]}
  what = f"{record.where}: the tokenizer's chat template refuses the messages"
  found = spans_of(tokenizer, [*as_messages(record), answer], what, record.tools)
  if found is None:
    return None
  text, spans = found
  out = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
  return out["input_ids"], list(mask(spans, out["offset_mapping"]))


def beyond_text(record: Record) -> list[tuple[str, str]]:
  """(key, role) of what a conversation says beside its text, which must not be lost.

  Reasoning of earlier turns is not among it: templates leave that out on purpose.
  """
  found = [("tools", "")] if record.tools else []
  said = [*record.messages]
  if record.final:
    text = next(iter(record.references), "")
    found += [(k, "assistant") for k in _REASONING if record.final.get(k)]
    said.append({"role": "assistant", **record.final, "content": text})
  for message in said:
    if message.get("tool_calls"):
      both = bool((message.get("content") or "").strip())
      # Some templates write one of the two alone.
      found.append(("tool_calls", f"{message['role']}{' beside content' * both}"))
      found += [("content", f"{message['role']} beside tool_calls")] if both else []
  return found


def _check_cut(record: Record) -> None:
  """Raises a UserError for what only a whole answer can have beside its text."""
  for key in ("tool_calls", *_REASONING):
    if record.final.get(key):
      raise UserError(
        f"{record.where}: 'ended' is false, but the answer has {key!r}, which only a "
        "whole one can"
      )


def _proven(
  said: Write,
  messages: Sequence[Message],
  record: Record,
  full: str,
  proved: Collection[tuple[str, str]],
) -> list[tuple[str, str]]:
  """What the conversation says beside its text; a UserError if that is lost."""
  found = beyond_text(record)
  for key, role in found:
    if (key, role) not in proved and _without(said, messages, record, key) == full:
      raise UserError(
        f"{record.where}: the tokenizer's chat template has no place for {key!r}"
      )
  return found


def _without(said: Write, messages: Sequence[Message], record: Record, key: str) -> str:
  """The conversation without a key."""
  if key == "tools":
    return said(messages, record, None)
  stripped = [
    {k: v for k, v in m.items() if k != key or (k == "content" and not _calls(m))}
    for m in messages
  ]
  whole = [m | {"content": m.get("content", "")} for m in stripped]
  try:
    return said(whole, record, record.tools)
  except UserError:  # so it has a place, and needs it
    return ""


def _calls(message: Message) -> bool:
  return bool(message.get("tool_calls"))


def _behind(said: Write, record: Record, prompt: str, full: str) -> str:
  """The answer and its end, as the template would write them behind its prompt.

  What the prompt has opened already, such as <think>, is not said again. The end is
  what the template writes after an answer that it leaves alone; calls are as it writes
  them in the whole conversation.
  """
  messages, text = as_messages(record), record.references[0]
  plain = said(
    [*messages, {"role": "assistant", "content": _MARK}], record, record.tools
  )
  before, found, end = plain.rpartition(_MARK)
  if record.final.get("tool_calls"):
    if not (found and full.startswith(before)):
      raise UserError(
        f"{record.where}: the tokenizer's chat template does not write 'tool_calls' "
        "behind the prompt that it gives a model"
      )
    text, end = full.removeprefix(before), ""
  if not found:
    return text
  opened = prompt.removeprefix(before) if prompt.startswith(before) else ""
  for start in (opened, opened.strip()):
    if start and text.startswith(start):
      text = text.removeprefix(start)
      break
  return text + end


def as_messages(record: Record) -> list[Message]:
  """The conversation before the answer; an instruction is its only turn."""
  if record.is_chat:
    return list(record.messages)
  return [{"role": "user", "content": joined(record.prompt, record.input)}]


def joined(instruction: str, extra: str) -> str:
  """An instruction and what it applies to, a blank line between them."""
  return f"{instruction}\n\n{extra}" if extra.strip() else instruction
