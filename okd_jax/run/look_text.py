"""A run before it runs, as text for a terminal."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from okd_jax.analysis import lengths
from okd_jax.data import Counts, Example, encode, rows, show_example
from okd_jax.data.format import NAMED, template_text
from okd_jax.data.limits import summary
from okd_jax.data.sources import Record
from okd_jax.errors import UserError
from okd_jax.run.look import Look, differing, lengths_of, longest_of

_LINES = 40  # of a template
_SHOWN = 1600  # characters of a row
_SEARCHED = 500  # rows, for one with several trained turns
_FILES = 20
_TALK = ("What is 1 + 1?", "2.", "And 2 + 2?", "4.")


def text(seen: Look, found: Mapping[str, Any]) -> str:
  """All of it; found: of `look.figures`."""
  parts = {
    "Data": _data(seen, found),
    "Lengths": _lengths(seen, found),
    "An epoch": _epoch(seen, found),
    "Rows, what is trained on between >>> and <<<": _examples(seen),
    "Template": _template(seen),
    "Special tokens": _special(found),
  }
  return "\n\n".join(
    "\n".join([title, "─" * len(title), *lines]) for title, lines in parts.items()
  )


def table(lines: Sequence[Sequence[str]]) -> Iterator[str]:
  """Columns beside each other, numbers to the right.

  >>> print("\\n".join(table([["", "rows"], ["a.jsonl", "1,234"]])))
             rows
  a.jsonl   1,234
  """
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  for line in lines:
    cells = [
      cell.rjust(width) if i and _is_number(lines, i) else cell.ljust(width)
      for i, (cell, width) in enumerate(zip(line, widths, strict=True))
    ]
    yield "   ".join(cells).rstrip()


def _is_number(lines: Sequence[Sequence[str]], column: int) -> bool:
  cells = [line[column] for line in lines[1:]]
  return all(cell.strip("≈% ")[:1].isdigit() or not cell for cell in cells)


def _data(seen: Look, found: Mapping[str, Any]) -> Iterator[str]:
  sources, held = found["sources"], found["held_out"]
  yield from table(
    [
      ["source", "records", "rows", "tokens"],
      *(_cells(own) for own in sources[:_FILES]),
      *([_cells(_sum(sources[_FILES:]))] if sources[_FILES:] else []),
      *([_cells(_sum(sources, "all"))] if len(sources) > 1 else []),
    ]
  )
  form = seen.settings.data.form
  yield ""
  yield from _fates("Read", summary(Counts(**found["records"]), form))
  used = "" if held["used"] == held["rows"] else f", {held['used']:,} of them used"
  yield f"Held out:  {held['rows']:,} rows{used}, {held['from']}"
  if held["records"]:
    yield from _fates("", summary(Counts(**held["records"]), form))
  if held["twins_left_out"]:
    twins = held["twins_left_out"]
    yield f"Left out:  {twins:,} rows, each the same as one held out"
  share = 100 * found["duplicates"] / len(seen.data.train)
  yield f"Twice:     {found['duplicates']:,} rows ({share:.1f} %) repeat another row"


def _fates(title: str, said: str) -> Iterator[str]:
  """What became of records, one fate a line."""
  for i, fate in enumerate(said.split("; ")):
    yield f"{'' if i or not title else title + ':':11}{fate}"


def _cells(own: Mapping[str, Any]) -> list[str]:
  return [own["name"], *(f"{own[key]:,}" for key in ("records", "rows", "tokens"))]


def _sum(sources: Sequence[Mapping[str, Any]], name: str = "") -> dict[str, Any]:
  keys = ("records", "rows", "tokens")
  total = {key: sum(own[key] for own in sources) for key in keys}
  return {"name": name or f"{len(sources)} more"} | total


def _lengths(seen: Look, found: Mapping[str, Any]) -> Iterator[str]:
  yield from lengths.histogram(lengths_of(seen.data.train), longest_of(seen))
  yield ""
  percentiles = found["lengths"]["percentiles"]
  names = list(next(iter(percentiles.values())))
  yield from table(
    [
      ["tokens", *names],
      *([kind, *(f"{own[n]:,}" for n in names)] for kind, own in percentiles.items()),
    ]
  )


def _epoch(seen: Look, found: Mapping[str, Any]) -> Iterator[str]:
  ways, batch = found["rows"], seen.settings.train.batch_size
  yield from table(
    [
      ["data.pack", "rows", f"steps of {batch}", "padding"],
      *(
        [
          f"{name}{', as set' if way == ways['used'] else ''}",
          f"{ways[way]['rows']:,}",
          f"{ways[way]['steps_an_epoch']:,}",
          f"{100 * ways[way]['padding']:.1f} %",
        ]
        for name, way in (("False", "plain"), ("True", "packed"))
        if way in ways
      ),
    ]
  )
  yield ""
  run = found["run"]
  yield f"The run takes {run['steps']:,} steps, {run['epochs']:.2f} epochs"
  tokens = found["tokens"]
  few = tokens["estimated_from_rows"]
  guess = f" (estimated from {few:,} rows)" if few else ""
  yield (
    f"Trained on {tokens['trained']:,} of {tokens['all']:,} tokens, "
    f"{100 * tokens['share']:.1f} %{guess}"
  )


def _examples(seen: Look) -> Iterator[str]:
  train, tokenizer = seen.data.train, seen.data.tokenizer
  for i, at in enumerate(_chosen(train)):
    yield from ([""] if i else [])
    yield _cut(show_example(train[at], tokenizer))
  if rows.privileged(train):
    at = int(np.argmax(rows.column(train, "teacher_length") > 0))
    yield ""
    yield f"{train[at].where}: what the teacher reads in the prompt's place"
    yield _cut(tokenizer.decode(train[at].teacher_prompt))


def _chosen(train: Sequence[Example]) -> list[int]:
  """The first row, one with several trained turns or of the middle, the longest."""
  several = (i for i in range(min(len(train), _SEARCHED)) if len(train[i].spans) > 1)
  middle = next(several, len(train) // 2)
  longest = int(np.argmax(rows.column(train, "length")))
  return list(dict.fromkeys([0, middle, longest]))


def _cut(shown: str) -> str:
  """Beginning and end of what is very long."""
  if len(shown) <= _SHOWN:
    return shown
  half = _SHOWN // 2
  left_out = f"\n[… {len(shown) - _SHOWN:,} characters …]\n"
  return shown[:half] + left_out + shown[-half:]


def _template(seen: Look) -> Iterator[str]:
  data, tokenizer = seen.settings.data, seen.data.tokenizer
  origin = data.chat_template or "the tokenizer's"
  name = f"chat, {origin}" if data.template == "chat" else data.template
  yield f"data.template={name}" if "{" not in name else "data.template"
  yield ""
  if data.template in NAMED:
    short, long = NAMED[data.template]
    whole = f"{short}\n\nand with an input\n\n{long}"
  else:
    whole = template_text(data.template, tokenizer)
  lines = whole.rstrip("\n").split("\n")
  yield from lines[:_LINES]
  if len(lines) > _LINES:
    yield f"[… {len(lines) - _LINES} more lines …]"
  if data.template == "chat":
    yield ""
    yield "and a conversation of two turns under it"
    yield ""
    yield _two_turns(seen)


def _two_turns(seen: Look) -> str:
  roles = ("user", "assistant", "user")
  messages = tuple(
    {"role": role, "content": said} for role, said in zip(roles, _TALK, strict=False)
  )
  record = Record("messages", "example", messages=messages, references=_TALK[-1:])
  tokenizer, turns = seen.data.tokenizer, seen.settings.data.turns
  room = {"max_length": 1 << 20, "max_prompt_length": 1 << 20}
  try:
    made = encode(record, tokenizer, "chat", turns=turns, **room)
  except UserError as error:
    return str(error)
  return "\n\n".join(show_example(example, tokenizer) for example in made)


def _special(found: Mapping[str, Any]) -> Iterator[str]:
  special = found["special_tokens"]
  names, apart = list(next(iter(special.values()))), differing(special)
  yield from table(
    [
      ["", *names, ""],
      *(
        [
          kind,
          *(", ".join(own[name]) or "none" for name in names),
          "← differs" if kind in apart else "",
        ]
        for kind, own in special.items()
      ),
    ]
  )
  for sentence in found["warnings"]:
    yield ""
    yield f"Warning: {sentence}"
