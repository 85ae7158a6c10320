"""Chat templates of tokenizers: jinja2 as transformers has it, in `sandbox`'s limits.

transformers' own environment knows no limits and takes no other, so what it gives to a
template is given here: its globals, its way to write JSON, {% generation %} around what
the model says, and the names that reasoning goes by. A test compares the two.
"""

import contextvars
import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.utils
from transformers import PreTrainedTokenizerBase

from okd_jax.data.day import day
from okd_jax.data.sandbox import Sandbox, limited
from okd_jax.errors import UserError

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # marks what a model says
_REASONING = ("reasoning_content", "thinking", "reasoning")  # names of one thing
_OPEN = "6f70656e 656e64"  # stands at the end of a message that is to go on
_SAID: contextvars.ContextVar[list[Any] | None]
_SAID = contextvars.ContextVar("said", default=None)

Message = Mapping[str, Any]
Span = tuple[int, int]  # of characters, from where to where


def text_of(
  tokenizer: PreTrainedTokenizerBase,
  messages: Sequence[Message],
  what: str,
  *,
  tools: Sequence[Any] | None = None,
  prompt: bool = False,
  goes_on: bool = False,
) -> str:
  """Messages as the tokenizer's chat template writes them.

  Args:
    what: begins the sentence about a failure.
    tools: what the conversation may call.
    prompt: whether the opening of an answer follows.
    goes_on: whether the text stops behind the last message's content.

  Raises:
    UserError: where the template refuses the messages, fails or goes on for too long.
  """
  if not goes_on:
    return _written(tokenizer, messages, what, tools, prompt)[0]
  *before, last = messages
  marked = [*before, {**last, "content": last["content"] + _OPEN}]
  text, found, _ = _written(tokenizer, marked, what, tools, prompt)[0].rpartition(_OPEN)
  if not found:
    raise UserError(f"{what} (it leaves out the last message)")
  return text


def spans_of(
  tokenizer: PreTrainedTokenizerBase,
  messages: Sequence[Message],
  what: str,
  tools: Sequence[Any] | None,
) -> tuple[str, list[Span]] | None:
  """(text, where the model speaks in it), None for a template that marks nothing.

  Raises:
    UserError: as `text_of` does.
  """
  if not _GENERATION.search(source(tokenizer, tools)):
    return None
  return _written(tokenizer, messages, what, tools, False)


def source(tokenizer: PreTrainedTokenizerBase, tools: Sequence[Any] | None) -> str:
  """The template itself; of several, the one for tools where there are any.

  Raises:
    UserError: if there are several, and none for this.
  """
  try:
    found = tokenizer.get_chat_template(tools=list(tools) if tools else None)
  except (ValueError, TypeError) as error:
    raise UserError(f"the tokenizer's chat template: {error}") from error
  if not isinstance(found, str):
    raise UserError("the tokenizer's chat template is no text")
  return found


def _written(
  tokenizer: PreTrainedTokenizerBase,
  messages: Sequence[Message],
  what: str,
  tools: Sequence[Any] | None,
  prompt: bool,
) -> tuple[str, list[Span]]:
  template = _compiled(source(tokenizer, tools))
  parts: list[str] = []
  spans: list[Span] = []
  token = _SAID.set([parts, spans])
  try:
    with limited(what):
      for part in template.generate(
        **tokenizer.special_tokens_map,
        messages=list(map(_aliased, messages)),
        tools=[dict(tool) for tool in tools] if tools else None,
        documents=None,
        add_generation_prompt=prompt,
      ):
        parts.append(part)
      return template.environment.concat(parts), spans
  finally:
    _SAID.reset(token)


def _aliased(message: Message) -> Message:
  """The message, its reasoning under every name that templates know."""
  found = (message[k] for k in _REASONING if message.get(k) is not None)
  own = next(found, None)
  if own is None:
    return message
  return {"thinking": own, **message, "reasoning_content": own}


@functools.lru_cache(64)
def _compiled(text: str) -> jinja2.Template:
  return _environment().template(text, "the tokenizer's chat template is no jinja2")


@functools.cache
def _environment() -> Sandbox:
  own = Sandbox(
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=[_Generation, jinja2.ext.loopcontrols],
  )
  own.add_filter("tojson", _tojson)
  own.globals |= {"raise_exception": _raise, "strftime_now": _strftime_now}
  own.globals["namespace"] = _Namespace
  return own


class _Namespace(jinja2.utils.Namespace):
  """jinja2's own, for names that are a template's."""

  def __setitem__(self, name: str, value: Any) -> None:
    if name.startswith("_"):
      raise jinja2.exceptions.SecurityError(f"no namespace may hold {name!r}")
    super().__setitem__(name, value)


def _raise(message: Any) -> None:
  raise jinja2.TemplateError(str(message))


def _strftime_now(form: str) -> str:
  return day().strftime(form)  # a row does not depend on the clock


def _tojson(
  x: Any,
  ensure_ascii: bool = False,
  indent: int | None = None,
  separators: Any = None,
  sort_keys: bool = False,
) -> str:
  """JSON for models, where jinja2's own filter is for pages."""
  how = {"ensure_ascii": ensure_ascii, "indent": indent, "sort_keys": sort_keys}
  return json.dumps(x, separators=separators, **how)


class _Generation(jinja2.ext.Extension):
  """{% generation %} … {% endgeneration %}: what the model says."""

  tags = {"generation"}

  def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.CallBlock:
    """As in the base class."""
    line = next(parser.stream).lineno
    body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
    call = self.call_method("_noted")
    return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

  def _noted(self, caller: Any) -> str:
    said, text = _SAID.get(), caller()
    if said is not None:
      start = sum(map(len, said[0]))
      said[1].append((start, start + len(text)))
    return text


def mask(spans: Sequence[Span], offsets: Sequence[Span]) -> Iterator[int]:
  """1 for each token, by its place in the text, that reaches into one of the spans.

  >>> list(mask([(2, 4)], [(0, 2), (2, 3), (3, 5), (5, 6)]))
  [0, 1, 1, 0]
  """
  rest = list(spans)
  for start, end in offsets:
    while rest and start >= rest[0][1]:
      rest.pop(0)
    yield int(bool(rest) and end > rest[0][0])
