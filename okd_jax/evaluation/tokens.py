"""Figures per token of held-out rows: losses, divergences, agreement."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree, Shaped

from okd_jax.data.batch import Batch
from okd_jax.losses import (
  Mean,
  TokenLoss,
  acceptance,
  cross_entropy,
  forward_kl,
  mixture,
  reverse_kl,
  stored,
  top1_agreement,
  top_k_overlap,
  weighted_sums,
)
from okd_jax.models import Decoder, output

# What a model is in an evaluation; of teachers, which one of them is its name.
STUDENT, TEACHER, ADAPTED = "student", "teacher", "adapted"
Who = tuple[str, str]  # (one of these, the teacher's name or '')
Logits = Mapping[Who, Float[Array, "B C V"]]
Figures = dict[str, Float[Array, "B C"]]


def token_metrics(
  logits: Logits, labels: Int[Array, "B C"], *, teacher_weights: Sequence[float] = ()
) -> tuple[Float[Array, "B C"], Figures]:
  """Per-token figures of the student beside its teachers, where there are any.

  Of several teachers each has its own, and 'the teacher' is their mean in probability
  space. A `TokenLoss`: its loss is the student's cross-entropy.

  Args:
    teacher_weights: in the order of the names; () is equal, as it is under a gate or a
      policy, which move.
  """
  student = logits[STUDENT, ""]
  teachers, adapted = (
    {name: z for (kind, name), z in sorted(logits.items()) if kind == wanted}
    for wanted in (TEACHER, ADAPTED)
  )
  metrics = {"loss": cross_entropy(student, labels)}
  if len(teachers) > 1:
    metrics |= _of_each(teachers, adapted, student, labels)
  if teachers:
    teacher = _mean(teachers, teacher_weights, labels)
    metrics |= {
      "forward_kl": forward_kl(teacher, student),
      "reverse_kl": reverse_kl(teacher, student),
      "top1_agreement": 100 * top1_agreement(teacher, student),
      "top10_overlap": 100 * top_k_overlap(teacher, student, 10),
      "acceptance": 100 * acceptance(teacher, student),
      "teacher_loss": cross_entropy(teacher, labels),
    }
  if len(teachers) == 1 and adapted:
    [own] = adapted.values()
    metrics |= {
      "adapted_forward_kl": forward_kl(own, student),
      "adapted_loss": cross_entropy(own, labels),
      "adapted_drift": forward_kl(teacher, own),
    }
  return metrics["loss"], metrics


def _of_each(
  teachers: Mapping[str, Array],
  adapted: Mapping[str, Array],
  student: Float[Array, "B C V"],
  labels: Int[Array, "B C"],
) -> Figures:
  """Those of each teacher and each adapted one, under its name."""
  found = {}
  for part, middle in ((teachers, ""), (adapted, f"_{ADAPTED}")):
    for name, z in part.items():
      found[f"{name}{middle}_loss"] = cross_entropy(z, labels)
      found[f"{name}{middle}_forward_kl"] = forward_kl(z, student)
  return found


def _mean(
  teachers: Mapping[str, Array], weights: Sequence[float], labels: Int[Array, "B C"]
) -> Float[Array, "B C V"]:
  """The only teacher's logits, or those of the mean of several."""
  if len(teachers) == 1:
    return next(iter(teachers.values()))
  shares = jnp.array(list(weights) or [1.0] * len(teachers))
  shares = jnp.broadcast_to(shares, (*labels.shape, len(teachers)))
  return mixture(list(teachers.values()), shares)


def stored_metrics(
  logits: Logits,
  labels: tuple[Int[Array, "B C"], Mapping[str, Shaped[Array, "B C ..."]]],
  *,
  temperature: float,
) -> tuple[Float[Array, "B C"], Figures]:
  """As `token_metrics`, beside a teacher whose words were stored (`losses.stored`).

  labels: (the gold tokens, what was stored at temperature T). The KLs are those of the
    K + 1 buckets, so they are bounds from below; at T other than 1 there are none.
  """
  gold, said = labels
  student = logits[STUDENT, ""]
  found = stored.figures(student, said, temperature)
  metrics = {"loss": cross_entropy(student, gold), "teacher_loss": found["teacher_nll"]}
  metrics["top1_agreement"] = 100 * found["top1_agreement"]
  metrics |= {k: found[k] for k in ("forward_kl", "reverse_kl") if k in found}
  return metrics["loss"], metrics


def compile_token_step(
  decoders: Mapping[Who, Decoder],
  chunk: int,
  metrics: TokenLoss = token_metrics,
  vocab_size: int | None = None,
) -> Callable[..., tuple[dict[str, Array], Array]]:
  """A jitted (variables by who, batch) -> (sums of `metrics`, tokens).

  vocab_size: ids that count, where a stored teacher knows fewer than the student.
  """

  def step(variables: Mapping[Who, PyTree], batch: Batch):
    """({figure: its sum over the tokens that count}, how many these are)."""
    outputs = {
      who: output(
        decoder,
        variables[who],
        batch,
        as_teacher=who[0] != STUDENT,
        **({"hidden": batch.trunk} if decoder.only_top else {}),
      )
      for who, decoder in decoders.items()
    }
    size = vocab_size or min(o.head.shape[0] for o in outputs.values())
    outputs = {who: o.first_ids(size) for who, o in outputs.items()}
    weights, labels = batch.mask.astype(jnp.float32), batch.labels
    if batch.stored is not None:
      labels = labels, batch.stored
    _, sums = weighted_sums(metrics, outputs, labels, weights, chunk)
    return sums, weights.sum()

  return jax.jit(step)


def evaluate_tokens(
  step: Callable[..., tuple[dict[str, Array], Array]],
  variables: Mapping[Who, PyTree],
  batches: Iterable[Batch],
  put: Callable[[Batch], Any] = lambda batch: jax.tree.map(jnp.asarray, batch),
) -> dict[str, float]:
  """Global token means over the batches, and the perplexity, exp(loss)."""
  means: dict[str, Mean] = {}
  for batch in batches:
    sums, count = jax.device_get(step(variables, put(batch)))
    for name, total in sums.items():
      mean = Mean(float(total), float(count))
      means[name] = means[name] + mean if name in means else mean
  metrics = {name: mean.compute() for name, mean in means.items()}
  return metrics | {"perplexity": perplexity(metrics["loss"])}


def perplexity(loss: float) -> float:
  """exp(loss); beyond e^700, where a float overflows, as good as infinite."""
  return math.exp(loss) if loss < 700 else math.inf
