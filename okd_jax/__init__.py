"""Online knowledge distillation of causal language models in JAX.

import okd_jax
model = okd_jax.models.load(path)
logits = model.logits(model.params, tokens)
okd_jax.losses.forward_kl(teacher_logits, student_logits)
okd_jax.METHODS
result = okd_jax.distill(teacher=…, student=…, data=…, method="okd", workdir=…)
"""

import importlib
import os
from typing import Any

# We use its tokenizers and configurations only: no advice about absent frameworks.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

__all__ = ["METHODS", "distill", "losses", "models"]

_HOMES = {"METHODS": "okd_jax.methods", "distill": "okd_jax.run.api"}


def __getattr__(name: str) -> Any:
  """What the package offers, loaded when it is asked for: JAX takes its second."""
  if name in _HOMES:
    return getattr(importlib.import_module(_HOMES[name]), name)
  if name in __all__:
    return importlib.import_module(f"okd_jax.{name}")
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__})
