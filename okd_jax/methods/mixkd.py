"""MixKD: distillation on mixed-up examples.

MixKD: Towards Efficient Distillation of Large-scale Language Models, Liang et al.
2021, arXiv 2011.00593. The paper mixes classified sentences; this is our form for
language models. Row i is mixed with row j of the same batch, position by position:

    e = s e(x_i) + (1 - s) e(x_j)      token embeddings, each model its own

where s is lambda ~ Beta(a, a), one for the whole batch (all its micro-batches) and
both models, and 1 or 0 where only one row has a token. The mixed row's loss at a
position counts by lambda for row i's response and by 1 - lambda for row j's. So
lambda = 1 is plain KD, swapping the rows and lambda for 1 - lambda changes nothing,
equal rows give the unmixed loss, and padding never leaks into a text.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, Shaped

from okd_jax.data.batch import Batch
from okd_jax.losses import TokenLoss, cross_entropy, entropy
from okd_jax.methods.base import (
  DivergenceKnobs,
  Knob,
  Logits,
  Loss,
  Method,
  Models,
  Now,
  Params,
  Sequences,
  check_positive,
  check_weight,
  combine,
  diagnostics,
  stop_gradient,
  token_sums,
)
from okd_jax.methods.base.divergences import Distance
from okd_jax.models import Mix

Labels = Mapping[str, Shaped[Array, "B L"]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Knobs(DivergenceKnobs):
  """What `mixkd` reads.

  divergence: D, of the teacher to the student on the mixed rows.
  mix_alpha: a of Beta(a, a).
  mix_kd_weight: c (the paper's teacher term, TMKD).
  mix_gold_weight: b (the paper's student term, SM).
  gold_weight: g.
  """

  mix_alpha: Knob = 0.4
  mix_kd_weight: Knob = 1.0
  mix_gold_weight: Knob = 1.0
  gold_weight: Knob = 0.0

  def __post_init__(self):
    super().__post_init__()
    check_positive("method.mix_alpha", self.mix_alpha)
    for key in ("mix_kd_weight", "mix_gold_weight", "gold_weight"):
      check_weight(f"method.{key}", getattr(self, key))


def build(knobs: Knobs) -> Method:
  """loss = (1 + g) CE(y; q) + b CE(mixed y; mixed q) + c D(mixed p, mixed q)."""
  mixed_loss = _mixed_loss(knobs.distance())

  def loss(
    models: Models,
    params: Params,
    frozen: Params,
    batch: Batch,
    key: Key[Array, ""],
    now: Now,
  ) -> Loss:
    now = dict(now)
    gold_now = {"gold_weight": now.pop("gold_weight")}
    del now["mix_alpha"]  # `prepare` has drawn by it
    plain_key, mixed_key = jax.random.split(key)
    mix, mixed, labels = mix_rows(batch)
    plain = {"student": models.student(params["student"], batch, plain_key)}
    both = {
      "student": models.student(params["student"], mixed, mixed_key, mix),
      "teacher": models.teacher(frozen, None, mixed, mix),
    }
    gold, metrics = token_sums(models, _gold_loss, plain, batch, gold_now)
    value, more = token_sums(models, mixed_loss, both, mixed, now, labels)
    return gold + value, metrics | more

  numbers = {
    "mix_alpha": knobs.mix_alpha,
    "mix_kd_weight": knobs.mix_kd_weight,
    "mix_gold_weight": knobs.mix_gold_weight,
    "temperature": knobs.temperature,
    "gold_weight": knobs.gold_weight,
  }
  return Method(
    loss,
    numbers | knobs.shape,
    sequences=Sequences(prepare=prepare),
    takes_own_prompts=False,
    takes_packed=False,
  )


def prepare(
  models: Models,
  params: Params,
  frozen: Params,
  batch: Batch,
  key: Key[Array, ""],
  now: Now,
) -> Batch:
  """The batch with each row's partner and the lambda that all of them share."""
  del models, params, frozen
  pair_key, share_key = jax.random.split(key)
  share = jax.random.beta(share_key, now["mix_alpha"], now["mix_alpha"])
  order = jax.random.permutation(pair_key, len(batch.tokens))
  return paired(batch, order, share)


def paired(
  batch: Batch, order: Int[Array, " B"], share: Float[Array, ""] | float
) -> Batch:
  """The batch with row order[i] as partner of row i, which counts by `share`."""
  partner = jax.tree.map(lambda array: array[order], Batch.of(batch.rows))
  shares = jnp.full(len(order), share, jnp.float32)
  return batch.replace(partner=partner, facts={"share": shares})


def _gold_loss(logits: Logits, labels: Int[Array, "B C"], *, gold_weight: Any):
  ce = cross_entropy(logits["student"], labels)
  metrics = {"student_nll": ce, "student_entropy": entropy(logits["student"])}
  return (1 + gold_weight) * ce, metrics


def _mixed_loss(distance: Distance) -> TokenLoss:
  def mixed_loss(
    logits: Logits,
    labels: Labels,
    *,
    mix_kd_weight: Any,
    mix_gold_weight: Any,
    **rest: Any,
  ):
    student, teacher = logits["student"], stop_gradient(logits["teacher"])
    d = distance(teacher, student, **rest)
    ce = _mixed_nll(student, labels)
    loss = combine((mix_kd_weight, d), (mix_gold_weight, ce))
    # Of mixed rows: not to be mistaken for the plain ones' figures.
    figures = diagnostics(logits, labels["own"]) | {
      "student_nll": ce,
      "teacher_nll": _mixed_nll(teacher, labels),
    }
    metrics = {f"mixed_{name}": value for name, value in figures.items()}
    return loss, metrics | {"divergence": d}

  return mixed_loss


def mix_rows(batch: Batch) -> tuple[Mix, Batch, dict[str, Shaped[Array, "B L"]]]:
  """(mix, batch, labels) of each row of a batch that is `paired` and its partner.

  mix: what the models need to mix embeddings.
  batch: tokens, segments and weights of the mixed rows; over the whole batch they sum
    to what the plain ones do, since the partners are the same rows in another order.
  labels: 'own' and 'other' [B, L], and 'share', which part of a position's weight
    is row i's.
  """
  other, share = batch.partner, batch.facts["share"][:, None]
  real, other_real = batch.segment_ids != 0, other.segment_ids != 0
  alone = jnp.where(real, 1.0, 0.0)
  own_weight = share * batch.weights
  weights = own_weight + (1 - share) * other.weights
  labels = {
    "own": batch.labels,
    "other": other.labels,
    "share": own_weight / jnp.where(weights > 0, weights, 1),
  }
  mixed = batch.replace(
    segment_ids=jnp.maximum(batch.segment_ids, other.segment_ids), weights=weights
  )
  mix = Mix(other.tokens, jnp.where(real & other_real, share, alone))
  return mix, mixed, labels


def _mixed_nll(logits: Float[Array, "B C V"], labels: Labels) -> Float[Array, "B C"]:
  """Cross-entropy on both rows' gold tokens, by their shares of the position."""
  own = cross_entropy(logits, labels["own"])
  other = cross_entropy(logits, labels["other"])
  return labels["share"] * own + (1 - labels["share"]) * other
