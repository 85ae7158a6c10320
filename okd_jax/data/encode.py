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
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Int
from transformers import PreTrainedTokenizerBase

from okd_jax.data.format import Rendered, make_render
from okd_jax.data.limits import Counts, Limits, nothing_left, summary
from okd_jax.data.sources import Record
from okd_jax.errors import UserError

_STOP = "\n"  # before a response, to be taken off again
_BATCH = 1000  # texts a call: a fast tokenizer holds a good deal for every token


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Example:
  """One row: the first `prompt_length` tokens are given, the rest is trained on.

  `prompt_length` is 0 for plain text. `references` are the acceptable responses
  (none for plain text), `where` is the file and line, `record` what it was made of.
  """

  tokens: Int[np.ndarray, " L"]
  prompt_length: int
  references: tuple[str, ...]
  where: str
  record: Record | None = None


def prepare(
  records: Sequence[Record],
  tokenizer: PreTrainedTokenizerBase,
  template: str = "default",
  name: str = "data",
  **limits: int | str,
) -> tuple[list[Example], Counts]:
  """Encodes a dataset and logs in one line what had to be dropped or cut.

  Args:
    records: of `load_records`.
    tokenizer: of the models that will read the rows.
    template: see `format.make_render`.
    name: what the log line calls the dataset.
    **limits: the fields of `Limits`.

  Returns:
    (rows in the order of the records, what became of the records).

  Raises:
    UserError: if no row is left, or one cannot be encoded.

  Source: the seam between prompt and response is treated as at the head of this file.

  >>> from okd_jax.data import make_tokenizer
  >>> record = Record("completion", "here", prompt="1 + 1 =", references=(" 2",))
  >>> [example], counts = prepare([record], make_tokenizer("bytes", []))
  >>> example.prompt_length, example.tokens[7:].tolist(), counts.kept
  (7, [32, 50, 256], 1)
  """
  bounds = Limits(**limits)
  if not records:
    raise UserError("the dataset holds no records")
  examples, tally = _encode(records, tokenizer, template, bounds)
  counts = Counts(rows=len(records), kept=len(examples), **tally)
  if not examples:
    raise UserError(nothing_left(counts, bounds))
  logging.getLogger("okd_jax").info("%s: %s", name, summary(counts, bounds))
  return examples, counts


def encode(
  record: Record,
  tokenizer: PreTrainedTokenizerBase,
  template: str = "default",
  **limits: int | str,
) -> list[Example]:
  """Encodes one record: no row if it is dropped, several if it is a long text.

  Args, Raises: as `prepare`.
  """
  return _encode([record], tokenizer, template, Limits(**limits))[0]


def stop_ids(
  tokenizer: PreTrainedTokenizerBase, template: str = "default"
) -> tuple[int, ...]:
  """Ids that end a response: EOS, and the end of turn that a chat template writes."""
  ids = {_eos_id(tokenizer)}
  if template == "chat":
    messages = ({"role": "user", "content": "a"},)
    record = Record("messages", "chat template", messages=messages, references=("b",))
    room = 1 << 20
    [example] = encode(
      record, tokenizer, template, max_length=room, max_prompt_length=room
    )
    ids.add(int(example.tokens[-1]))
  return tuple(sorted(ids))


def show_example(example: Example, tokenizer: PreTrainedTokenizerBase) -> str:
  """One row as text, what is trained on between `>>>` and `<<<`."""
  start = example.prompt_length
  prompt = tokenizer.decode(example.tokens[:start])
  trained = tokenizer.decode(example.tokens[start:])
  targets = len(example.tokens) - max(start, 1)
  return (
    f"{example.where}: {start} prompt tokens, then {targets} trained, "
    f"between >>> and <<<\n{prompt}>>>{trained}<<<"
  )


def clean(record: Record, tokenizer: PreTrainedTokenizerBase) -> Record:
  """Takes a literal end token off the references: the end is ours to put.

  Some published sets write it out. One that is nothing else asks for silence.
  """
  _eos_id(tokenizer)
  eos = tokenizer.eos_token
  if not any(text.endswith(eos) for text in record.references):
    return record
  references = tuple(text.removesuffix(eos) for text in record.references)
  return dataclasses.replace(record, references=references)


# Rows of tokens


def _encode(
  records: Sequence[Record],
  tokenizer: PreTrainedTokenizerBase,
  template: str,
  limits: Limits,
) -> tuple[list[Example], collections.Counter]:
  """Examples of all records, and how many rows met which fate."""
  render = make_render(template, tokenizer)
  tally, examples = collections.Counter(), []
  for start in range(0, len(records), _BATCH):
    batch = [clean(r, tokenizer) for r in records[start : start + _BATCH]]
    texts = [render(record) for record in batch]
    tally["rewritten"] += sum(text.astray for text in texts)
    rows = _split(texts, [record.ended for record in batch], tokenizer, tally)
    for record, (prompt, response) in zip(batch, rows, strict=True):
      if record.is_text:
        examples += _windows(record, response, limits, tally)
      else:
        examples += _fit(record, prompt, response, limits, tally, tokenizer)
  return examples, tally


def _split(
  texts: Sequence[Rendered],
  ended: Sequence[bool],
  tokenizer: PreTrainedTokenizerBase,
  tally: collections.Counter,
) -> Iterable[tuple[list[int], list[int]]]:
  """(prompt, response with its end if it has one) of each text, in tokens."""
  prompts = _tokens([text.prompt for text in texts], tokenizer)
  fulls = _tokens([text.full for text in texts], tokenizer)
  some = next((t.full for t, ids in zip(texts, fulls, strict=True) if ids), "")
  front, special = front_ids(tokenizer, some), _special_ids(tokenizer)
  responses = [
    full[len(prompt) :] if full[: len(prompt)] == prompt else None
    for prompt, full in zip(prompts, fulls, strict=True)
  ]
  astray = [i for i, response in enumerate(responses) if response is None]
  tally["straddled"] += len(astray)
  ways = _ways([texts[i].response for i in astray], tokenizer)
  for i, some_ways in zip(astray, ways, strict=True):
    whole = tokenizer.decode(fulls[i])
    right = (ids for ids in some_ways if tokenizer.decode(prompts[i] + ids) == whole)
    responses[i] = next(right, some_ways[0])
  for text, whole, prompt, response in zip(
    texts, ended, prompts, responses, strict=True
  ):
    if whole and text.chat:
      response = _through_end_of_turn(response, tokenizer, special)
    elif whole:
      response = _ended(response, tokenizer)
    if text.chat:
      yield prompt, response
    elif text.prompt:
      yield after(front, prompt), response
    else:
      yield [], after(front, response)


def _ways(
  responses: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> list[list[list[int]]]:
  """Tokens of each response alone, and behind something that none reaches across.

  Some tokenizers put a space before whatever they are given alone, but not there.
  """
  alone = _tokens(responses, tokenizer)
  behind = _tokens([_STOP + response for response in responses], tokenizer)
  [stop] = _tokens([_STOP], tokenizer)
  cut = [[x[len(stop) :]] if x[: len(stop)] == stop else [] for x in behind]
  return [[first, *others] for first, others in zip(alone, cut, strict=True)]


def _ended(response: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
  eos = _eos_id(tokenizer)
  return response if response and response[-1] == eos else [*response, eos]


def _through_end_of_turn(
  response: list[int], tokenizer: PreTrainedTokenizerBase, special: frozenset[int]
) -> list[int]:
  """A chat response without what its template writes after the end of turn.

  The newline that ChatML puts there, say, is part of the next turn: a model that has
  said `<|im_end|>` is never asked for it.
  """
  ends = [i for i, token in enumerate(response) if token in special]
  if ends and not tokenizer.decode(response[ends[-1] + 1 :]).strip():
    return response[: ends[-1] + 1]
  return _ended(response, tokenizer)


def _fit(
  record: Record,
  prompt: list[int],
  response: list[int],
  limits: Limits,
  tally: collections.Counter,
  tokenizer: PreTrainedTokenizerBase,
) -> list[Example]:
  """The row, cut to the limits; nothing if it has to be dropped."""
  if not prompt:
    raise UserError(f"{record.where}: the prompt has no tokens; give it some text")
  if not response:
    raise UserError(
      f"{record.where}: 'ended' is false, but the response has no tokens; give it some "
      "text, or remove the record"
    )
  if len(prompt) > limits.max_prompt_length:
    if limits.overlong_prompt == "drop":
      tally["dropped_prompts"] += 1
      return []
    tally["truncated_prompts"] += 1
    prompt = _last_tokens(prompt, limits.max_prompt_length, tokenizer)
  if len(prompt) + len(response) > limits.max_length:
    if limits.overlong_row == "drop" or len(prompt) >= limits.max_length:
      tally["dropped_rows"] += 1
      return []
    tally["truncated_rows"] += 1
  tokens = np.array((prompt + response)[: limits.max_length], np.int32)
  return [Example(tokens, len(prompt), record.references, record.where, record)]


def _last_tokens(
  prompt: list[int], length: int, tokenizer: PreTrainedTokenizerBase
) -> list[int]:
  """The end of a prompt, where the question is; a BOS stays, for it is no text."""
  if length > 1 and prompt[0] == tokenizer.bos_token_id:
    return prompt[:1] + prompt[1 - length :]
  return prompt[-length:]


def _windows(
  record: Record, tokens: list[int], limits: Limits, tally: collections.Counter
) -> list[Example]:
  """A text in consecutive pieces, none of which repeats another's tokens."""
  if len(tokens) < 2:
    raise UserError(f"{record.where}: the text has no tokens; give it some text")
  size = limits.max_length
  pieces = [tokens[i : i + size] for i in range(0, len(tokens), size)]
  # The first token of a piece is given and not predicted, so a last piece of one
  # token holds nothing to train on.
  pieces = [piece for piece in pieces if len(piece) > 1]
  if len(tokens) > size:
    tally["windows"] += len(pieces)
  return [
    Example(np.array(piece, np.int32), 0, record.references, record.where, record)
    for piece in pieces
  ]


# What tokenizers differ in


def _tokens(
  texts: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> list[list[int]]:
  """Ids of each text, without anything that the tokenizer would add around it."""
  if not texts:
    return []
  return tokenizer(
    list(texts),
    add_special_tokens=False,
    return_attention_mask=False,
    return_token_type_ids=False,
    verbose=False,  # or it warns of texts longer than the model's context
  )["input_ids"]


def front_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
  """What the tokenizer puts before a text by default: BOS, or nothing.

  What it puts after one, an EOS say, is left out: a prompt has not ended.

  text: any; what is put there does not depend on it.
  """
  [bare] = _tokens([text], tokenizer)
  whole = tokenizer(text, verbose=False)["input_ids"]
  if not bare and whole:  # before nothing, or after it?
    words = (tokenizer.decode([i], skip_special_tokens=True) for i in _ids(tokenizer))
    some = next((word for word in words if _tokens([word], tokenizer)[0]), "")
    return front_ids(tokenizer, some) if some else []
  starts = range(len(whole) - len(bare) + 1)
  found = (start for start in starts if whole[start : start + len(bare)] == bare)
  return whole[: next(found, 0)]


def _ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
  return sorted(tokenizer.get_vocab().values())


def after(front: list[int], ids: list[int]) -> list[int]:
  """The ids behind what stands before a text, once: some texts write a BOS out."""
  return ids if ids[: len(front)] == front else front + ids


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
  """Ids that stand for no text, such as an end of turn."""
  added = tokenizer.added_tokens_decoder.items()
  return frozenset(tokenizer.all_special_ids) | {
    token for token, content in added if content.special
  }


def _eos_id(tokenizer: PreTrainedTokenizerBase) -> int:
  if tokenizer.eos_token_id is None:
    raise UserError(
      "the tokenizer has no end-of-text token, so a model could never stop; set "
      "eos_token in its tokenizer_config.json"
    )
  return tokenizer.eos_token_id
