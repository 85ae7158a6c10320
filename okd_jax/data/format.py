"""Turns records into text: prompt templates, and what of the text is the response.

And back: what a model has said becomes text (`decode_response`) and a row of data
(`answered_row`).

A template only ever decides what the model reads before it answers. `render` gives
the prompt, and prompt and response as one text, because a tokenizer may merge what
stands left and right of the seam (see `encode.py`).
"""

import functools
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
import jinja2.meta
import jinja2.sandbox
import numpy as np
from jaxtyping import Int
from transformers import PreTrainedTokenizerBase

from okd_jax.data.day import dated
from okd_jax.data.sources import Record
from okd_jax.errors import UserError

_TASK = "### Instruction:\n{instruction}\n\n### Response:\n"
_TASK_WITH_INPUT = (
  "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_ALPACA = (
  "Below is an instruction that describes a task. Write a response that appropriately "
  "completes the request.\n\n"
)
_ALPACA_WITH_INPUT = (
  "Below is an instruction that describes a task, paired with an input that provides "
  "further context. Write a response that appropriately completes the request.\n\n"
)
NAMED = {  # name: (without input, with input)
  "default": (_TASK, _TASK_WITH_INPUT),
  "alpaca": (_ALPACA + _TASK, _ALPACA_WITH_INPUT + _TASK_WITH_INPUT),
}
_FIELDS = ("instruction", "input")
_REASONING = ("reasoning_content", "reasoning", "thinking")
_MARK = "answer 6d61726b"  # stands for any answer that a template leaves alone
_PLACEHOLDER = re.compile(r"\{(\w+)\}")
_JINJA = jinja2.sandbox.SandboxedEnvironment(
  keep_trailing_newline=True, undefined=jinja2.StrictUndefined
)

Fill = Callable[[str, str], str]  # (instruction, input) -> prompt


class Rendered(NamedTuple):
  """A record as text.

  Attributes:
    prompt: what comes before the response; empty for a `text` record.
    full: prompt and response.
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


def make_render(template: str, tokenizer: PreTrainedTokenizerBase | None) -> Render:
  """The function that writes records out under a template.

  Args:
    template: `default`, `alpaca`, `chat` (the tokenizer's own), the path of a file
      that holds a template, or a template: text with `{instruction}` and perhaps
      `{input}`, or jinja2 with the same names. One that has no place for the input
      gets it after the instruction, with a blank line between them.
    tokenizer: whose `chat` template it is; no other template asks for one.

  Raises:
    UserError: if there is no such template, or it cannot be used.
  """
  if template == "chat":
    return _chat_render(tokenizer)
  fill = _make_fill(template)
  return lambda record: _render(record, fill)


def template_text(template: str, tokenizer: PreTrainedTokenizerBase | None) -> str:
  """What `data.template` means: a name, a template, or a file's or tokenizer's one."""
  if template == "chat":
    return str(tokenizer.chat_template)
  if "{" not in template and os.path.isfile(template):
    return _read_template(template)
  return template


def _render(record: Record, fill: Fill) -> Rendered:
  """A record outside chat; text and completions know no template."""
  match record.kind:
    case "text":
      return Rendered("", record.text, record.text)
    case "completion":
      prompt = record.prompt
    case "messages":
      prompt = fill(_single_turn(record), "")
    case _:
      prompt = fill(record.prompt, record.input if record.input.strip() else "")
  response = record.references[0] if record.references else ""
  return Rendered(prompt, prompt + response, response)


def _single_turn(record: Record) -> str:
  """The instruction of [system,] user, assistant; other turns need a chat template."""
  roles = [message["role"] for message in record.messages]
  if kept := [key for key, _ in _beyond_text(record)]:
    raise UserError(
      f"{record.where}: {kept[0]!r} cannot be written with this template; set "
      "data.template=chat"
    )
  if roles not in (["user"], ["system", "user"]):
    raise UserError(
      f"{record.where}: a conversation of roles {', '.join(roles)}, assistant cannot "
      "be written with this template; set data.template=chat"
    )
  return "\n\n".join(message["content"] for message in record.messages)


# Templates as text


def _make_fill(template: str) -> Fill:
  if template in NAMED:
    short, long = NAMED[template]
    return lambda instruction, extra: _substitute(
      long if extra else short, {"instruction": instruction, "input": extra}
    )
  template = template_text(template, None)
  if "{%" in template or "{{" in template:
    return _jinja_fill(template)
  return _plain_fill(template)


def _read_template(path: str) -> str:
  try:
    with open(path, encoding="utf-8", newline="") as file:
      return file.read().replace("\r\n", "\n")
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f"{path}: the template cannot be read ({error})") from error


def _plain_fill(template: str) -> Fill:
  names = set(_PLACEHOLDER.findall(template))
  if "instruction" not in names:
    raise UserError(
      f"data.template={template!r} is no template: use {', '.join(NAMED)}, chat, an "
      "existing file, or text that contains {instruction}"
    )
  _check_names(names, template)
  return _with_input(
    lambda values: _substitute(template, values), has_input="input" in names
  )


def _jinja_fill(template: str) -> Fill:
  try:
    names = jinja2.meta.find_undeclared_variables(_JINJA.parse(template))
    compiled = _JINJA.from_string(template)
  except jinja2.TemplateError as error:
    raise UserError(f"data.template: not valid jinja2 ({error})") from error
  _check_names(names, template)
  if "instruction" not in names:
    raise UserError(f"data.template={template!r} never uses instruction; add it")

  def fill(values: Mapping[str, str]) -> str:
    try:
      return compiled.render(values)
    except (jinja2.TemplateError, TypeError, ValueError) as error:
      raise UserError(f"data.template: fails with {error}") from error

  return _with_input(fill, has_input="input" in names)


def _check_names(names: set[str], template: str) -> None:
  unknown = sorted(names - set(_FIELDS))
  if unknown:
    raise UserError(
      f"data.template={template!r} uses {', '.join(unknown)}; it may use instruction "
      "and input (the response follows by itself)"
    )


def _with_input(fill: Callable[[Mapping[str, str]], str], has_input: bool) -> Fill:
  """Puts the input behind the instruction if a template has no place for it."""

  def filled(instruction: str, extra: str) -> str:
    if extra and not has_input:
      instruction, extra = _joined(instruction, extra), ""
    return fill({"instruction": instruction, "input": extra})

  return filled


def _joined(instruction: str, extra: str) -> str:
  return f"{instruction}\n\n{extra}" if extra.strip() else instruction


def _substitute(template: str, values: Mapping[str, str]) -> str:
  """Fills placeholders in one pass: braces in the values are never filled again."""
  return _PLACEHOLDER.sub(lambda match: values[match[1]], template)


# Chat templates


def _chat_render(tokenizer: PreTrainedTokenizerBase) -> Render:
  if not tokenizer.chat_template:
    raise UserError(
      "data.template=chat, but the tokenizer has no chat template; use "
      f"{' or '.join(NAMED)}, or a tokenizer that has one"
    )

  write = functools.partial(_write, tokenizer)
  proved: set[tuple[str, str]] = set()  # keys that the template has a place for

  def render(record: Record) -> Rendered:
    if record.is_text:
      return Rendered("", record.text, record.text)
    messages, tools = _as_messages(record), record.tools
    prompt = write(messages, record, tools, prompt=True)
    text, answer = "", []
    if record.references:
      text = record.references[0]
      answer = [{"role": "assistant", **record.final, "content": text}]
      if not record.ended:  # the template would write the end of the turn
        return Rendered(prompt, prompt + text, text, chat=True)
    whole = [*messages, *answer]
    full = write(whole, record, tools)
    for key, role in _beyond_text(record):
      if (key, role) not in proved and _without(write, whole, record, key) == full:
        raise UserError(
          f"{record.where}: the tokenizer's chat template has no place for {key!r}"
        )
      proved.add((key, role))
    if not answer:
      return Rendered(prompt, prompt, "", chat=True)
    if full.startswith(prompt):
      return Rendered(prompt, full, full[len(prompt) :], chat=True)
    # Some templates rewrite earlier turns once there is an answer. What will be
    # asked at generation time is the prompt, so that is what must be trained on.
    response = _behind(write, record, prompt)
    return Rendered(prompt, prompt + response, response, chat=True, astray=True)

  return render


Write = Callable[..., str]


def _write(
  tokenizer: PreTrainedTokenizerBase,
  messages: Sequence[Mapping[str, Any]],
  record: Record,
  tools: Sequence[Any] | None,
  prompt: bool = False,
) -> str:
  """Messages as the chat template has them; a UserError where it refuses them."""
  tools = list(tools) if tools else None
  try:
    return tokenizer.apply_chat_template(
      list(messages),
      tools=tools,
      chat_template=dated(tokenizer.get_chat_template(tools=tools)),
      tokenize=False,
      add_generation_prompt=prompt,
    )
  except (jinja2.TemplateError, TypeError, ValueError) as error:
    raise UserError(
      f"{record.where}: the tokenizer's chat template refuses the messages ({error})"
    ) from error


def _beyond_text(record: Record) -> list[tuple[str, str]]:
  """(key, role) of what a conversation says beside its text, which must not be lost.

  Reasoning of earlier turns is not among it: templates leave that out on purpose.
  """
  found = [("tools", "")] if record.tools else []
  found += [("tool_calls", m["role"]) for m in record.messages if m.get("tool_calls")]
  found += [
    (k, "assistant") for k in ("tool_calls", *_REASONING) if record.final.get(k)
  ]
  return found


def _without(
  write: Write, messages: Sequence[Mapping[str, Any]], record: Record, key: str
) -> str:
  """The conversation without a key."""
  if key == "tools":
    return write(messages, record, None)
  stripped = [{k: v for k, v in m.items() if k != key} for m in messages]
  return write(
    [m | {"content": m.get("content", "")} for m in stripped], record, record.tools
  )


def _behind(write: Write, record: Record, prompt: str) -> str:
  """The answer and its end, as the template would write them behind its prompt.

  What the prompt has opened already, such as <think>, is not said again. The end is
  what the template writes after an answer that it leaves alone.
  """
  messages, text = _as_messages(record), record.references[0]
  plain = write(
    [*messages, {"role": "assistant", "content": _MARK}], record, record.tools
  )
  before, marked, end = plain.rpartition(_MARK)
  if not marked:
    return text
  opened = prompt.removeprefix(before) if prompt.startswith(before) else ""
  for start in (opened, opened.strip()):
    if start and text.startswith(start):
      text = text.removeprefix(start)
      break
  return text + end


def _as_messages(record: Record) -> list[Mapping[str, Any]]:
  if record.is_chat:
    return list(record.messages)
  return [{"role": "user", "content": _joined(record.prompt, record.input)}]


# From a model's tokens to a row


def decode_response(
  tokenizer: PreTrainedTokenizerBase,
  prompt: Int[np.ndarray, " P"],
  response: Int[np.ndarray, " R"],
  ended: bool,
) -> str:
  """What a model said after a prompt, such that both together are one text again.

  Encoding it may yield other tokens that spell the same, if the model's were not what
  the tokenizer would have chosen.

  response: without the token that ended it; `ended` False says that there was none.
  """

  def decode(tokens: Int[np.ndarray, " T"], skip: bool = True) -> str:
    return tokenizer.decode(
      tokens, skip_special_tokens=skip, clean_up_tokenization_spaces=False
    )

  # Behind its prompt, since some tokenizers drop the space that a text begins with.
  before, whole = decode(prompt), decode(np.concatenate([prompt, response]))
  text = whole[len(before) :] if whole.startswith(before) else decode(response)
  if not ended:
    text = text.rstrip("\ufffd")  # a character that the cut has split
    text = text or decode(response, skip=False)
  # Silence is a response, but no row may be blank: there the end is written out.
  return text if text.strip() else text + tokenizer.eos_token


def answered_row(record: Record, response: str, ended: bool = True) -> dict[str, Any]:
  """The record as a row to be written, with another response than its own."""
  match record.kind:
    case "messages":
      final = {"role": "assistant", "content": response}
      tools = {"tools": list(record.tools)} if record.tools else {}
      row = {"messages": [*record.messages, final]} | tools
    case "completion":
      row = {"prompt": record.prompt, "completion": response}
    case _:
      extra = {"input": record.input} if record.input else {}
      row = {"instruction": record.prompt, **extra, "output": response}
  if record.teacher_prompt:
    row["teacher_prompt"] = record.teacher_prompt
  if record.teacher_messages:
    row["teacher_messages"] = list(record.teacher_messages)
  return row if ended else row | {"ended": False}
