"""README.md of an exported model, and what such a file says of a model's licence."""

import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import huggingface_hub

from okd_jax.models.config import ModelConfig

_log = logging.getLogger(__name__)
# An underscore within a word is no mark-up, and names of files are full of them.
_MARKS = re.compile(r"[\\`*\[\]<>|&~]|(?<!\w)_|_(?!\w)")
_LICENCE = ("license", "license_name", "license_link")


class Card(NamedTuple):
  """What a card says of how a model was made.

  rows: of its table, such as {'Teacher': 'gpt2-xl'}.
  figures: of a second one, what was measured.
  base_models, datasets: ids on the hub.
  licence: the hub's fields license, license_name and license_link, where known.
  """

  rows: Mapping[str, str] = {}
  figures: Mapping[str, str] = {}
  base_models: Sequence[str] = ()
  datasets: Sequence[str] = ()
  licence: Mapping[str, str] = {}


def model_card(config: ModelConfig, count: int, card: Card) -> str:
  """README.md: no dates and no paths of this machine, so that runs compare equal."""
  header = huggingface_hub.ModelCardData(
    base_model=list(card.base_models) or None,
    datasets=list(card.datasets) or None,
    library_name="transformers",
    pipeline_tag="text-generation",
    tags=["knowledge-distillation", "okd_jax"],
    **card.licence,
  )
  rows = {name: _public(value) for name, value in card.rows.items()}
  lines = [
    "---",
    header.to_yaml(),
    "---",
    "",
    f"A {config.family} language model with {count:,} parameters, made by okd_jax.",
    "",
    *_table(("", ""), rows),
    *_table(("on held-out rows", ""), card.figures),
    "```python",
    "from transformers import AutoModelForCausalLM, AutoTokenizer",
    "",
    'model = AutoModelForCausalLM.from_pretrained("this folder")',
    'tokenizer = AutoTokenizer.from_pretrained("this folder")',
    "```",
    "",
  ]
  return "\n".join(lines)


def licence(readme: Path) -> dict[str, str]:
  """The licence that the header of a model's README.md names, {} if it names none.

  A header that cannot be read is told of: no model needs it.
  """
  if not readme.exists():
    return {}
  try:
    header = huggingface_hub.metadata_load(readme) or {}
  except Exception as error:  # of YAML, of text, of the hub: no common class
    reason = str(error).strip().split("\n")[0]
    _log.warning("%s: its header is no YAML (%s), so no licence", readme, reason)
    return {}
  found = {key: header.get(key) for key in _LICENCE}
  return {key: value for key, value in found.items() if isinstance(value, str)}


def _table(head: tuple[str, str], rows: Mapping[str, str]) -> list[str]:
  if not rows:
    return []
  lines = [f"| {_plain(name)} | {_plain(value)} |" for name, value in rows.items()]
  return [f"| {head[0]} | {head[1]} |", "|---|---|", *lines, ""]


def _plain(text: str) -> str:
  """Text as Markdown shows it letter by letter: no mark-up, no cell or row of its own.

  >>> print(_plain("a|b <img>"), _plain("[x](y)"), _plain("c_d.jsonl"))
  a\\|b \\<img\\> \\[x\\](y) c_d.jsonl
  """
  line = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
  return _MARKS.sub(r"\\\g<0>", line)


def _public(value: str) -> str:
  """Of several by commas, each local path is reduced to its last name."""
  parts = [part.strip() for part in str(value).split(",")]
  return ", ".join(map(_public_part, parts))


def _public_part(text: str) -> str:
  """Hub ids and prose stay."""
  local = text[:1] in ("/", ".", "~") or os.path.exists(text)
  return os.path.basename(os.path.normpath(text)) if local and text else text
