"""README.md of an exported model."""

import os
from collections.abc import Mapping

from okd_jax.models.config import ModelConfig


def model_card(config: ModelConfig, count: int, rows: Mapping[str, str]) -> str:
  """README.md: no dates and no paths of this machine, so that runs compare equal."""
  table = [f"| {name} | {_public(value)} |" for name, value in rows.items()]
  header = ["| | |", "|---|---|", *table, ""] if table else []
  lines = [
    "---",
    "library_name: transformers",
    "pipeline_tag: text-generation",
    "tags:",
    "- knowledge-distillation",
    "- okd_jax",
    "---",
    "",
    f"A {config.family} language model with {count:,} parameters, made by okd_jax.",
    "",
    *header,
    "```python",
    "from transformers import AutoModelForCausalLM, AutoTokenizer",
    "",
    'model = AutoModelForCausalLM.from_pretrained("this folder")',
    'tokenizer = AutoTokenizer.from_pretrained("this folder")',
    "```",
    "",
  ]
  return "\n".join(lines)


def _public(value: object) -> str:
  """A local path is reduced to its last name; hub ids and prose stay."""
  text = str(value)
  return (
    os.path.basename(os.path.normpath(text)) if text[:1] in ("/", ".", "~") else text
  )
