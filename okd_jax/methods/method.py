"""What a method is, and what it is given."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from okd_jax.errors import UserError
from okd_jax.losses import (
  Output,
  TokenLoss,
  cross_entropy,
  forward_kl,
  jensen_shannon,
  reverse_kl,
  weighted_sums,
)

Params = dict[str, Any]
Batch = dict[str, Array]
Loss = tuple[Float[Array, ""], dict[str, Float[Array, ""]]]


@dataclasses.dataclass(frozen=True)
class Models:
  """The apply functions a method may call, and how to chunk their logits.

  student(params, batch, key) -> Output: the student under `params['student']`.
  teacher(frozen, adapter, batch) -> Output: the plain teacher where adapter is None.
  """

  student: Callable[[Any, Batch, Array], Output]
  teacher: Callable[[Any, Any, Batch], Output]
  chunk: int = 64


@dataclasses.dataclass(frozen=True)
class Method:
  """One pure loss and what the rest of the program must know about it.

  loss(models, params, frozen, batch, key) -> (loss, metrics): `params` holds the
    trees 'student' and, if the method adapts, 'adapter'; `frozen` the teacher's base.
    `batch['weights']` holds 1/(valid tokens of the whole batch) on valid tokens, so
    a loss and each metric is a plain sum, and sums over micro-batches add up.
  teacher: 'none', 'frozen' or 'adapted'.
  updates: the trees that move, in order; trees in one group move simultaneously.
  """

  loss: Callable[[Models, Params, Any, Batch, Array], Loss]
  teacher: str
  updates: tuple[tuple[str, ...], ...] = (("student",),)


DIVERGENCES = {
  "forward_kl": forward_kl,
  "reverse_kl": reverse_kl,
  "jensen_shannon": jensen_shannon,
}


def find_divergence(key: str, name: str, temperature: float, beta: float):
  """The per-token divergence that the configuration key `key` names.

  `beta` weighs the teacher's side of jensen_shannon; the others have none.
  """
  if name not in DIVERGENCES:
    raise UserError(
      f"{key}={name!r} is no divergence; use one of {', '.join(DIVERGENCES)}"
    )
  knobs = {"temperature": temperature}
  if name == "jensen_shannon":
    check_share("method.beta", beta)
    knobs["beta"] = beta
  return functools.partial(DIVERGENCES[name], **knobs)


def check_share(key: str, value: float) -> None:
  """Raises a UserError unless 0 <= value <= 1."""
  if not 0 <= value <= 1:
    raise UserError(f"{key}={value} must lie between 0 and 1")


def check_temperature(value: float) -> None:
  """Raises a UserError unless value > 0."""
  if not value > 0:
    raise UserError(f"method.temperature={value} must be above 0")


def diagnostics(logits, labels, student_ce) -> dict[str, Float[Array, "B C"]]:
  """Per-token figures every distillation run logs, at no extra forward pass."""
  student, teacher = logits["student"], logits["teacher"]
  agree = jnp.argmax(student, axis=-1) == jnp.argmax(teacher, axis=-1)
  return {
    "student_nll": student_ce,
    "teacher_nll": cross_entropy(teacher, labels),
    "top1_agreement": agree.astype(jnp.float32),
  }


def token_sums(
  models: Models, token_loss: TokenLoss, outputs: Mapping[str, Output], batch: Batch
) -> Loss:
  """Sums of a token loss over the batch, chunk by chunk (`losses.weighted_sums`).

  Every head is cut to the smallest vocabulary, since the rows beyond are unused
  padding: that the tokenizers agree was checked when the models were loaded. Padded
  ids thus have probability 0 on both sides instead of a share of somebody's mass.
  """
  size = min(output.head.shape[0] for output in outputs.values())
  outputs = {
    name: output._replace(head=output.head[:size]) for name, output in outputs.items()
  }
  return weighted_sums(
    token_loss, outputs, batch["labels"], batch["weights"], models.chunk
  )


stop_gradient = jax.lax.stop_gradient
