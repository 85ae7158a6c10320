"""Several frozen teachers at once: averaged, weighed by a gate, or chosen by a policy.

By `weighting`, with p_i the teachers, q the student, y the gold token, r kd_ratio:

    mean        r D(sum_i w_i p_i, q) + (1 - r) CE(y; q)
    gated       r sum_i a_i D(p_i, q) + (1 - r) CE(y; q)     a: softmax of a learned map
    reinforced  r mean over the chosen of D(p_i, q) + (1 - r) CE(y; q)    per example,
                the first term being 0 where nobody was chosen

The gate is that of ensembled CTR prediction (Zhu et al. 2020, arXiv 2011.04106), the
policy RL-KD's (Yuan et al. 2020, arXiv 2012.06048); `gate` and `policy` say what is
theirs and what is ours.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from okd_jax.errors import UserError
from okd_jax.losses import cross_entropy, entropy, mixture, per_token
from okd_jax.methods.base.knobs import (
  Knob,
  check_positive,
  check_share,
  check_weight,
  find_divergence,
  own_shape,
)
from okd_jax.methods.base.method import (
  Method,
  combine,
  cut_heads,
  diagnostics,
  stop_gradient,
  token_sums,
)
from okd_jax.methods.base.sequences import Sequences
from okd_jax.methods.ensemble import gate, policy

WEIGHTINGS = ("mean", "gated", "reinforced")


def build(
  *,
  divergence: str,
  kd_ratio: Knob,
  temperature: Knob,
  gold_weight: Knob,
  weighting: str,
  teacher_weights: tuple,
  gate_per: str,
  gate_lr: float,
  reward: str,
  **shape: Knob,
) -> Method:
  """Distillation from several teachers.

  Args:
    divergence: D, a key of `knobs.DIVERGENCES`; '' is the forward KL.
    kd_ratio: r, the share of the teachers.
    temperature: T of all distributions in D, which is multiplied by T^2.
    gold_weight: cross-entropy on gold on top of 1 - r.
    weighting: one of WEIGHTINGS.
    teacher_weights: w of 'mean', in the order of the teachers' names; () is equal.
    gate_per: 'token' or 'example', whether a row's tokens share their weights.
    gate_lr: learning rate of the gate, or of the policy.
    reward: of the policy, a key of `policy.REWARDS`.
  """
  _check(weighting, teacher_weights, kd_ratio, temperature, gold_weight)
  check_positive("method.gate_lr", gate_lr)
  gate.check(gate_per)
  policy.check(reward)
  divergence = divergence or "forward_kl"
  distance = find_divergence("method.divergence", divergence, shape)
  token_loss, look = _token_loss(weighting, distance), _look(distance)
  # What the policy sees, before and after a step, is measured by one unmoving rule.
  settled = _settled(own_shape(shape, divergence) | {"temperature": temperature})

  def prepare(models, params, frozen, batch, key):
    facts, hidden = look(models, params, frozen, batch, settled)
    return batch | policy.choose(params["policy"], facts, hidden, batch["mask"], key)

  def loss(models, params, frozen, batch, key, knobs):
    names, shape_ = sorted(frozen), batch["labels"].shape
    rest = {k: v for k, v in knobs.items() if k not in ("kd_ratio", "gold_weight")}
    value, more = 0.0, {}
    if weighting == "mean":
      weights = _fixed(teacher_weights, names)
    elif weighting == "gated":
      facts, _ = look(models, params, frozen, batch, rest)
      weights, value = gate.weigh(params["gate"], facts, batch, gate_per)
      more["gate_loss"] = value
    else:
      weights = policy.share(batch["actions"])[:, None]
      facts, _ = look(models, params, frozen, batch, settled)
      value, more = policy.loss(params["policy"], facts, batch, reward, knobs)
    weights = jnp.broadcast_to(stop_gradient(weights), (*shape_, len(names)))
    outputs = _outputs(models, params, frozen, batch, key)
    labels = batch["labels"], weights
    main, metrics = token_sums(models, token_loss, outputs, batch, knobs, labels)
    return main + value, metrics | more

  knobs = {"kd_ratio": kd_ratio, "temperature": temperature, "gold_weight": gold_weight}
  common = dict(teacher="several", knobs=knobs | own_shape(shape, divergence))
  if weighting == "gated":
    return Method(
      loss,
      updates=(("student", "gate"),),
      trees={"gate": (gate.init, gate_lr)},
      takes_packed=gate_per == "token",
      **common,
    )
  if weighting == "reinforced":
    return Method(
      loss,
      # The reward is what the chosen teachers did to the student: it moves first.
      updates=(("student",), ("policy",)),
      trees={"policy": (policy.init, gate_lr)},
      sequences=Sequences(prepare=prepare),
      takes_packed=False,
      **common,
    )
  return Method(loss, **common)


def _check(weighting, teacher_weights, kd_ratio, temperature, gold_weight) -> None:
  if weighting not in WEIGHTINGS:
    raise UserError(
      f"method.weighting={weighting!r} must be one of {', '.join(WEIGHTINGS)}"
    )
  if teacher_weights and weighting != "mean":
    raise UserError(
      f"method.teacher_weights are fixed, but method.weighting={weighting} finds its "
      "own; leave them out or set method.weighting=mean"
    )
  if any(not w >= 0 for w in teacher_weights) or (
    teacher_weights and not sum(teacher_weights) > 0
  ):
    raise UserError(
      f"method.teacher_weights={teacher_weights} must be 0 or more, one above 0"
    )
  check_share("method.kd_ratio", kd_ratio)
  check_positive("method.temperature", temperature)
  check_weight("method.gold_weight", gold_weight)


def _token_loss(weighting: str, distance: Callable) -> Callable:
  """The loss of a token, given gold and every teacher's weight [B, C, n]."""

  def token_loss(logits, labels, *, kd_ratio, gold_weight, **knobs):
    gold, weights = labels
    student, p = logits["student"], _teachers(logits)
    if weighting == "mean":
      average = mixture(list(p.values()), weights, knobs["temperature"])
      d = distance(average, student, **knobs)
    else:
      each = [distance(z, student, **knobs) for z in p.values()]
      d = sum(weights[..., i] * value for i, value in enumerate(each))
    ce = cross_entropy(student, gold)
    loss = combine((kd_ratio, d), (1 - kd_ratio + gold_weight, ce))
    plain = mixture(list(p.values()), weights)  # at T = 1, as all diagnostics
    metrics = diagnostics({"student": student, "teacher": plain}, gold)
    for i, (name, z) in enumerate(p.items()):
      metrics[f"weight_{name}"] = weights[..., i]
      metrics[f"nll_{name}"] = cross_entropy(z, gold)
    return loss, metrics | {"divergence": d}

  return token_loss


def _look(distance: Callable) -> Callable:
  """What the teachers and the student make of each token, nothing differentiated."""

  def look(models, params, frozen, batch, knobs):
    """({figure: [B, L] or [B, L, n]}, the student's hidden states)."""
    outputs = _outputs(models, params, frozen, batch, None)

    def facts(logits, labels):
      student, p = logits["student"], _teachers(logits)
      stack = {
        "nll": [cross_entropy(z, labels) for z in p.values()],
        "entropy": [entropy(z) for z in p.values()],
        "divergence": [distance(z, student, **knobs) for z in p.values()],
      }
      stacked = {k: jnp.stack(v, axis=-1) for k, v in stack.items()}
      return stacked | {"student_nll": cross_entropy(student, labels)}

    found = per_token(facts, cut_heads(outputs), batch["labels"], models.chunk)
    return stop_gradient(found), stop_gradient(outputs["student"].hidden)

  return look


def _teachers(logits) -> dict[str, jax.Array]:
  return {k: stop_gradient(v) for k, v in sorted(logits.items()) if k != "student"}


def _outputs(models, params, frozen, batch, key):
  outputs = {
    name: models.named[name].teacher(frozen[name], None, batch)
    for name in sorted(frozen)
  }
  return outputs | {"student": models.student(params["student"], batch, key)}


def _fixed(weights, names) -> jax.Array:
  weights = jnp.array(weights or [1.0] * len(names))
  return weights / weights.sum()


def _settled(knobs) -> dict[str, Any]:
  """The knobs at the start of the run."""
  return {k: getattr(v, "start", v) for k, v in knobs.items()}
