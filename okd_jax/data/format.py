"""Turns records into text: prompt templates, and what of the text is the response.

And back: what a model has said becomes text (`decode_response`) and a row of data
(`answered_row`).

A template only ever decides what the model reads before it answers. `render` gives
the prompt, and prompt and response as one text, because a tokenizer may merge what
stands left and right of the seam (see `encode.py`).
"""

import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import jinja2
import jinja2.meta
import numpy as np
from jaxtyping import Int
from transformers import PreTrainedTokenizerBase

from okd_jax.data.chat import (
  Render,
  Rendered,
  beyond_text,
  chat_render,
  joined,
)
from okd_jax.data.sandbox import Sandbox, rendered
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
KEY, FIELDS = "data.template", ("instruction", "input")
_PLACEHOLDER = re.compile(r"\{(\w+)\}")
_JINJA = Sandbox(keep_trailing_newline=True, undefined=jinja2.StrictUndefined)

Values = Mapping[str, str]  # of 'instruction', 'input' and perhaps 'output'
Fill = Callable[[Values], str]  # to a prompt


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
    return chat_render(tokenizer)
  fill = make_fill(template)
  return lambda record: _render(record, fill)


def template_text(template: str, tokenizer: PreTrainedTokenizerBase | None) -> str:
  """What `data.template` means: a name, a template, or a file's or tokenizer's one."""
  if template == "chat":
    return str(tokenizer.chat_template)
  if "{" not in template and os.path.isfile(template):
    return read_template(template)
  return template


def _render(record: Record, fill: Fill) -> Rendered:
  """A record outside chat; text and completions know no template."""
  match record.kind:
    case "text":
      return Rendered("", record.text, record.text)
    case "completion":
      prompt = record.prompt
    case "messages":
      prompt = fill({"instruction": single_turn(record), "input": ""})
    case _:
      extra = record.input if record.input.strip() else ""
      prompt = fill({"instruction": record.prompt, "input": extra})
  response = next(iter(record.references), "")
  return Rendered(prompt, prompt + response, response)


def single_turn(record: Record) -> str:
  """The instruction of [system,] user, assistant; other turns need a chat template."""
  roles = [message["role"] for message in record.messages]
  if kept := [key for key, _ in beyond_text(record)]:
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


def make_fill(template: str, fields: tuple[str, ...] = FIELDS, key: str = KEY) -> Fill:
  """What fills a template in: named, in a file, text, or jinja2.

  Args:
    fields: names that it may use.
    key: of the configuration, for messages.

  Raises:
    UserError: if there is no such template, or it cannot be used.
  """
  if template in NAMED:
    short, long = NAMED[template]
    return lambda values: _substitute(long if values["input"] else short, values)
  template = template_text(template, None)
  if "{%" in template or "{{" in template:
    return _jinja_fill(template, fields, key)
  return _plain_fill(template, fields, key)


def read_template(path: str) -> str:
  """The text of a file that holds a template; a UserError if it cannot be read."""
  try:
    with open(path, encoding="utf-8", newline="") as file:
      return file.read().replace("\r\n", "\n")
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f"{path}: the template cannot be read ({error})") from error


def _plain_fill(template: str, fields: tuple[str, ...], key: str) -> Fill:
  names = set(_PLACEHOLDER.findall(template))
  if "instruction" not in names:
    raise UserError(
      f"{key}={template!r} is no template: use {', '.join(NAMED)}, chat, an "
      "existing file, or text that contains {instruction}"
    )
  _check_names(names, template, fields, key)
  return _with_input(
    lambda values: _substitute(template, values), has_input="input" in names
  )


def _jinja_fill(template: str, fields: tuple[str, ...], key: str) -> Fill:
  compiled = _JINJA.template(template, f"{key}: not valid jinja2")
  names = jinja2.meta.find_undeclared_variables(_JINJA.parse(template))
  _check_names(names, template, fields, key)
  if "instruction" not in names:
    raise UserError(f"{key}={template!r} never uses instruction; add it")

  def fill(values: Values) -> str:
    return rendered(compiled, values, f"{key}: fails")

  return _with_input(fill, has_input="input" in names)


def _check_names(
  names: set[str], template: str, fields: tuple[str, ...], key: str
) -> None:
  unknown = sorted(names - set(fields))
  if unknown:
    *first, last = fields
    raise UserError(
      f"{key}={template!r} uses {', '.join(unknown)}; it may use {', '.join(first)} "
      f"and {last} (the response follows by itself)"
    )


def _with_input(fill: Fill, has_input: bool) -> Fill:
  """Puts the input behind the instruction if a template has no place for it."""

  def filled(values: Values) -> str:
    if values["input"] and not has_input:
      whole = joined(values["instruction"], values["input"])
      values = {**values, "instruction": whole, "input": ""}
    return fill(values)

  return filled


def _substitute(template: str, values: Values) -> str:
  """Fills placeholders in one pass: braces in the values are never filled again."""
  return _PLACEHOLDER.sub(lambda match: values[match[1]], template)


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
