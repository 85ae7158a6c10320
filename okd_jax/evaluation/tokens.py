"""Figures per token of held-out rows: losses, divergences, agreement."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp

from okd_jax.losses import (
  Mean,
  TokenLoss,
  cross_entropy,
  forward_kl,
  mixture,
  reverse_kl,
  top1_agreement,
  weighted_sums,
)
from okd_jax.methods import stored
from okd_jax.models import Decoder, output


def token_metrics(
  logits: Mapping[str, jax.Array], labels, *, teacher_weights: Sequence[float] = ()
) -> tuple:
  """Per-token figures of 'student' beside 'teacher' and 'adapted', where given.

  Of several teachers, 'teacher:NAME', each has its own, and 'the teacher' is their
  mean in probability space by `teacher_weights`, in the order of the names; () is
  equal, as it is under a gate or a policy, which move. A `TokenLoss`: its loss is the
  student's cross-entropy.
  """
  student = logits["student"]
  metrics = {"loss": cross_entropy(student, labels)}
  several = {role: z for role, z in sorted(logits.items()) if ":" in role}
  for role, z in several.items():  # 'teacher:NAME' and 'adapted:NAME'
    kind, _, name = role.partition(":")
    prefix = name if kind == "teacher" else f"{name}_{kind}"
    metrics[f"{prefix}_loss"] = cross_entropy(z, labels)
    metrics[f"{prefix}_forward_kl"] = forward_kl(z, student)
  if teachers := [z for role, z in several.items() if role.startswith("teacher:")]:
    weights = jnp.array(teacher_weights or [1.0] * len(teachers))
    weights = jnp.broadcast_to(weights, (*labels.shape, len(teachers)))
    logits = dict(logits) | {"teacher": mixture(teachers, weights)}
  if "teacher" in logits:
    teacher = logits["teacher"]
    metrics |= {
      "forward_kl": forward_kl(teacher, student),
      "reverse_kl": reverse_kl(teacher, student),
      "top1_agreement": 100 * top1_agreement(teacher, student),
      "teacher_loss": cross_entropy(teacher, labels),
    }
  if "adapted" in logits:
    adapted = logits["adapted"]
    metrics |= {
      "adapted_forward_kl": forward_kl(adapted, student),
      "adapted_loss": cross_entropy(adapted, labels),
      "adapted_drift": forward_kl(logits["teacher"], adapted),
    }
  return metrics["loss"], metrics


def stored_metrics(logits, labels, *, temperature: float) -> tuple:
  """As `token_metrics`, beside a teacher of whom there is what it said (`stored`).

  labels: (the gold tokens, what was stored at temperature T). The KLs are those of the
    K + 1 buckets, so they are bounds from below; at T other than 1 there are none.
  """
  gold, said = labels
  student = logits["student"]
  found = stored.figures(student, said, temperature)
  metrics = {"loss": cross_entropy(student, gold), "teacher_loss": found["teacher_nll"]}
  metrics["top1_agreement"] = 100 * found["top1_agreement"]
  metrics |= {k: found[k] for k in ("forward_kl", "reverse_kl") if k in found}
  return metrics["loss"], metrics


def compile_token_step(
  decoders: Mapping[str, Decoder],
  chunk: int,
  metrics: TokenLoss = token_metrics,
  vocab_size: int | None = None,
) -> Callable:
  """A jitted (variables by role, batch) -> (sums of `metrics`, tokens).

  vocab_size: ids that count, where a stored teacher knows fewer than the student.
  """

  def step(variables, batch):
    outputs = {
      role: output(decoder, variables[role], batch)
      for role, decoder in decoders.items()
    }
    size = vocab_size or min(o.head.shape[0] for o in outputs.values())
    outputs = {role: o._replace(head=o.head[:size]) for role, o in outputs.items()}
    weights, labels = batch["mask"].astype(jnp.float32), batch["labels"]
    if "stored" in batch:
      labels = labels, batch["stored"]
    _, sums = weighted_sums(metrics, outputs, labels, weights, chunk)
    return sums, weights.sum()

  return jax.jit(step)


def evaluate_tokens(
  step: Callable, variables: Mapping, batches: Iterable, put: Callable = jnp.asarray
) -> dict[str, float]:
  """Global token means over the batches, and the perplexity, exp(loss)."""
  means: dict[str, Mean] = {}
  for batch in batches:
    arrays = {name: put(rows) for name, rows in batch.items()}
    sums, count = jax.device_get(step(variables, arrays))
    for name, total in sums.items():
      mean = Mean(float(total), float(count))
      means[name] = means[name] + mean if name in means else mean
  metrics = {name: mean.compute() for name, mean in means.items()}
  return metrics | {"perplexity": perplexity(metrics["loss"])}


def perplexity(loss: float) -> float:
  """exp(loss); beyond e^700, where a float overflows, as good as infinite."""
  return math.exp(loss) if loss < 700 else math.inf
