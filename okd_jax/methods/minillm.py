"""MiniLLM: policy gradient towards the teacher, on text that both models wrote.

Gu et al. 2023, arXiv 2306.08543; code microsoft/LMOps. The sequence-level KL(q || p)
has the gradient -E sum_t [grad sum_v q log(p/q) + R_{t+1} grad log q(y_t)]: the
single-step term, exact over the vocabulary, and the later rewards' policy gradient
(Eq. 7). Text is drawn from a p + (1 - a) q and weighed by w = q / (a p + (1 - a) q).
Per token, with rho = w q_new / q_old:

    max(-A rho, -A clip(rho, 1 - eps, 1 + eps)) + s KL(q || p) + g CE(gold)

                  paper                           code
    reward r      log p - log q                   twice that, within +-100
    advantage A   mean of r over later steps      sum of r .95^k from this step on,
                                                  over the steps left, whitened
    s             w                               1

Rewards, weights and advantages are constants, found once for a sampled batch and
without dropout; the authors train without it, too (train.dropout 0).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key, Shaped

from okd_jax.data.batch import Batch
from okd_jax.errors import UserError
from okd_jax.losses import TokenLoss, cross_entropy, per_token, reverse_kl
from okd_jax.methods.base import (
  Knob,
  Logits,
  Loss,
  Method,
  Models,
  Now,
  Params,
  TextKnobs,
  check_choice,
  check_share,
  check_weight,
  diagnostics,
  gold_nll,
  is_zero,
  stop_gradient,
  token_sums,
)
from okd_jax.methods.base.knobs import never
from okd_jax.methods.base.method import cut_heads

VARIANTS = ("paper", "code")
_REWARD_SCALE, _REWARD_LIMIT, _DISCOUNT = 2.0, 100.0, 0.95


@dataclasses.dataclass(frozen=True, kw_only=True)
class Knobs(TextKnobs):
  """What `minillm` reads; sampling other than at temperature 1 makes w approximate.

  variant: 'code', as the authors' code has it, or 'paper'.
  teacher_mix: a, the teacher's share of each token's distribution.
  ppo_clip: eps.
  length_norm: divide returns by the steps they sum.
  single_step: the exact single-step term; without it A starts at this step.
  updates_per_sample: steps on one sampled batch.
  gold_weight: g, the official code's language model loss on the data.
  """

  variant: str = "code"
  teacher_mix: float = 0.2
  ppo_clip: Knob = 0.2
  length_norm: bool = True
  single_step: bool = True
  updates_per_sample: int = 4
  gold_weight: Knob = 0.0

  def __post_init__(self):
    super().__post_init__()
    check_choice("method.variant", self.variant, VARIANTS)
    if not 0 <= self.teacher_mix < 1:
      raise UserError(
        f"method.teacher_mix={self.teacher_mix} must be at least 0 and below 1"
      )
    if self.updates_per_sample < 1:
      raise UserError(
        f"method.updates_per_sample={self.updates_per_sample} must be 1 or more"
      )
    check_share("method.ppo_clip", self.ppo_clip)
    check_weight("method.gold_weight", self.gold_weight)


def build(knobs: Knobs) -> Method:
  """MiniLLM in its variant."""
  token_loss = _token_loss(knobs)

  def prepare(
    models: Models,
    params: Params,
    frozen: Params,
    batch: Batch,
    key: Key[Array, ""] | None = None,
    now: Now | None = None,
  ) -> Batch:
    del key, now  # nothing is drawn, and no knob that moves has a part in it
    logprobs = _logprobs(models, params, frozen, batch)
    return batch.replace(facts=_signals(logprobs, batch.mask, knobs))

  def loss(
    models: Models,
    params: Params,
    frozen: Params,
    batch: Batch,
    key: Key[Array, ""] | None,
    now: Now,
  ) -> Loss:
    now = dict(now)
    gold_weight = now.pop("gold_weight")
    outputs = {
      "student": models.student(params["student"], batch, key),
      "teacher": models.teacher(frozen, None, batch),
    }
    labels = {"labels": batch.labels, **batch.facts}
    value, metrics = token_sums(models, token_loss, outputs, batch, now, labels)
    if batch.gold is not None and not is_zero(gold_weight):
      nll = gold_nll(models, params, batch.gold, jax.random.fold_in(key, 1))
      value, metrics = value + gold_weight * nll, metrics | {"gold_nll": nll}
    return value, metrics

  sequences = knobs.sequences(
    "mixture" if knobs.teacher_mix else "student",
    weight=knobs.teacher_mix,
    gold=not never(knobs.gold_weight),
    updates=knobs.updates_per_sample,
    prepare=prepare,
  )
  numbers = {"ppo_clip": knobs.ppo_clip, "gold_weight": knobs.gold_weight}
  return Method(loss, numbers, sequences=sequences)


def _token_loss(knobs: Knobs) -> TokenLoss:
  def token_loss(
    logits: Logits, labels: Mapping[str, Shaped[Array, "B C"]], *, ppo_clip: Any
  ):
    student, teacher = logits["student"], stop_gradient(logits["teacher"])
    ratio = labels["weight"] * jnp.exp(
      -cross_entropy(student, labels["labels"]) - labels["old"]
    )
    gain = labels["advantage"] * ratio
    clipped = labels["advantage"] * jnp.clip(ratio, 1 - ppo_clip, 1 + ppo_clip)
    policy = -jnp.minimum(gain, clipped)
    kl = reverse_kl(teacher, student)
    factor = labels["weight"] if knobs.variant == "paper" else 1.0
    loss = policy + factor * kl if knobs.single_step else policy
    metrics = {
      "policy_loss": policy,
      "divergence": kl,
      "reward": labels["reward"],
      "importance": ratio,
    }
    return loss, metrics | diagnostics(logits, labels["labels"])

  return token_loss


def _logprobs(
  models: Models, params: Params, frozen: Params, batch: Batch
) -> dict[str, Float[Array, "B L"]]:
  """{'student', 'teacher'}: log-probability of each label, as of now."""
  outputs = {
    "student": models.student(params["student"], batch, None),
    "teacher": models.teacher(frozen, None, batch),
  }

  def both(logits: Logits, labels: Any):
    return {name: -cross_entropy(x, labels) for name, x in logits.items()}

  return per_token(both, cut_heads(outputs), batch.labels, models.chunk)


def _signals(
  logprobs: Mapping[str, Float[Array, "B L"]], mask: Bool[Array, "B L"], knobs: Knobs
) -> dict[str, Float[Array, "B L"]]:
  """What a sampled batch must know about its writers: constants of its updates."""
  log_q, log_p = logprobs["student"], logprobs["teacher"]
  weight = jnp.ones_like(log_q)
  if knobs.teacher_mix:
    written = jnp.logaddexp(
      jnp.log(knobs.teacher_mix) + log_p, jnp.log1p(-knobs.teacher_mix) + log_q
    )
    weight = jnp.exp(log_q - written)
  reward = jnp.where(mask, log_p - log_q, 0.0)
  code = knobs.variant == "code"
  scaled = reward
  if code:
    scaled = jnp.clip(_REWARD_SCALE * reward, -_REWARD_LIMIT, _REWARD_LIMIT)
  # The paper's R_{t+1} starts after this step, whose reward the single-step term holds.
  later = not code and knobs.single_step
  total = _discounted(scaled, _DISCOUNT if code else 1.0)
  left = _discounted(mask.astype(jnp.float32), 1.0)
  if later:
    total, left = total - scaled, left - 1
  advantage = total / jnp.maximum(left, 1.0) if knobs.length_norm else total
  if code:
    advantage = _whiten(advantage, mask)
  return {
    "old": log_q,
    "weight": weight,
    "advantage": jnp.where(mask, advantage, 0.0),
    "reward": reward,
  }


def _discounted(values: Float[Array, "B L"], discount: float) -> Float[Array, "B L"]:
  """sum_k discount^k values[t + k] for each t."""

  def back(carry: Float[Array, " B"], value: Float[Array, " B"]):
    carry = value + discount * carry
    return carry, carry

  start = jnp.zeros(len(values))
  return jax.lax.scan(back, start, values.T, reverse=True)[1].T


def _whiten(
  values: Float[Array, "B L"], mask: Bool[Array, "B L"]
) -> Float[Array, "B L"]:
  """Mean 0 and deviation 1 over the valid tokens alone (the code counts pads, too)."""
  count = jnp.maximum(mask.sum(), 1)
  mean = jnp.where(mask, values, 0).sum() / count
  variance = jnp.where(mask, jnp.square(values - mean), 0).sum() / count
  return (values - mean) * jax.lax.rsqrt(variance + 1e-8)
