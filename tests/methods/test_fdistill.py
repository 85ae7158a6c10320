"""f-distill: its steps add up to the divergence between whole sequences."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trial import KNOBS, LogitTrial, Setup, make_batch, make_logits, total, weighted

from okd_jax import methods
from okd_jax.data.batch import Batch
from okd_jax.errors import UserError
from okd_jax.losses import Output
from okd_jax.methods.base.knobs import knobs_at

# The toy: all answers of two tokens out of three; 3 stands before the first.
ANSWERS = np.array([*itertools.product(range(3), repeat=2)])
PREFIXES = np.stack([np.full(9, 3), ANSWERS[:, 0]], 1)
DIVERGENCES = ("forward_kl", "reverse_kl", "jensen_shannon", "total_variation")


def toy_tables(seed=0):
  """(student's, teacher's) logits by the token before, [4, 3]."""
  keys = jax.random.split(jax.random.key(seed))
  return tuple(1.5 * jax.random.normal(key, (4, 3)) for key in keys)


def toy_logprobs(table):
  """Log-probability of each answer [9]."""
  return jax.nn.log_softmax(table)[PREFIXES, ANSWERS].sum(1)


def toy_loss(table, teacher, divergence, exact_mixture=False, positions=(1.0, 1.0)):
  """Its expectation: all answers, weighed as their writers would write them."""

  def output(table, batch):
    return Output(table[batch.tokens], jnp.eye(3))

  def apply(frozen, adapter, batch, mix=None):
    return output(frozen, batch)

  knobs = {"divergence": divergence, "exact_mixture": exact_mixture}
  method = methods.build("fdistill", KNOBS | knobs)
  models = methods.Models(
    lambda params, batch, key, mix=None: output(params, batch),
    {"teacher": methods.Teacher(apply)},
    2,
  )

  def rows(writer):
    chance = jax.lax.stop_gradient(jnp.exp(toy_logprobs(writer)))
    return Batch(
      tokens=jnp.asarray(PREFIXES),
      labels=jnp.asarray(ANSWERS),
      mask=jnp.ones((9, 2), bool),
      segment_ids=jnp.ones((9, 2), jnp.int32),
      weights=chance[:, None] * jnp.array([positions]),
    )

  batch = rows(table).replace(answers={"teacher": rows(teacher)})
  params, frozen = {"student": table}, {"teacher": teacher}
  key, now = jax.random.key(0), knobs_at(method.knobs, 0.0)
  return method.loss(models, params, frozen, batch, key, now)[0]


def sequence_kl(log_a, log_b):
  return (jnp.exp(log_a) * (log_a - log_b)).sum()


def test_forward_steps_add_up():
  """METHODS 4.3: sum_t E_p[KL_t] is KL(p || q) of sequences, and so is its gradient."""
  table, teacher = toy_tables()

  def whole(table):
    return sequence_kl(toy_logprobs(teacher), toy_logprobs(table))

  def steps(table):
    return toy_loss(table, teacher, "forward_kl")

  want, got = (jax.value_and_grad(f)(table) for f in (whole, steps))
  np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
  np.testing.assert_allclose(got[1], want[1], atol=1e-6)


@pytest.mark.parametrize("seed", [0, 1])
def test_reverse_steps_add_up(seed):
  """METHODS 4.3: sum_t E_q[KL_t] is KL(q || p) of sequences."""
  table, teacher = toy_tables(seed)
  want = sequence_kl(toy_logprobs(table), toy_logprobs(teacher))
  got = toy_loss(table, teacher, "reverse_kl")
  np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("seed", [0, 1])
def test_jensen_shannon_steps_add_up_with_the_true_mixture_alone(seed):
  """METHODS 4.3: m's conditional weighs p and q by what they gave to the prefix."""
  table, teacher = toy_tables(seed)
  log_q, log_p = toy_logprobs(table), toy_logprobs(teacher)
  log_m = jnp.logaddexp(log_p, log_q) - jnp.log(2)
  want = (sequence_kl(log_p, log_m) + sequence_kl(log_q, log_m)) / 2
  exact, average = (
    toy_loss(table, teacher, "jensen_shannon", flag) for flag in (True, False)
  )
  np.testing.assert_allclose(exact, want, rtol=1e-5)
  assert abs(average - want) > 1e-2 * want


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_total_variation_steps_bound_the_sequences(seed):
  """METHODS 4.3: an upper bound, and 0 where the models agree."""
  table, teacher = toy_tables(seed)
  gap = jnp.exp(toy_logprobs(table)) - jnp.exp(toy_logprobs(teacher))
  got = toy_loss(table, teacher, "total_variation")
  assert got > 0.5 * jnp.abs(gap).sum() > 0
  assert toy_loss(table, table, "total_variation") == 0


def test_the_mixtures_weight_is_a_constant():
  """METHODS 4.3 [ours]: w under stop_gradient; step 2 teaches nothing about step 1."""
  table, teacher = toy_tables()

  def second(table):
    return toy_loss(table, teacher, "jensen_shannon", True, positions=(0.0, 1.0))

  grad = jax.grad(second)(table)
  np.testing.assert_array_equal(grad[3], 0)
  assert jnp.all(jnp.abs(grad[:3]).sum(1) > 1e-4)


@pytest.mark.parametrize(
  "divergence, exact_mixture",
  [*((divergence, False) for divergence in DIVERGENCES), ("jensen_shannon", True)],
)
def test_gradients_reach_the_student_alone(divergence, exact_mixture):
  """METHODS 4.3; guards F1."""
  trial = LogitTrial("fdistill", divergence=divergence, exact_mixture=exact_mixture)
  batch = make_batch()
  value = jax.jit(jax.value_and_grad(lambda logits: trial(*logits, batch)[0]))
  loss, grads = value(make_logits())
  assert loss > 0 and total(grads[0]) > 0
  for grad in grads[1:]:
    np.testing.assert_array_equal(grad, 0)
  assert all(jnp.isfinite(grad).all() for grad in grads)


@pytest.mark.parametrize(
  "divergence, source, beforehand",
  [
    ("forward_kl", "gold", ("teacher",)),
    ("reverse_kl", "student", ()),
    ("jensen_shannon", "student", ("teacher",)),
    ("total_variation", "student", ("teacher",)),
    ("", "student", ("teacher",)),
  ],
)
def test_whose_text_it_asks_for(divergence, source, beforehand):
  """METHODS 4.3: y of the teacher, offline; y' of the student; gold only if weighed."""
  for gold_weight in (0.0, 0.5):
    knobs = KNOBS | {"divergence": divergence, "gold_weight": gold_weight}
    plan = methods.build("fdistill", knobs).sequences
    assert (plan.source, plan.beforehand) == (source, beforehand)
    assert plan.gold == bool(gold_weight)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_each_text_gets_its_own_term(divergence):
  """METHODS 4.3: forward KL never sees y', reverse KL never y, the others both."""
  setup = Setup("fdistill", divergence=divergence)
  one, other = weighted(make_batch(0)), weighted(make_batch(1))

  @jax.jit
  def value(own, teachers):
    return setup.loss(setup.params, own.replace(answers={"teacher": teachers}))[0]

  first = value(one, one)
  assert (value(other, one) != first) == (divergence != "forward_kl")
  assert (value(one, other) != first) == (divergence != "reverse_kl")
  if divergence in ("jensen_shannon", "total_variation"):
    # Each text has one half of the divergence, over its own tokens.
    swapped = value(other, one) + value(one, other)
    np.testing.assert_allclose(swapped, first + value(other, other), rtol=1e-4)


def test_only_what_decomposes_is_taken():
  with pytest.raises(UserError, match="method.divergence='adaptive_kl': fdistill"):
    methods.build("fdistill", KNOBS | {"divergence": "adaptive_kl"})
