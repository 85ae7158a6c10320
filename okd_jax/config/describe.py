"""Every configuration key with its default and its meaning, for --help."""

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path

from okd_jax.config.read import defaults, recipes

_KEY = re.compile(r"  (config|model)\.([\w.]+) = (.*?)(?:  # (.*))?$")
_FILE = "--config.method.file="
_COMMENT = re.compile(r"  # (.*)$")
# Sections whose keys are names of the user's own, or those of other keys.
_OPEN = {"teachers": "NAME", "stages": "NAME.KEY", "method.end": "KNOB"}
_OPEN |= {"teacher.model": "KEY", "data.columns": "KEY"}


def help_page(doc: str, arguments: Sequence[str]) -> str:
  """What --help prints: a command's own text, then every key; '' if nobody asks."""
  if not {"--help", "-h", "--helpfull"} & set(arguments):
    return ""
  own = [a.removeprefix(_FILE) for a in arguments if a.startswith(_FILE)]
  return f"{doc}\nEvery key with its default:\n\n{describe(*own[:1])}"


def describe(file: str = "") -> str:
  """Every key with its default and its meaning, section by section, for --help.

  file: somebody's method.file, whose knobs are keys, too.
  """
  source = (recipes() / "default.py").read_text(encoding="utf8")
  # A row without a value is the note of those that follow.
  sections: dict[str, list[tuple[str, str | None, str]]] = {}
  above: list[str] = []
  for line in source.splitlines():
    if comment := _COMMENT.match(line):
      above.append(comment[1])
      continue
    if found := _KEY.match(line):
      owner, key, value, beside = found.groups()
      key = f"student.model.{key}" if owner == "model" else key
      rows = sections.setdefault(key.partition(".")[0], [])
      if above and beside:
        rows.append(("", None, " ".join(above)))
      meaning = beside or " ".join(above)
      if key in _OPEN:
        key, value = f"{key}.{_OPEN[key]}", '""'
      if not value.startswith(("ConfigDict(", "_random_model(")):
        rows.append((key, value, meaning))
    above = []
  if file:
    sections[f"method, by {Path(file).name}"] = _knobs_of(file)
  return "\n".join(_described(name, rows) for name, rows in sections.items() if rows)


def _knobs_of(file: str) -> list[tuple[str, str, str]]:
  """The knobs that a method file adds: (key, default, what reads it)."""
  from okd_jax import methods  # needs JAX, as the rest of this page does not

  methods.load_file(file)
  ours = defaults().method
  return [
    (f"method.{key}", str(value), methods.who_reads(key))
    for key, value in methods.defaults().items()
    if key not in ours
  ]


def _described(section: str, rows: list[tuple[str, str | None, str]]) -> str:
  lines = [f"{section}:"]
  for key, value, meaning in rows:
    if value is None:
      lines += textwrap.wrap(meaning, 80, initial_indent="  ", subsequent_indent="  ")
      continue
    value = "" if value.startswith("config_dict.placeholder") else value
    lines.append(f"  --config.{key}={value.strip(chr(34))}")
    lines += textwrap.wrap(
      meaning, 80, initial_indent="      ", subsequent_indent="      "
    )
  return "\n".join(lines) + "\n"
