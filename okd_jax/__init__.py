"""Online knowledge distillation of causal language models in JAX.

import okd_jax
model = okd_jax.models.load(path)
logits = model.logits(model.params, tokens)
okd_jax.losses.forward_kl(teacher_logits, student_logits)
okd_jax.METHODS
result = okd_jax.distill(teacher=…, student=…, data=…, method="okd", workdir=…)
"""

import os
from typing import Any

# We use its tokenizers and configurations only: no advice about absent frameworks.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

from okd_jax import losses, models  # noqa: E402
from okd_jax.methods import METHODS  # noqa: E402

__all__ = ["METHODS", "distill", "losses", "models"]


def __getattr__(name: str) -> Any:
  """`distill`, loaded when it is asked for: it needs all of the package."""
  if name == "distill":
    from okd_jax.run.api import distill

    return distill
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
