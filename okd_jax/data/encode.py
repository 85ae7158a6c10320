"""Turns rendered records into token rows, and decides what to do with long ones.

The rule: tokenise the prompt, and prompt and response together. If the
second begins with the first, the rest is the response; otherwise a token straddles
the seam, and the response is tokenised alone, so that a row always starts with the
very tokens that generation will be given. One end token follows, unless the row is
cut or says that its response was (`"ended": false`). What is trained on follows from
lengths alone, never from ids.
"""

import collections
import dataclasses
import logging
from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase

from okd_jax.data import turns
from okd_jax.data.chat import Rendered
from okd_jax.data.example import Example
from okd_jax.data.fit import Fitter
from okd_jax.data.format import make_render
from okd_jax.data.limits import Counts, Form, nothing_left, summary
from okd_jax.data.privileged import teacher_render
from okd_jax.data.sources import Record
from okd_jax.data.tokens import after, eos_id, front_ids, ids_of, special_ids
from okd_jax.errors import UserError

_STOP = "\n"  # before a response, to be taken off again
BATCH = 1000  # texts a call: a fast tokenizer holds a good deal for every token

Tally = collections.Counter  # how many rows met which fate
Encoder = Callable[[Sequence[Record], int], tuple[list[Example], Tally]]


def prepare(
  records: Sequence[Record],
  tokenizer: PreTrainedTokenizerBase,
  template: str = "default",
  name: str = "data",
  **form: int | str,
) -> tuple[list[Example], Counts]:
  """Encodes a dataset and logs in one line what had to be dropped or cut.

  Args:
    records: of `load_records`.
    tokenizer: of the models that will read the rows.
    template: see `format.make_render`.
    name: what the log line calls the dataset.
    **form: the other fields of `Form`.

  Returns:
    (rows in the order of the records, what became of the records).

  Raises:
    UserError: if no row is left, or one cannot be encoded.

  >>> from okd_jax.data import make_tokenizer
  >>> record = Record("completion", "here", prompt="1 + 1 =", references=(" 2",))
  >>> [example], counts = prepare([record], make_tokenizer("bytes", []))
  >>> example.prompt_length, example.tokens[7:].tolist(), counts.kept
  (7, [32, 50, 256], 1)
  """
  if not records:
    raise UserError("the dataset holds no records")
  whole, tally, examples = Form(template=template, **form), Tally(), []
  encoder = make_encoder(tokenizer, whole)
  for first in range(0, len(records), BATCH):
    rows, found = encoder(records[first : first + BATCH], first)
    examples += rows
    tally += found
  counts = counted(tally, len(records), len(examples), whole)
  logging.getLogger("okd_jax").info("%s: %s", name, summary(counts, whole))
  return examples, counts


def counted(tally: Tally, rows: int, kept: int, form: Form) -> Counts:
  """What became of all records; a UserError if no row is left of them."""
  counts = Counts(rows=rows, kept=kept, **tally)
  if not kept:
    raise UserError(nothing_left(counts, form))
  return counts


def encode(
  record: Record,
  tokenizer: PreTrainedTokenizerBase,
  template: str = "default",
  **form: int | str,
) -> list[Example]:
  """Encodes one record: no row if it is dropped, several if it is a long text.

  Args, Raises: as `prepare`.
  """
  return make_encoder(tokenizer, Form(template=template, **form))([record], 0)[0]


def stop_ids(
  tokenizer: PreTrainedTokenizerBase, template: str = "default"
) -> tuple[int, ...]:
  """Ids that end a response: EOS, and the end of turn that a chat template writes."""
  ids = {eos_id(tokenizer)}
  if template == "chat":
    ids.add(int(short_chat(tokenizer).tokens[-1]))
  return tuple(sorted(ids))


def short_chat(tokenizer: PreTrainedTokenizerBase, turns: str = "last") -> Example:
  """The row of a question and its answer, each a letter, by the chat template."""
  messages = ({"role": "user", "content": "a"},)
  record = Record("messages", "chat template", messages=messages, references=("b",))
  room = 1 << 20
  form = {"max_length": room, "max_prompt_length": room, "turns": turns}
  return encode(record, tokenizer, "chat", **form)[0]


def clean(record: Record, tokenizer: PreTrainedTokenizerBase) -> Record:
  """Takes a literal end token off the references: the end is ours to put.

  Some published sets write it out. One that is nothing else asks for silence.
  """
  return _cleaned(record, tokenizer.eos_token)


def _cleaned(record: Record, eos: str) -> Record:
  said = [m.get("content") for m in record.messages if m["role"] == "assistant"]
  if not any(text and text.endswith(eos) for text in (*record.references, *said)):
    return record
  return dataclasses.replace(
    record,
    references=tuple(text.removesuffix(eos) for text in record.references),
    messages=tuple(
      {**m, "content": m["content"].removesuffix(eos)}
      if m["role"] == "assistant" and m.get("content")
      else m
      for m in record.messages
    ),
  )


def make_encoder(tokenizer: PreTrainedTokenizerBase, form: Form) -> Encoder:
  """The function that makes rows of some records, the first of them of this number.

  Raises:
    UserError: if the template cannot be used; the function, for a row that cannot.
  """
  eos_id(tokenizer)
  render = make_render(form.template, tokenizer)
  of_teacher = teacher_render(form.template, form.teacher_template, tokenizer)
  fitter, last = Fitter(tokenizer, form), dataclasses.replace(form, turns="last")
  # Of a turn that is a row of its own the earlier ones are trained elsewhere.
  alone = _nobody if form == last else make_encoder(tokenizer, last)

  def fits(record: Record) -> bool:
    [row] = _split([render(record)], [record.ended], tokenizer)
    return not fitter.too_long(record, *row[:2])

  def encoder(records: Sequence[Record], first: int) -> tuple[list[Example], Tally]:
    tally, examples, eos = Tally(), [], tokenizer.eos_token  # which is slow to ask for
    records = [_cleaned(record, eos) for record in records]
    texts = list(map(render, records))
    ended = [r.ended and bool(r.is_text or r.references) for r in records]
    rows = _split(texts, ended, tokenizer)
    teacher = _prompts(list(map(of_teacher, records)), tokenizer)
    for i, record in enumerate(records):
      prompt, response, straddled = rows[i]
      long = fitter.too_long(record, prompt, response)
      if less := long and turns.shortened(record, fits):
        found, fate = encoder([less], first + i)
        fate["shortened"] = min(len(found), 1)
      else:
        found, lost, fate = fitter.fit(record, prompt, response, teacher[i])
        fate += Tally(straddled=straddled, rewritten=texts[i].astray)
        own, more = alone([turns.ending_at(record, t) for t in lost], 0)
        found, fate = found + own, fate + more + Tally(apart=len(own))
      examples += [dataclasses.replace(e, number=first + i) for e in found]
      tally += fate
    return examples, tally

  return encoder


def _nobody(records: Sequence[Record], first: int) -> tuple[list[Example], Tally]:
  """The encoder of no records."""
  return [], Tally()


# Rows of tokens


def _split(
  texts: Sequence[Rendered], ended: Sequence[bool], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[list[int], list[int], bool]]:
  """(prompt, response with its end if it has one, whether a token straddled them)."""
  prompts = ids_of([text.prompt for text in texts], tokenizer)
  fulls = ids_of([text.full for text in texts], tokenizer)
  some = next((t.full for t, ids in zip(texts, fulls, strict=True) if ids), "")
  front, special = front_ids(tokenizer, some), special_ids(tokenizer)
  eos = eos_id(tokenizer)
  responses = [
    full[len(prompt) :] if full[: len(prompt)] == prompt else None
    for prompt, full in zip(prompts, fulls, strict=True)
  ]
  astray = {i for i, response in enumerate(responses) if response is None}
  ways = _ways([texts[i].response for i in sorted(astray)], tokenizer)
  for i, some_ways in zip(sorted(astray), ways, strict=True):
    whole = tokenizer.decode(fulls[i])
    right = (ids for ids in some_ways if tokenizer.decode(prompts[i] + ids) == whole)
    responses[i] = next(right, some_ways[0])
  rows = []
  for i, text in enumerate(texts):
    prompt, response = prompts[i], responses[i]
    if ended[i]:
      response = _ended(response, text.chat, tokenizer, special, eos)
    if not text.prompt:
      prompt, response = [], after(front, response)
    elif not text.chat:
      prompt = after(front, prompt)
    rows.append((prompt, response, i in astray))
  return rows


def _prompts(
  texts: Sequence[Rendered | None], tokenizer: PreTrainedTokenizerBase
) -> list[list[int] | None]:
  """The tokens of prompts alone, None where there is none."""
  there = [text for text in texts if text is not None]
  if not there:
    return [None] * len(texts)
  ids = iter(ids_of([text.prompt for text in there], tokenizer))
  front = front_ids(tokenizer, there[0].prompt)
  found = {
    id(text): own if text.chat else after(front, own)
    for text, own in zip(there, ids, strict=True)
  }
  return [None if text is None else found[id(text)] for text in texts]


def _ways(
  responses: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> list[list[list[int]]]:
  """Tokens of each response alone, and behind something that none reaches across.

  Some tokenizers put a space before whatever they are given alone, but not there.
  """
  alone = ids_of(responses, tokenizer)
  behind = ids_of([_STOP + response for response in responses], tokenizer)
  [stop] = ids_of([_STOP], tokenizer)
  cut = [[x[len(stop) :]] if x[: len(stop)] == stop else [] for x in behind]
  return [[first, *others] for first, others in zip(alone, cut, strict=True)]


def _ended(
  response: list[int],
  chat: bool,
  tokenizer: PreTrainedTokenizerBase,
  special: frozenset[int],
  eos: int,
) -> list[int]:
  """A response through its end: that of its turn in a chat, else EOS, once."""
  if chat:
    through = turns.through_end(response, tokenizer, special)
    if through and through[-1] in special:
      return through
  return response if response and response[-1] == eos else [*response, eos]
