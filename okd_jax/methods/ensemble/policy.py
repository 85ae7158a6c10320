"""Reinforced selection: a policy says which teachers teach an example.

Reinforced Multi-Teacher Selection for Knowledge Distillation, Yuan et al. 2020, arXiv
2012.06048: for each example and teacher a logistic policy sees the example's embedding
and how the teacher does on it, and chooses to use it or not; REINFORCE moves it towards
what was good for the student. Ours, where the paper leaves it open or is about
classifiers: the state is the student's mean hidden state and the teacher's mean
cross-entropy, entropy and divergence to the student; the reward of a step is measured
on its own examples once the student has moved, against what it was before, less a
baseline that is learned, too. By default it is the fall of the cross-entropy on gold,
the paper's first; its second adds that of the divergence from those chosen, which likes
teachers far from the student. Its third adds the gain on held-out data: the same for
all examples of a step, so that such a baseline takes it away again.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from okd_jax.data.batch import Batch
from okd_jax.methods.base import Now, stop_gradient

# What the student should have little of, besides its cross-entropy on gold.
REWARDS = {"gold": False, "gold_and_teachers": True}

Tree = Mapping[str, Float[Array, "..."]]
Facts = Mapping[str, Float[Array, "B L ..."]]


def init(
  key: Key[Array, ""], teachers: int, hidden_size: int
) -> dict[str, Float[Array, "..."]]:
  """Every teacher is chosen with probability 1/2, whatever the example."""
  del key
  kernel = jnp.zeros((teachers, hidden_size + 3))
  return {"kernel": kernel, "bias": jnp.zeros(teachers), "baseline": jnp.zeros(())}


def choose(
  params: Tree,
  facts: Facts,
  hidden: Float[Array, "B L D"],
  mask: Bool[Array, "B L"],
  key: Key[Array, ""],
) -> dict[str, Float[Array, "B ..."]]:
  """{'actions' [B, n], 'state' [B, n, F], 'before' [B, 2]}: constants of a step.

  facts: 'nll', 'entropy', 'divergence' [B, L, n] of the teachers and 'student_nll'
    [B, L]. hidden: the student's hidden states [B, L, D].
  """
  mean = _mean_over(mask)
  n = facts["nll"].shape[-1]
  pooled = mean(hidden.astype(jnp.float32))
  own = [mean(facts[name]) for name in ("nll", "entropy", "divergence")]
  shared = jnp.broadcast_to(pooled[:, None], (len(pooled), n, pooled.shape[-1]))
  state = jnp.concatenate([shared, jnp.stack(own, axis=-1)], axis=-1)
  actions = jax.random.bernoulli(key, jax.nn.sigmoid(logits(params, state)))
  actions = actions.astype(jnp.float32)
  return {"actions": actions, "state": state, "before": _costs(facts, mask, actions)}


def logits(params: Tree, state: Float[Array, "B n F"]) -> Float[Array, "B n"]:
  """Each teacher's, by a map of its own."""
  return jnp.einsum("bnf,nf->bn", state, params["kernel"]) + params["bias"][None]


def share(actions: Float[Array, "B n"]) -> Float[Array, "B n"]:
  """Chosen teachers count the same; all 0 where none was chosen."""
  return actions / jnp.maximum(actions.sum(-1, keepdims=True), 1.0)


def loss(
  params: Tree, facts: Facts, batch: Batch, reward: str, now: Now
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
  """(REINFORCE's loss, metrics) of a step; moves the policy alone.

  facts: as in `choose`, of the student that has moved.
  """
  ratio = now["kd_ratio"] if REWARDS[reward] else 0.0
  weights = jnp.stack([jnp.ones(()), jnp.asarray(ratio, jnp.float32)])
  after = _costs(facts, batch.mask, batch.facts["actions"])
  gain = stop_gradient((batch.facts["before"] - after) @ weights)
  # Each row counts by its share of the batch's tokens, so that parts add up.
  row_weight = batch.weights.sum(-1)
  baseline = params["baseline"]
  advantage = gain - stop_gradient(baseline)
  z = logits(params, batch.facts["state"])
  chosen = batch.facts["actions"]
  log_pi = (chosen * jax.nn.log_sigmoid(z) + (1 - chosen) * jax.nn.log_sigmoid(-z)).sum(
    -1
  )
  value = -jnp.sum(advantage * log_pi * row_weight)
  fit = 0.5 * jnp.sum(jnp.square(gain - baseline) * row_weight)
  return value + fit, {
    "policy_loss": value,
    "policy_reward": -jnp.sum((after @ weights) * row_weight),
    "policy_gain": jnp.sum(gain * row_weight),
  }


def _costs(
  facts: Facts, mask: Bool[Array, "B L"], actions: Float[Array, "B n"]
) -> Float[Array, "B 2"]:
  """The student's cross-entropy, and its divergence from those chosen."""
  mean = _mean_over(mask)
  divergence = (mean(facts["divergence"]) * share(actions)).sum(-1)
  return jnp.stack([mean(facts["student_nll"]), divergence], axis=-1)


def _mean_over(mask: Bool[Array, "B L"]) -> Callable[[Array], Array]:
  count = jnp.maximum(mask.sum(1), 1)

  def mean(x: Float[Array, "B L ..."]) -> Float[Array, "B ..."]:
    where = mask.reshape(*mask.shape, *[1] * (x.ndim - 2))
    return jnp.where(where, x, 0.0).sum(1) / count.reshape(-1, *[1] * (x.ndim - 2))

  return mean
