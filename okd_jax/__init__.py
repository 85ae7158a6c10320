"""Online knowledge distillation of causal language models in JAX.

import okd_jax
model = okd_jax.models.load(path)
logits = model.logits(model.params, tokens)
okd_jax.losses.forward_kl(teacher_logits, student_logits)
okd_jax.METHODS
"""

import os

# We use its tokenizers and configurations only: no advice about absent frameworks.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

from okd_jax import losses, models  # noqa: E402
from okd_jax.methods import METHODS  # noqa: E402

__all__ = ["METHODS", "losses", "models"]
