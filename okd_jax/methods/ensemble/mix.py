"""The method `ensemble`: its knobs, its loss, and who weighs the teachers."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, Shaped

from okd_jax.data.batch import Batch
from okd_jax.errors import UserError
from okd_jax.losses import (
  Output,
  TokenLoss,
  cross_entropy,
  entropy,
  mixture,
  per_token,
)
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
  check_choice,
  check_idle,
  check_positive,
  check_share,
  check_weight,
  combine,
  diagnostics,
  stop_gradient,
  token_sums,
)
from okd_jax.methods.base.divergences import Distance
from okd_jax.methods.base.knobs import at_start
from okd_jax.methods.base.method import cut_heads
from okd_jax.methods.ensemble import gate, policy

Facts = Mapping[str, Shaped[Array, "B L ..."]]
# (models, params, frozen, batch, now) -> (facts, the student's hidden states)
Look = Callable[..., tuple[Facts, Float[Array, "B L D"]]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Knobs(DivergenceKnobs):
  """What `ensemble` reads.

  kd_ratio: r, the share of the teachers.
  gold_weight: cross-entropy on gold on top of 1 - r.
  weighting: one of WEIGHTINGS.
  teacher_weights: w of 'mean', in the order of the teachers' names; () is equal.
  gate_per: 'token' or 'example', whether a row's tokens share their weights.
  gate_lr: learning rate of the gate, or of the policy.
  reward: of the policy, a key of `policy.REWARDS`.
  """

  kd_ratio: Knob = 1.0
  gold_weight: Knob = 0.0
  weighting: str = "mean"
  teacher_weights: Sequence[float] = ()
  gate_per: str = "token"
  gate_lr: float = 1e-3
  reward: str = "gold"

  def __post_init__(self):
    super().__post_init__()
    check_choice("method.weighting", self.weighting, WEIGHTINGS)
    weights = self.teacher_weights
    if weights and self.weighting != "mean":
      raise UserError(
        f"method.teacher_weights are fixed, but method.weighting={self.weighting} "
        "finds its own; leave them out or set method.weighting=mean"
      )
    if any(not w >= 0 for w in weights) or (weights and not sum(weights) > 0):
      raise UserError(
        f"method.teacher_weights={weights} must be 0 or more, one above 0"
      )
    check_share("method.kd_ratio", self.kd_ratio)
    check_weight("method.gold_weight", self.gold_weight)
    check_positive("method.gate_lr", self.gate_lr)
    check_choice("method.gate_per", self.gate_per, gate.PER)
    check_choice("method.reward", self.reward, policy.REWARDS)
    if self.weighting != "gated":
      check_idle(self, "method.weighting=gated", "gate_per")
    if self.weighting != "reinforced":
      check_idle(self, "method.weighting=reinforced", "reward")
    if self.weighting == "mean":
      check_idle(self, "method.weighting=gated or reinforced", "gate_lr")

  def numbers(self) -> dict[str, Knob]:
    """The numbers in the loss, by key."""
    return {
      "kd_ratio": self.kd_ratio,
      "temperature": self.temperature,
      "gold_weight": self.gold_weight,
    } | self.shape


def build(knobs: Knobs) -> Method:
  """Distillation from several teachers."""
  return WEIGHTINGS[knobs.weighting](knobs)


def _mean(knobs: Knobs) -> Method:
  token_loss = _token_loss(_mixed(knobs.distance()))

  def loss(
    models: Models,
    params: Params,
    frozen: Params,
    batch: Batch,
    key: Key[Array, ""] | None,
    now: Now,
  ) -> Loss:
    weights = jnp.array(list(knobs.teacher_weights) or [1.0] * len(frozen))
    weights = weights / weights.sum()
    return _weighted(models, params, frozen, batch, key, now, token_loss, weights)

  return Method(loss, knobs.numbers(), several=True)


def _gated(knobs: Knobs) -> Method:
  distance = knobs.distance()
  token_loss, look = _token_loss(_apart(distance)), _look(distance)

  def loss(
    models: Models,
    params: Params,
    frozen: Params,
    batch: Batch,
    key: Key[Array, ""] | None,
    now: Now,
  ) -> Loss:
    rest = {k: v for k, v in now.items() if k not in ("kd_ratio", "gold_weight")}
    facts, _ = look(models, params, frozen, batch, rest)
    weights, own = gate.weigh(params["gate"], facts, batch, knobs.gate_per)
    value, metrics = _weighted(
      models, params, frozen, batch, key, now, token_loss, weights
    )
    return value + own, metrics | {"gate_loss": own}

  return Method(
    loss,
    knobs.numbers(),
    several=True,
    updates=(("student", "gate"),),
    trees={"gate": (gate.init, knobs.gate_lr)},
    takes_packed=knobs.gate_per == "token",
  )


def _reinforced(knobs: Knobs) -> Method:
  distance = knobs.distance()
  token_loss, look = _token_loss(_apart(distance)), _look(distance)
  # What the policy sees, before and after a step, is measured by one unmoving rule.
  settled = at_start(knobs.shape | {"temperature": knobs.temperature})

  def prepare(
    models: Models,
    params: Params,
    frozen: Params,
    batch: Batch,
    key: Key[Array, ""],
    now: Now | None = None,
  ) -> Batch:
    del now  # see `settled`
    facts, hidden = look(models, params, frozen, batch, settled)
    chosen = policy.choose(params["policy"], facts, hidden, batch.mask, key)
    return batch.replace(facts=chosen)

  def loss(
    models: Models,
    params: Params,
    frozen: Params,
    batch: Batch,
    key: Key[Array, ""] | None,
    now: Now,
  ) -> Loss:
    weights = policy.share(batch.facts["actions"])[:, None]
    facts, _ = look(models, params, frozen, batch, settled)
    own, more = policy.loss(params["policy"], facts, batch, knobs.reward, now)
    value, metrics = _weighted(
      models, params, frozen, batch, key, now, token_loss, weights
    )
    return value + own, metrics | more

  return Method(
    loss,
    knobs.numbers(),
    several=True,
    # The reward is what the chosen teachers did to the student: it moves first.
    updates=(("student",), ("policy",)),
    trees={"policy": (policy.init, knobs.gate_lr)},
    sequences=Sequences(prepare=prepare),
    takes_packed=False,
  )


WEIGHTINGS: dict[str, Callable[[Knobs], Method]] = {
  "mean": _mean,
  "gated": _gated,
  "reinforced": _reinforced,
}


def _weighted(
  models: Models,
  params: Params,
  frozen: Params,
  batch: Batch,
  key: Key[Array, ""] | None,
  now: Now,
  token_loss: TokenLoss,
  weights: Float[Array, "*#B n"],
) -> Loss:
  """The student's loss, given every teacher's weight, in the order of their names."""
  weights = jnp.broadcast_to(stop_gradient(weights), (*batch.labels.shape, len(frozen)))
  outputs = _outputs(models, params, frozen, batch, key)
  return token_sums(models, token_loss, outputs, batch, now, (batch.labels, weights))


def _mixed(distance: Distance) -> Callable[..., Float[Array, "B C"]]:
  def term(p: Mapping[str, Any], student: Any, weights: Any, **rest: Any):
    return distance(
      mixture(list(p.values()), weights, rest["temperature"]), student, **rest
    )

  return term


def _apart(distance: Distance) -> Callable[..., Float[Array, "B C"]]:
  def term(p: Mapping[str, Any], student: Any, weights: Any, **rest: Any):
    each = [distance(z, student, **rest) for z in p.values()]
    return sum(weights[..., i] * value for i, value in enumerate(each))

  return term


def _token_loss(term: Callable[..., Float[Array, "B C"]]) -> TokenLoss:
  """The loss of a token, given gold and every teacher's weight [B, C, n]."""

  def token_loss(
    logits: Logits,
    labels: tuple[Int[Array, "B C"], Float[Array, "B C n"]],
    *,
    kd_ratio: Any,
    gold_weight: Any,
    **rest: Any,
  ):
    gold, weights = labels
    student, p = logits["student"], _teachers(logits)
    d = term(p, student, weights, **rest)
    ce = cross_entropy(student, gold)
    loss = combine((kd_ratio, d), (1 - kd_ratio + gold_weight, ce))
    plain = mixture(list(p.values()), weights)  # at T = 1, as all diagnostics
    metrics = diagnostics({"student": student, "teacher": plain}, gold)
    for i, (name, z) in enumerate(p.items()):
      metrics[f"weight_{name}"] = weights[..., i]
      metrics[f"nll_{name}"] = cross_entropy(z, gold)
    return loss, metrics | {"divergence": d}

  return token_loss


def _look(distance: Distance) -> Look:
  """What the teachers and the student make of each token, nothing differentiated."""

  def look(
    models: Models, params: Params, frozen: Params, batch: Batch, now: Now
  ) -> tuple[Facts, Float[Array, "B L D"]]:
    """({figure: [B, L] or [B, L, n]}, the student's hidden states)."""
    outputs = _outputs(models, params, frozen, batch, None)

    def facts(logits: Logits, labels: Int[Array, "B C"]):
      student, p = logits["student"], _teachers(logits)
      stack = {
        "nll": [cross_entropy(z, labels) for z in p.values()],
        "entropy": [entropy(z) for z in p.values()],
        "divergence": [distance(z, student, **now) for z in p.values()],
      }
      stacked = {k: jnp.stack(v, axis=-1) for k, v in stack.items()}
      return stacked | {"student_nll": cross_entropy(student, labels)}

    found = per_token(facts, cut_heads(outputs), batch.labels, models.chunk)
    return stop_gradient(found), stop_gradient(outputs["student"].hidden)

  return look


def _teachers(logits: Logits) -> dict[str, jax.Array]:
  return {k: stop_gradient(v) for k, v in sorted(logits.items()) if k != "student"}


def _outputs(
  models: Models,
  params: Params,
  frozen: Params,
  batch: Batch,
  key: Key[Array, ""] | None,
) -> dict[str, Output]:
  outputs = {
    name: models.teachers[name].apply(frozen[name], None, batch)
    for name in sorted(frozen)
  }
  return outputs | {"student": models.student(params["student"], batch, key)}
