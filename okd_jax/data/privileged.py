"""What the teacher reads in place of the student's prompt: a hint, a worked solution.

A row says so itself (`teacher_prompt`, `teacher_messages`), or `data.teacher_template`
does for all rows. The answer is the same for both; they are compared on its tokens.

Source: learning using privileged information, Vapnik and Vashist 2009; with language
models context distillation, Snell et al. 2022, arXiv 2209.15189.
"""

import dataclasses
from collections.abc import Callable

from transformers import PreTrainedTokenizerBase

from okd_jax.data.chat import Rendered, as_messages
from okd_jax.data.format import (
  FIELDS,
  NAMED,
  make_fill,
  make_render,
  single_turn,
  template_text,
)
from okd_jax.data.sources import Record
from okd_jax.errors import UserError

_KEY = "data.teacher_template"


def teacher_render(
  template: str, teacher_template: str, tokenizer: PreTrainedTokenizerBase
) -> Callable[[Record], Rendered | None]:
  """The function that writes what the teacher reads; None where that is the same.

  Args:
    template: the student's, see `format.make_render`.
    teacher_template: likewise, `{output}` being the row's own answer; under a chat
      template a text stands in place of the last message. '' is the student's.

  Raises:
    UserError: if there is no such template, or it cannot be used.
  """
  if teacher_template not in ("", "chat", *NAMED):
    return _filled(template, teacher_template, tokenizer)
  render = make_render(teacher_template or template, tokenizer)

  def prompt(record: Record) -> Rendered | None:
    """What the teacher reads, by a named template; None for what the student does."""
    own = bool(record.teacher_prompt or record.teacher_messages)
    if record.is_text or not (own or teacher_template):
      return None
    return render(_swapped(record))

  return prompt


def _filled(
  template: str, teacher_template: str, tokenizer: PreTrainedTokenizerBase
) -> Callable[[Record], Rendered | None]:
  """As `teacher_render`, of a template that is text."""
  fill = make_fill(teacher_template, (*FIELDS, "output"), _KEY)
  chat = make_render("chat", tokenizer) if template == "chat" else None
  wants_answer = "output" in template_text(teacher_template, None)

  def prompt(record: Record) -> Rendered | None:
    """What the teacher reads, by the text filled in; None for a text."""
    if record.is_text:
      return None
    if wants_answer and not record.references:
      raise UserError(
        f"{record.where}: {_KEY} has a place for the answer, but the row is a prompt "
        "alone"
      )
    values = {"output": next(iter(record.references), "")}
    record = _swapped(record)
    if chat:
      *before, last = as_messages(record)
      values |= {"instruction": last.get("content", ""), "input": ""}
      messages = (*before, {**last, "content": fill(values)})
      return chat(dataclasses.replace(record, kind="messages", messages=messages))
    asked = single_turn(record) if record.is_chat else record.prompt
    text = fill(values | {"instruction": asked, "input": record.input})
    return Rendered(text, text, "")

  return prompt


def _swapped(record: Record) -> Record:
  """What the teacher is asked in place of the student, without the answer."""
  record = dataclasses.replace(record, references=())
  if record.teacher_messages:
    return dataclasses.replace(
      record,
      kind="messages",
      messages=record.teacher_messages,
      prompt="",
      input="",
    )
  if record.teacher_prompt:
    return dataclasses.replace(record, prompt=record.teacher_prompt)
  return record
