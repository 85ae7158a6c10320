"""Supervised fine-tuning: cross-entropy on the gold response, no teacher."""

from okd_jax.losses import cross_entropy, entropy
from okd_jax.methods.base.method import Method, token_sums


def build() -> Method:
  """loss = CE(y; q), the token mean over the response."""

  def token_loss(logits, labels):
    ce = cross_entropy(logits["student"], labels)
    return ce, {"student_nll": ce, "student_entropy": entropy(logits["student"])}

  def loss(models, params, frozen, batch, key, knobs):
    del frozen
    outputs = {"student": models.student(params["student"], batch, key)}
    return token_sums(models, token_loss, outputs, batch, knobs)

  return Method(loss=loss, teacher="none")
