"""The default data: questions about Python's standard library, made at run time.

Every Python carries its own documentation, so this needs no download. Each
documented function, class or method of a fixed list of modules becomes a few short
instruction and response pairs (what it does, how it is called, which one does this,
what its parameters are), each topic of `help()` one more. The text depends on the
Python version and on nothing else: no addresses, no paths, no hash order.
"""

import functools
import hashlib
import importlib
import inspect
import re
import types
from collections.abc import Iterator

from okd_jax.errors import UserError

# Importing these changes nothing, and all exist wherever Python does. What depends
# on the platform (os, signal, locale) or on optional libraries (ssl, zlib) is out; so
# is what torch, test runners and debuggers patch (inspect, linecache, threading).
_MODULES = """
  argparse array ast base64 bisect builtins calendar cmath cmd code codecs
  collections colorsys configparser contextlib copy csv dataclasses datetime
  decimal difflib dis email.message email.utils enum filecmp fileinput fnmatch
  fractions functools gc getopt gettext glob graphlib heapq hmac html html.parser
  http.client http.cookiejar http.cookies http.server io ipaddress itertools json
  keyword logging logging.handlers mailbox math mimetypes operator optparse
  pathlib pickle pkgutil plistlib pprint queue random re reprlib sched secrets
  selectors shelve shlex shutil socketserver statistics string struct subprocess
  tarfile tempfile textwrap timeit tokenize trace types typing unicodedata
  unittest urllib.parse urllib.request uuid weakref xml.dom.minidom
  xml.etree.ElementTree xmlrpc.client zipfile
""".split()

_WHAT = (
  "What does {name} do?",
  "Explain {name} in one sentence.",
  "What is {name} for?",
  "Describe {name} briefly.",
  "Summarise the Python documentation of {name}.",
)
_CALL = (
  "Write the call signature of {name}.",
  "How is {name} called?",
  "Which arguments does {name} take? Answer with its signature.",
)
_WHICH = (
  "Which Python {kind} does this describe?",
  "Name the Python {kind} that fits this description.",
  "Which {kind} of the standard library is meant?",
)
_PARAMETERS = (
  "List the parameters of this Python {kind}, separated by commas.",
  "Name every parameter in this signature.",
)
_TOPIC = (
  "Explain the Python topic {name}.",
  "What does the Python reference say about {name}?",
)

_HELD_OUT = 20  # one object in so many is for evaluation
_MAX_WORDS = 60
_MAX_SIGNATURE = 120
# What may differ between two machines: addresses, objects' reprs, absolute paths.
_UNSTABLE = re.compile(
  r" at 0x|<[\w.]+ (object|of|at)|(?<![\w.:/])/(home|root|usr|opt|var|tmp|Users|work)/"
  r"|[A-Z]:\\"
)
_SIGNATURE_LINE = re.compile(r"[\w.]+\(.*\)(\s*(->|-->|--|:).*)?")
_SENTENCE_END = re.compile(r"(?<!e\.g)(?<!i\.e)(?<!etc)[.!?](?=\s+[A-Z`'\"(*]|$)")

Row = tuple[dict[str, str], str]


def rows(split: str = "train") -> list[Row]:
  """Instruction rows with their places: `train`, or `eval`, about 5% of the objects.

  The order is fixed and well mixed, so that the first n rows are a fair sample. No
  object has rows in both parts.
  """
  if split not in ("train", "eval"):
    raise UserError(
      f"embedded:{split}: no such part; use embedded (to train) or embedded:eval"
    )
  return [
    (dict(row), f"embedded:{name}")
    for name, row in _all_rows()
    if is_held_out(name) == (split == "eval")
  ]


def is_held_out(name: str) -> bool:
  """Whether the object of this name belongs to the evaluation part."""
  return _number(name) % _HELD_OUT == 0


@functools.cache
def _all_rows() -> tuple[tuple[str, dict[str, str]], ...]:
  """(object name, row) of everything, shuffled by a hash that never changes."""
  found = {}
  for name, row in (*_object_rows(), *_topic_rows()):
    found.setdefault((row["instruction"], row["input"]), (name, row))
  order = sorted(
    found, key=lambda key: hashlib.blake2b("\n".join(key).encode()).digest()
  )
  return tuple(found[key] for key in order)


# Objects of the standard library


def _object_rows() -> Iterator[tuple[str, dict[str, str]]]:
  things = _documented()
  summaries = set()
  # Many methods share one docstring. Asking it once keeps the two parts apart; the
  # shorter name has it, so str.split before str.rsplit.
  for name in sorted(things, key=lambda name: (len(name), name)):
    kind, thing = things[name]
    summary = _summary(thing.__doc__)
    if not summary or summary in summaries:
      continue
    summaries.add(summary)
    yield name, _row(_WHAT, name, kind, "", summary)
    if name.rpartition(".")[2].lower() not in summary.lower().split():
      yield name, _row(_WHICH, name, kind, summary, name)
    yield from _call_rows(name, kind, thing)


def _call_rows(
  name: str, kind: str, thing: object
) -> Iterator[tuple[str, dict[str, str]]]:
  """Rows about how something is called."""
  signature = _signature(thing)
  if signature is None:
    return
  call = f"{name}{signature}"
  if _UNSTABLE.search(call) or "<" in call or len(call) > _MAX_SIGNATURE:
    return
  yield name, _row(_CALL, name, kind, "", call)
  parameters = [p for p in signature.parameters if p not in ("self", "cls")]
  if len(parameters) > 1:
    yield name, _row(_PARAMETERS, name, kind, call, ", ".join(parameters))


def _documented() -> dict[str, tuple[str, object]]:
  """(kind, object) of every public thing with a docstring, by its full name."""
  found, seen = {}, set()
  for module in _MODULES:
    prefix = "" if module == "builtins" else f"{module}."
    for name, kind, thing in _things(importlib.import_module(module)):
      if id(thing) not in seen and isinstance(thing.__doc__, str):
        seen.add(id(thing))
        found[prefix + name] = (kind, thing)
  return found


def _things(module: types.ModuleType) -> Iterator[tuple[str, str, object]]:
  """(name, kind, object) of a module's functions and classes, and what is in these."""
  for name, thing in _public(module):
    if not inspect.isclass(thing):
      yield name, "function", thing
      continue
    yield name, "class", thing
    for member, item in _members(thing):
      kind = "property" if isinstance(item, property) else "method"
      yield f"{name}.{member}", kind, item


def _public(module: types.ModuleType) -> Iterator[tuple[str, object]]:
  """Functions and classes that a module offers, in the order of their names."""
  # vars() and not getattr(): a module's __getattr__ answers for deprecated names,
  # with a warning.
  names = vars(module)
  offered = names["__all__"] if "__all__" in names else names
  for name in sorted(offered):
    if name.startswith("_") or name not in names:
      continue
    thing = names[name]
    if not (inspect.isclass(thing) or inspect.isroutine(thing)):
      continue
    # Under its own name, as hooks are not: test runners and debuggers replace those.
    own = thing.__module__ == module.__name__ or "__all__" in names
    if own and thing.__name__ == name:
      yield name, thing


def _members(cls: type) -> Iterator[tuple[str, object]]:
  """A class's own public methods and properties, without inherited ones."""
  for name, member in sorted(vars(cls).items()):
    if isinstance(member, (staticmethod, classmethod)):
      member = member.__func__
    if not name.startswith("_") and (
      inspect.isroutine(member) or isinstance(member, property)
    ):
      yield name, member


def _signature(thing: object) -> inspect.Signature | None:
  """The call signature without annotations; None if there is none to be had."""
  if isinstance(thing, property):
    return None
  try:
    signature = inspect.signature(thing)
  except (ValueError, TypeError, NameError):  # C code; annotations out of reach
    return None
  bare = [
    parameter.replace(annotation=parameter.empty)
    for parameter in signature.parameters.values()
  ]
  return signature.replace(parameters=bare, return_annotation=signature.empty)


def _summary(doc: str) -> str:
  """The first sentence of a docstring; '' if it has none that can stand alone."""
  for paragraph in inspect.cleandoc(doc).split("\n\n"):
    lines = [line.strip() for line in paragraph.split("\n")]
    if any(_SIGNATURE_LINE.fullmatch(line) for line in lines):
      continue  # C code often opens with how it is called
    text = " ".join(" ".join(lines).split())
    end = _SENTENCE_END.search(text)
    text = text[: end.end()] if end else text
    return text if _is_sentence(text) else ""
  return ""


def _is_sentence(text: str) -> bool:
  words = len(text.split())
  return (
    3 <= words <= _MAX_WORDS
    and text[0].isalpha()
    and text.isprintable()
    and not text.endswith(":")
    and ">>>" not in text
    and not text.startswith("Alias for field number")
    and not _UNSTABLE.search(text)
  )


# Topics of help()


def _topic_rows() -> Iterator[tuple[str, dict[str, str]]]:
  topics = importlib.import_module("pydoc_data.topics").topics
  for name, text in sorted(topics.items()):
    sentences = (_summary(part) for part in text.split("\n\n") if _is_prose(part))
    sentence = next(filter(None, sentences), None)
    if sentence:
      yield f"topic {name}", _row(_TOPIC, f'"{name}"', "topic", "", sentence)


def _is_prose(paragraph: str) -> bool:
  """Whether this is no heading, grammar rule or note on versions."""
  underlined = set(paragraph.split("\n")[-1]) <= set("*=-~")
  return not (underlined or "::=" in paragraph or "in version" in paragraph)


def _row(
  phrasings: tuple[str, ...], name: str, kind: str, extra: str, output: str
) -> dict[str, str]:
  """A row in the phrasing that its object's name picks."""
  phrasing = phrasings[_number(f"phrasing {name}") % len(phrasings)]
  instruction = phrasing.format(name=name, kind=kind)
  return {"instruction": instruction, "input": extra, "output": output}


def _number(text: str) -> int:
  """A hash that is the same on every machine, unlike `hash`."""
  return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
