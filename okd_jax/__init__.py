"""Online knowledge distillation of causal language models in JAX.

    import okd_jax
    model = okd_jax.models.load(path)
    logits = model.logits(model.params, tokens)
    okd_jax.losses.forward_kl(teacher_logits, student_logits)
    okd_jax.METHODS
"""

from okd_jax import losses, models
from okd_jax.methods import METHODS

__all__ = ["METHODS", "losses", "models"]
