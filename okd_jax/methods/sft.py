"""Supervised fine-tuning: cross-entropy on the gold response, no teacher."""

import dataclasses

from jaxtyping import Array, Int, Key

from okd_jax.data.batch import Batch
from okd_jax.losses import cross_entropy, entropy
from okd_jax.methods.base import Logits, Loss, Method, Models, Now, Params, token_sums


@dataclasses.dataclass(frozen=True)
class Knobs:
  """None: there is nothing to set."""


def build(knobs: Knobs) -> Method:
  """loss = CE(y; q), the token mean over the response."""
  del knobs

  def token_loss(logits: Logits, labels: Int[Array, "B C"]):
    ce = cross_entropy(logits["student"], labels)
    return ce, {"student_nll": ce, "student_entropy": entropy(logits["student"])}

  def loss(
    models: Models,
    params: Params,
    frozen: Params,
    batch: Batch,
    key: Key[Array, ""] | None,
    now: Now,
  ) -> Loss:
    del frozen, now
    outputs = {"student": models.student(params["student"], batch, key)}
    return token_sums(models, token_loss, outputs, batch, {})

  return Method(loss, taught=False)
