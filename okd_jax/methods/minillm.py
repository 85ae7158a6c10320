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

import jax
import jax.numpy as jnp

from okd_jax.errors import UserError
from okd_jax.losses import cross_entropy, per_token, reverse_kl
from okd_jax.methods.base.knobs import Knob, check_share, check_weight
from okd_jax.methods.base.method import (
  Method,
  cut_heads,
  diagnostics,
  gold_nll,
  is_zero,
  stop_gradient,
  token_sums,
)
from okd_jax.methods.base.sequences import make_sequences, never

VARIANTS = ("paper", "code")
_REWARD_SCALE, _REWARD_LIMIT, _DISCOUNT = 2.0, 100.0, 0.95


def build(
  *,
  variant: str,
  teacher_mix: float,
  ppo_clip: Knob,
  length_norm: bool,
  single_step: bool,
  updates_per_sample: int,
  gold_weight: Knob,
  **sampling,
) -> Method:
  """MiniLLM in its `variant`.

  Args:
    teacher_mix: a, the teacher's share of each token's distribution.
    ppo_clip: eps.
    length_norm: divide returns by the steps they sum.
    single_step: the exact single-step term; without it A starts at this step.
    updates_per_sample: steps on one sampled batch.
    gold_weight: g, the official code's language model loss on the data.
    sampling: temperature and top_p other than 1 make the weights w approximate.
  """
  if variant not in VARIANTS:
    raise UserError(f"method.variant={variant!r} must be one of {', '.join(VARIANTS)}")
  if not 0 <= teacher_mix < 1:
    raise UserError(f"method.teacher_mix={teacher_mix} must be at least 0 and below 1")
  if updates_per_sample < 1:
    raise UserError(f"method.updates_per_sample={updates_per_sample} must be 1 or more")
  check_share("method.ppo_clip", ppo_clip)
  check_weight("method.gold_weight", gold_weight)

  def prepare(models, params, frozen, batch, key=None):
    del key  # nothing is drawn
    logprobs = _logprobs(models, params, frozen, batch)
    return batch | _signals(
      logprobs, batch["mask"], variant, teacher_mix, length_norm, single_step
    )

  def token_loss(logits, labels, *, ppo_clip):
    student, teacher = logits["student"], stop_gradient(logits["teacher"])
    ratio = labels["weight"] * jnp.exp(
      -cross_entropy(student, labels["labels"]) - labels["old"]
    )
    gain = labels["advantage"] * ratio
    clipped = labels["advantage"] * jnp.clip(ratio, 1 - ppo_clip, 1 + ppo_clip)
    policy = -jnp.minimum(gain, clipped)
    kl = reverse_kl(teacher, student)
    factor = labels["weight"] if variant == "paper" else 1.0
    loss = policy + factor * kl if single_step else policy
    metrics = {
      "policy_loss": policy,
      "divergence": kl,
      "reward": labels["reward"],
      "importance": ratio,
    }
    return loss, metrics | diagnostics(logits, labels["labels"])

  def loss(models, params, frozen, batch, key, knobs):
    knobs = dict(knobs)
    gold_weight = knobs.pop("gold_weight")
    outputs = {
      "student": models.student(params["student"], batch, key),
      "teacher": models.teacher(frozen, None, batch),
    }
    names = ("labels", "old", "weight", "advantage", "reward")
    labels = {name: batch[name] for name in names}
    value, metrics = token_sums(models, token_loss, outputs, batch, knobs, labels)
    if "gold" in batch and not is_zero(gold_weight):
      nll = gold_nll(models, params, batch, jax.random.fold_in(key, 1))
      value, metrics = value + gold_weight * nll, metrics | {"gold_nll": nll}
    return value, metrics

  sequences = make_sequences(
    "mixture" if teacher_mix else "student",
    **sampling,
    weight=teacher_mix,
    gold=not never(gold_weight),
    updates=updates_per_sample,
    prepare=prepare,
  )
  knobs = {"ppo_clip": ppo_clip, "gold_weight": gold_weight}
  return Method(loss=loss, teacher="frozen", knobs=knobs, sequences=sequences)


def _logprobs(models, params, frozen, batch):
  """{'student', 'teacher'}: log-probability of each label [B, L], as of now."""
  outputs = {
    "student": models.student(params["student"], batch, None),
    "teacher": models.teacher(frozen, None, batch),
  }

  def both(logits, labels):
    return {name: -cross_entropy(x, labels) for name, x in logits.items()}

  return per_token(both, cut_heads(outputs), batch["labels"], models.chunk)


def _signals(logprobs, mask, variant, teacher_mix, length_norm, single_step):
  """What a sampled batch must know about its writers: constants of its updates."""
  log_q, log_p = logprobs["student"], logprobs["teacher"]
  weight = jnp.ones_like(log_q)
  if teacher_mix:
    written = jnp.logaddexp(
      jnp.log(teacher_mix) + log_p, jnp.log1p(-teacher_mix) + log_q
    )
    weight = jnp.exp(log_q - written)
  reward = jnp.where(mask, log_p - log_q, 0.0)
  code = variant == "code"
  scaled = reward
  if code:
    scaled = jnp.clip(_REWARD_SCALE * reward, -_REWARD_LIMIT, _REWARD_LIMIT)
  # The paper's R_{t+1} starts after this step, whose reward the single-step term holds.
  later = not code and single_step
  total = _discounted(scaled, _DISCOUNT if code else 1.0)
  left = _discounted(mask.astype(jnp.float32), 1.0)
  if later:
    total, left = total - scaled, left - 1
  advantage = total / jnp.maximum(left, 1.0) if length_norm else total
  if code:
    advantage = _whiten(advantage, mask)
  return {
    "old": log_q,
    "weight": weight,
    "advantage": jnp.where(mask, advantage, 0.0),
    "reward": reward,
  }


def _discounted(values, discount: float):
  """sum_k discount^k values[t + k] for each t of [B, L]."""

  def back(carry, value):
    carry = value + discount * carry
    return carry, carry

  start = jnp.zeros(len(values))
  return jax.lax.scan(back, start, values.T, reverse=True)[1].T


def _whiten(values, mask):
  """Mean 0 and deviation 1 over the valid tokens alone (the code counts pads, too)."""
  count = jnp.maximum(mask.sum(), 1)
  mean = jnp.where(mask, values, 0).sum() / count
  variance = jnp.where(mask, jnp.square(values - mean), 0).sum() / count
  return (values - mean) * jax.lax.rsqrt(variance + 1e-8)
