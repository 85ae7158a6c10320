"""MixKD: distillation on mixed-up examples.

MixKD: Towards Efficient Distillation of Large-scale Language Models, Liang et al.
2021, arXiv 2011.00593. The paper mixes classified sentences; this is our form for
language models. Row i is mixed with row j of the same batch, position by position:

    e = s e(x_i) + (1 - s) e(x_j)      token embeddings, each model its own

where s is lambda ~ Beta(a, a), one for the whole batch and both models, and 1 or 0
where only one row has a token. The mixed row's loss at a position counts by lambda
for row i's response and by 1 - lambda for row j's. So lambda = 1 is plain KD, swapping
the rows and lambda for 1 - lambda changes nothing, equal rows give the unmixed loss,
and padding never leaks into a text.
"""

import jax
import jax.numpy as jnp

from okd_jax.losses import cross_entropy, entropy
from okd_jax.methods.base.knobs import (
  Knob,
  check_positive,
  check_weight,
  find_divergence,
  own_shape,
)
from okd_jax.methods.base.method import (
  Method,
  combine,
  diagnostics,
  stop_gradient,
  token_sums,
)
from okd_jax.models import Mix


def build(
  *,
  divergence: str,
  mix_alpha: Knob,
  mix_kd_weight: Knob,
  mix_gold_weight: Knob,
  temperature: Knob,
  gold_weight: Knob,
  **shape: Knob,
) -> Method:
  """loss = (1 + g) CE(y; q) + b CE(mixed y; mixed q) + c D(mixed p, mixed q).

  Args:
    divergence: D, of the teacher to the student on the mixed rows.
    mix_alpha: a of Beta(a, a).
    mix_kd_weight: c (the paper's teacher term, TMKD).
    mix_gold_weight: b (the paper's student term, SM).
    temperature: T of the divergence, which is multiplied by T^2.
    gold_weight: g.
    shape: the knobs of the divergence.
  """
  check_positive("method.mix_alpha", mix_alpha)
  check_positive("method.temperature", temperature)
  for key, knob in (
    ("mix_kd_weight", mix_kd_weight),
    ("mix_gold_weight", mix_gold_weight),
    ("gold_weight", gold_weight),
  ):
    check_weight(f"method.{key}", knob)
  divergence = divergence or "forward_kl"
  distance = find_divergence("method.divergence", divergence, shape)

  def gold_loss(logits, labels, *, gold_weight):
    ce = cross_entropy(logits["student"], labels)
    metrics = {"student_nll": ce, "student_entropy": entropy(logits["student"])}
    return (1 + gold_weight) * ce, metrics

  def mixed_loss(logits, labels, *, mix_kd_weight, mix_gold_weight, **knobs):
    student, teacher = logits["student"], stop_gradient(logits["teacher"])
    d = distance(teacher, student, **knobs)
    ce = _mixed_nll(student, labels)
    loss = combine((mix_kd_weight, d), (mix_gold_weight, ce))
    # Of mixed rows: not to be mistaken for the plain ones' figures.
    figures = diagnostics(logits, labels["own"]) | {
      "student_nll": ce,
      "teacher_nll": _mixed_nll(teacher, labels),
    }
    metrics = {f"mixed_{name}": value for name, value in figures.items()}
    return loss, metrics | {"divergence": d}

  def loss(models, params, frozen, batch, key, knobs):
    knobs = dict(knobs)
    gold_knobs = {"gold_weight": knobs.pop("gold_weight")}
    plain_key, mixed_key, pair_key, share_key = jax.random.split(key, 4)
    share = jax.random.beta(share_key, *[knobs.pop("mix_alpha")] * 2)
    order = jax.random.permutation(pair_key, len(batch["tokens"]))
    mix, mixed, labels = mix_rows(batch, order, share)
    plain = {"student": models.student(params["student"], batch, plain_key)}
    both = {
      "student": models.student(params["student"], mixed, mixed_key, mix),
      "teacher": models.teacher(frozen, None, mixed, mix),
    }
    gold, metrics = token_sums(models, gold_loss, plain, batch, gold_knobs)
    value, more = token_sums(models, mixed_loss, both, mixed, knobs, labels)
    return gold + value, metrics | more

  knobs = {
    "mix_alpha": mix_alpha,
    "mix_kd_weight": mix_kd_weight,
    "mix_gold_weight": mix_gold_weight,
    "temperature": temperature,
    "gold_weight": gold_weight,
  }
  knobs |= own_shape(shape, divergence)
  return Method(loss=loss, teacher="frozen", knobs=knobs, takes_packed=False)


def mix_rows(batch, order, share):
  """(mix, batch, labels) of each row i with row order[i], row i counting by `share`.

  mix: what the models need to mix embeddings.
  batch: tokens, segments and weights of the mixed rows; the weights sum to what the
    plain ones do, since `order` is a permutation.
  labels: 'own' and 'other' [B, L], and 'share', which part of a position's weight
    is row i's.
  """
  other = {name: array[order] for name, array in batch.items()}
  real, other_real = batch["segment_ids"] != 0, other["segment_ids"] != 0
  alone = jnp.where(real, 1.0, 0.0)
  own_weight = share * batch["weights"]
  weights = own_weight + (1 - share) * other["weights"]
  labels = {
    "own": batch["labels"],
    "other": other["labels"],
    "share": own_weight / jnp.where(weights > 0, weights, 1),
  }
  mixed = batch | {
    "segment_ids": jnp.maximum(batch["segment_ids"], other["segment_ids"]),
    "weights": weights,
  }
  mix = Mix(other["tokens"], jnp.where(real & other_real, share, alone))
  return mix, mixed, labels


def _mixed_nll(logits, labels):
  """Cross-entropy on both rows' gold tokens, by their shares of the position."""
  own = cross_entropy(logits, labels["own"])
  other = cross_entropy(logits, labels["other"])
  return labels["share"] * own + (1 - labels["share"]) * other
