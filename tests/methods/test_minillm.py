"""MiniLLM: its rewards, weights and advantages, and whose gradient it has."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from trial import KNOBS, VOCAB, LogitTrial, make_batch, make_logits, weighted

from okd_jax import methods
from okd_jax.data.batch import Batch
from okd_jax.errors import UserError
from okd_jax.losses import Output
from okd_jax.methods.base.knobs import knobs_at

variants = pytest.mark.parametrize("variant", ["paper", "code"])
SIGNALS = ("old", "weight", "advantage", "reward")

# The toy: all answers of two tokens out of three; 3 stands before the first.
ANSWERS = np.array([*itertools.product(range(3), repeat=2)])
PREFIXES = np.stack([np.full(9, 3), ANSWERS[:, 0]], 1)
PLAIN = dict(variant="paper", ppo_clip=1.0, length_norm=False, gold_weight=0.0)


def toy_tables():
  """(student's, teacher's) logits by the token before, [4, 3]."""
  keys = jax.random.split(jax.random.key(0))
  return tuple(1.5 * jax.random.normal(key, (4, 3)) for key in keys)


def toy_logprobs(table):
  """Log-probability of each token of each answer [9, 2]."""
  log_q = jax.nn.log_softmax(table)
  return log_q[PREFIXES, ANSWERS]


def toy_gradient(table, teacher, weights, signals=None, **knobs):
  """The gradient in the student's table on all answers, under these weights [9]."""

  def student(params, batch, key, mix=None):
    return Output(params[batch.tokens], jnp.eye(3))

  def apply(frozen, adapter, batch, mix=None):
    return Output(frozen[batch.tokens], jnp.eye(3))

  method = methods.build("minillm", KNOBS | PLAIN | knobs)
  models = methods.Models(student, {"teacher": methods.Teacher(apply)}, 2)
  batch = Batch(
    tokens=jnp.asarray(PREFIXES),
    labels=jnp.asarray(ANSWERS),
    mask=jnp.ones((9, 2), bool),
    segment_ids=jnp.ones((9, 2), jnp.int32),
    weights=jnp.stack([weights, weights], 1),
  )
  params, frozen = {"student": table}, {"teacher": teacher}
  batch = method.sequences.prepare(models, params, frozen, batch)
  batch = batch.replace(facts=batch.facts | (signals or {}))

  def loss(params):
    now = knobs_at(method.knobs, 0.0)
    key = jax.random.key(0)
    return method.loss(models, params, frozen, batch, key, now)[0]

  return jax.grad(loss)(params)["student"], batch


def prepared(trial, student, base, batch):
  """The batch with what it must know about its writers."""
  return trial.beside({"student": student}, {"teacher": base}, batch)


def loop_advantages(rewards, mask, variant, length_norm=True, single_step=True):
  """METHODS 4.4's table, one position at a time."""
  rewards = np.where(mask, rewards, 0)
  if variant == "code":
    rewards = np.clip(rewards / 0.5, -100, 100)
  advantages = np.zeros(mask.shape)
  for row, start in zip(*np.nonzero(mask), strict=True):
    included = variant == "code" or not single_step
    steps = [t for t in range(start, mask.shape[1]) if mask[row, t]]
    steps = steps if included else steps[1:]
    decay = 0.95 if variant == "code" else 1.0
    value = sum(decay ** (t - start) * rewards[row, t] for t in steps)
    advantages[row, start] = value / max(len(steps), 1) if length_norm else value
  if variant == "code":
    valid = advantages[mask]
    advantages = np.where(mask, (advantages - valid.mean()) / valid.std(), 0)
  return advantages


def picked(logits, labels):
  return -oracle.cross_entropy(logits, np.asarray(labels))


@variants
def test_equal_models_have_nothing_to_gain(variant):
  """METHODS 4.4: q = p gives no reward, no advantage and no gradient."""
  trial, batch = LogitTrial("minillm", variant=variant), make_batch()
  student = make_logits()[0]
  ready = prepared(trial, student, student, batch)
  for name in ("reward", "advantage"):  # 'code' whitens zeros: no NaN
    np.testing.assert_array_equal(ready.facts[name], 0)
  np.testing.assert_allclose(ready.facts["weight"], 1, rtol=1e-5)
  grad = jax.grad(lambda x: trial(x, student, student, batch)[0])(student)
  np.testing.assert_allclose(grad, 0, atol=1e-8)


@pytest.mark.parametrize("mix", [0.0, 0.3, 0.9])
def test_importance_weights(mix):
  """METHODS 4.4: w = q / (a p + (1 - a) q); a = 0 gives 1 and the student's text."""
  (student, _, base), batch = make_logits(), make_batch()
  trial = LogitTrial("minillm", teacher_mix=mix)
  plan = trial.method.sequences
  assert (plan.source, plan.weight) == ("mixture" if mix else "student", mix)
  ready = prepared(trial, student, base, batch)
  q, p = (np.exp(picked(x, batch.labels)) for x in (student, base))
  want = q / (mix * p + (1 - mix) * q)
  np.testing.assert_allclose(ready.facts["weight"], want, rtol=1e-4)
  if not mix:
    np.testing.assert_array_equal(ready.facts["weight"], 1)


def test_the_expected_gradient_is_the_sequence_kls():
  """METHODS 4.4: unclipped, not normalised, a = 0: that of KL(q || p) of sequences."""
  table, teacher = toy_tables()

  def sequence_kl(table):
    log_q, log_p = toy_logprobs(table).sum(1), toy_logprobs(teacher).sum(1)
    return (jnp.exp(log_q) * (log_q - log_p)).sum()

  weights = jnp.exp(toy_logprobs(table).sum(1))
  want = jax.grad(sequence_kl)(table)
  got, _ = toy_gradient(table, teacher, weights, teacher_mix=0.0)
  np.testing.assert_allclose(got, want, atol=1e-6)
  # The same expectation without the single-step term: REINFORCE, of more variance.
  got, _ = toy_gradient(table, teacher, weights, teacher_mix=0.0, single_step=False)
  np.testing.assert_allclose(got, want, atol=1e-6)
  assert jnp.abs(want).max() > 0.1


def test_the_single_step_term_under_a_mixture():
  """METHODS 4.4: w makes it E[KL_t] of the mixture's prefixes, exact at step 1."""
  table, teacher = toy_tables()
  log_q, log_p = toy_logprobs(table), toy_logprobs(teacher)
  weights = jnp.prod(0.3 * jnp.exp(log_p) + 0.7 * jnp.exp(log_q), 1)
  np.testing.assert_allclose(weights.sum(), 1, rtol=1e-6)
  nothing = {"advantage": jnp.zeros((9, 2))}
  got, _ = toy_gradient(table, teacher, weights, nothing, teacher_mix=0.3)

  def expected(table):
    log_q, log_p = jax.nn.log_softmax(table), jax.nn.log_softmax(teacher)
    kl = (jnp.exp(log_q) * (log_q - log_p)).sum(1)
    return (weights[:, None] * kl[PREFIXES]).sum()

  np.testing.assert_allclose(got, jax.grad(expected)(table), atol=1e-6)


@pytest.mark.parametrize("single_step", [True, False])
@pytest.mark.parametrize("length_norm", [True, False])
@variants
def test_advantages_equal_a_plain_loop(variant, length_norm, single_step):
  """METHODS 4.4's table: scale, limit, discount, which steps count, by what length."""
  # So far apart that the code's limit is reached.
  student, _, base = make_logits(scale=20.0)
  batch = make_batch()
  options = dict(variant=variant, length_norm=length_norm, single_step=single_step)
  ready = prepared(LogitTrial("minillm", **options), student, base, batch)
  mask = np.asarray(batch.mask)
  rewards = picked(base, batch.labels) - picked(student, batch.labels)
  assert (np.abs(2 * rewards[mask]) > 100).any()
  reward = ready.facts["reward"][mask]
  np.testing.assert_allclose(reward, rewards[mask], rtol=1e-4, atol=1e-4)
  want = loop_advantages(rewards, mask, **options)
  np.testing.assert_allclose(ready.facts["advantage"], want, rtol=1e-3, atol=1e-3)


def test_whitening_sees_valid_tokens_alone():
  """METHODS 4.4 [ours]: mean 0 and deviation 1 over them, nothing elsewhere."""
  (student, _, base), batch = make_logits(), make_batch()
  ready = prepared(LogitTrial("minillm", variant="code"), student, base, batch)
  valid = np.asarray(ready.facts["advantage"], np.float64)[np.asarray(batch.mask)]
  np.testing.assert_allclose([valid.mean(), valid.std()], [0, 1], atol=1e-5)
  np.testing.assert_array_equal(np.where(batch.mask, 0, ready.facts["advantage"]), 0)


@pytest.mark.parametrize("side", ["right", "left", "rows"])
@variants
def test_padding_makes_no_difference(variant, side):
  """METHODS 4.4; guards B2: more pads, or a row without any token, change nothing."""
  (student, _, base), batch = make_logits(), make_batch()
  trial = LogitTrial("minillm", variant=variant)
  pad = {"right": ((0, 0), (0, 3)), "left": ((0, 0), (3, 0)), "rows": ((0, 2), (0, 0))}
  pad = pad[side]
  longer = jax.tree.map(lambda x: jnp.pad(x, pad), batch)
  real = tuple(
    slice(first, first + size)
    for (first, _), size in zip(pad, batch.mask.shape, strict=True)
  )
  # What the models say about pads, and what was said there, may be anything.
  longer = longer.replace(labels=jnp.where(longer.mask, longer.labels, 7))
  junk = 50 * jax.nn.one_hot(longer.labels - 4, VOCAB)
  wide = [
    jnp.where(longer.mask[..., None], jnp.pad(x, (*pad, (0, 0))), sign * junk)
    for x, sign in ((student, 1), (base, -1))
  ]
  before, after = prepared(trial, student, base, batch), prepared(trial, *wide, longer)
  mask = np.asarray(batch.mask)
  for name in SIGNALS:
    signals = before.facts[name], after.facts[name][real]
    want, got = (np.asarray(x)[mask] for x in signals)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5, err_msg=name)
  for name in ("reward", "advantage"):
    np.testing.assert_array_equal(np.where(longer.mask, 0, after.facts[name]), 0)
  losses = (trial(student, base, base, batch), trial(*wide, wide[1], longer))
  np.testing.assert_allclose(losses[1][0], losses[0][0], rtol=1e-5)


@pytest.mark.parametrize("single_step", [True, False])
@variants
def test_logit_gradients_have_the_closed_form(variant, single_step):
  """The student enters by q_new alone; beyond the clip, the way A points, not at all.

  METHODS 4.4: max(-A rho, -A clip(rho)) + s KL(q || p), s = w ('paper') or 1 ('code').
  """
  (student, other, base), batch = make_logits(), weighted(make_batch())
  trial = LogitTrial(
    "minillm", variant=variant, single_step=single_step, teacher_mix=0.3
  )
  ready = prepared(trial, student, base, batch)
  moved = student + 0.2 * other  # after updates on the same text
  method, key = trial.method, jax.random.key(0)

  def loss(student):
    params, now = {"student": student}, knobs_at(method.knobs, 0.0)
    frozen = {"teacher": base}
    return method.loss(trial.models, params, frozen, ready, key, now)[0]

  q, labels = oracle.softmax(moved), np.asarray(batch.labels)
  facts = {name: np.asarray(values, float) for name, values in ready.facts.items()}
  weight, advantage = facts["weight"], facts["advantage"]
  ratio = weight * np.exp(picked(moved, labels) - picked(student, labels))
  held = np.where(advantage > 0, ratio > 1.2, ratio < 0.8)
  mask = np.asarray(batch.mask)
  assert held[mask].any() and not held[mask].all()
  by_policy = np.where(held, 0, -advantage * ratio)
  want = by_policy[..., None] * (np.eye(VOCAB)[labels] - q)
  if single_step:
    log_q, log_p = oracle.log_softmax(moved), oracle.log_softmax(base)
    gap = log_q - log_p - oracle.kl(log_q, log_p)[..., None]
    want += (weight if variant == "paper" else 1.0 + 0 * weight)[..., None] * q * gap
  want *= np.asarray(batch.weights)[..., None]
  got = np.asarray(jax.grad(loss)(moved))
  np.testing.assert_allclose(got, want, atol=2e-6)
  if not single_step:
    np.testing.assert_array_equal(got[held & mask], 0)


def test_prepared_signals_are_constants():
  """METHODS 4.4: A, w and r carry no gradient, even into whoever asks for one."""
  (student, _, base), batch = make_logits(), weighted(make_batch())
  trial = LogitTrial("minillm")
  prepare = trial.method.sequences.prepare

  def total(student, base):
    ready = prepare(trial.models, {"student": student}, {"teacher": base}, batch)
    return sum(ready.facts[name].sum() for name in SIGNALS)

  for grad in jax.grad(total, argnums=(0, 1))(student, base):
    np.testing.assert_array_equal(grad, 0)


@variants
def test_the_first_update_starts_at_the_weights(variant):
  """Before the student has moved rho = w, and the reward is the gap of both NLLs."""
  (student, _, base), batch = make_logits(), make_batch()
  trial = LogitTrial("minillm", variant=variant)
  ready = prepared(trial, student, base, batch)
  _, metrics = trial(student, base, base, batch)
  want = oracle.token_mean(np.asarray(ready.facts["weight"]), np.asarray(batch.mask))
  np.testing.assert_allclose(metrics["importance"], want, rtol=1e-5)
  gap = metrics["student_nll"] - metrics["teacher_nll"]
  np.testing.assert_allclose(metrics["reward"], gap, rtol=1e-4)


@pytest.mark.parametrize(
  "knobs, message",
  [
    ({"variant": "ppo"}, "method.variant='ppo' must be one of paper, code"),
    ({"teacher_mix": 1.0}, "method.teacher_mix=1.0 must be at least 0 and below 1"),
    ({"updates_per_sample": 0}, "method.updates_per_sample=0 must be 1 or more"),
    ({"ppo_clip": 1.5}, "method.ppo_clip=1.5 must lie between 0 and 1"),
  ],
)
def test_bad_knobs(knobs, message):
  with pytest.raises(UserError) as error:
    methods.build("minillm", KNOBS | knobs)
  assert message in str(error.value)
