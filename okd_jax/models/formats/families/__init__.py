"""The families of models that can be read and written, one table each.

docs/add_a_family.md shows how another is added.
"""

from okd_jax.errors import UserError
from okd_jax.models.config import Field, ModelConfig
from okd_jax.models.formats.families.family import Family
from okd_jax.models.formats.families.gemma import GEMMA, GEMMA2, GEMMA3
from okd_jax.models.formats.families.gpt2 import GPT2
from okd_jax.models.formats.families.llama import (
  GRANITE,
  LLAMA,
  MINISTRAL,
  MISTRAL,
  SMOLLM3,
)
from okd_jax.models.formats.families.olmo import OLMO2, OLMO3
from okd_jax.models.formats.families.opt import OPT
from okd_jax.models.formats.families.phi import PHI3
from okd_jax.models.formats.families.qwen import QWEN2, QWEN3, QWEN3_MOE

FAMILIES: dict[str, Family] = {
  "gemma": GEMMA,
  "gemma2": GEMMA2,
  "gemma3_text": GEMMA3,
  "gpt2": GPT2,
  "granite": GRANITE,
  "llama": LLAMA,
  "ministral": MINISTRAL,
  "mistral": MISTRAL,
  "olmo2": OLMO2,
  "olmo3": OLMO3,
  "opt": OPT,
  "phi3": PHI3,
  "qwen2": QWEN2,
  "qwen3": QWEN3,
  "qwen3_moe": QWEN3_MOE,
  "smollm3": SMOLLM3,
}


def family_of(name: object) -> Family:
  """The family of a model_type; a UserError if it is none of ours."""
  if not isinstance(name, str) or name not in FAMILIES:
    raise UserError(f"model family {name!r} is none of {', '.join(FAMILIES)}")
  return FAMILIES[name]


def preset(family: str, **dimensions: Field) -> ModelConfig:
  """A model of `family` with these dimensions; a UserError if there is none such."""
  own = family_of(family)
  fields = {**own.fixed, **dimensions}
  return ModelConfig(family=family, **{**own.derived(fields), **fields})
