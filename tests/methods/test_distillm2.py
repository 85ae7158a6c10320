"""DistiLLM-2: two texts, two terms, and sequences that weigh alike."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from trial import KNOBS, VOCAB, LogitTrial, make_batch, make_logits

from okd_jax import methods
from okd_jax.errors import UserError
from okd_jax.losses import Output
from okd_jax.methods.base.knobs import knobs_at
from okd_jax.methods.distillm2 import sequence_weights


def by_token(**knobs):
  """(method, models) of models that look their logits up by the token before."""

  def output(table, batch):
    return Output(table[batch.tokens], jnp.eye(VOCAB))

  def teacher(frozen, adapter, batch, mix=None):
    return output(frozen, batch)

  models = methods.Models(
    lambda params, batch, key, mix=None: output(params, batch),
    {"teacher": methods.Teacher(teacher)},
    5,
  )
  return methods.build("distillm2", KNOBS | knobs), models


def tables():
  keys = jax.random.split(jax.random.key(0))
  return tuple(2 * jax.random.normal(key, (VOCAB, VOCAB)) for key in keys)


def rows(seed):
  batch = make_batch(seed)
  return batch.replace(weights=sequence_weights(batch.mask))


def gradient_of(student, teacher, **knobs):
  """(y_t rows, y_s rows) -> (loss, the gradient in the student's table)."""
  method, models = by_token(**knobs)

  def loss(student, one, other):
    batch = rows(7).replace(answers={"teacher": one, "student": other})
    params, key = {"student": student}, jax.random.key(0)
    frozen, now = {"teacher": teacher}, knobs_at(method.knobs, 0.0)
    return method.loss(models, params, frozen, batch, key, now)[0]

  return functools.partial(jax.jit(jax.value_and_grad(loss)), student)


def row_means(values, batch):
  """The mean over sequences of the means over their tokens."""
  mask = np.asarray(batch.mask)
  return np.mean([v[m].mean() for v, m in zip(values, mask, strict=True) if m.any()])


def srkl(p_logits, q_logits, skew=0.1):
  """KL(q || (1 - a) p + a q)."""
  return oracle.skew_reverse_kl(p_logits, q_logits, alpha=skew)


@pytest.mark.parametrize("contrast", [0.0, 0.6, 1.0, 2.0])
def test_the_two_terms(contrast):
  """METHODS 4.6: (2 - b) SKL on y_t and b SRKL on y_s; b = 0 and 2 leave one term."""
  student, teacher = tables()
  plan = methods.build("distillm2", KNOBS).sequences
  assert plan.beforehand == ("teacher", "student")
  assert plan.source == "gold"  # nothing is sampled while training
  value = gradient_of(student, teacher, contrast=contrast)
  one, other = rows(0), rows(1)
  got, grad = value(one, other)
  q, p = np.asarray(student), np.asarray(teacher)
  pull, push = (
    row_means(f(p[r.tokens], q[r.tokens]), r)
    for f, r in ((oracle.skew_forward_kl, one), (srkl, other))
  )
  np.testing.assert_allclose(got, (2 - contrast) * pull + contrast * push, rtol=1e-5)
  moved = [value(*pair)[1] for pair in ((rows(2), other), (one, rows(2)))]
  assert jnp.array_equal(moved[0], grad) == (contrast == 2)
  assert jnp.array_equal(moved[1], grad) == (contrast == 0)


def test_rows_of_any_length_weigh_the_same():
  """METHODS 4.6: a mean per sequence, then over sequences; an empty one is none."""
  batch = make_batch()
  lengths = np.asarray(batch.mask).sum(1)
  assert len({*lengths}) > 2
  np.testing.assert_allclose(sequence_weights(batch.mask).sum(1), 1 / 8, rtol=1e-6)
  some = batch.mask & (jnp.arange(8) % 2 == 0)[:, None]
  weights = sequence_weights(some)
  want = np.where(np.arange(8) % 2 == 0, 1 / 4, 0)
  np.testing.assert_allclose(weights.sum(1), want, rtol=1e-6)
  np.testing.assert_array_equal(weights > 0, some)
  np.testing.assert_array_equal(sequence_weights(jnp.zeros((2, 3), bool)), 0)


def test_an_empty_row_changes_nothing():
  """METHODS 4.6: neither the loss nor any gradient sees an answer without tokens."""
  (student, _, base), batch = make_logits(), make_batch()
  trial = LogitTrial("distillm2")
  assert trial.method.weights is sequence_weights

  @jax.jit
  @jax.value_and_grad
  def value(student, batch):
    wide = jnp.pad(base, ((0, len(student) - len(base)), (0, 0), (0, 0)))
    return trial(student, wide, wide, batch)[0]

  want, grad = value(student, batch)
  longer = jax.tree.map(lambda x: jnp.pad(x, ((0, 3), (0, 0))), batch)
  got, wide = value(jnp.pad(student, ((0, 3), (0, 0), (0, 0))), longer)
  np.testing.assert_allclose(got, want, rtol=1e-6)
  np.testing.assert_allclose(wide[:8], grad, atol=1e-7)
  np.testing.assert_array_equal(wide[8:], 0)


@pytest.mark.parametrize("skew", [0.1, 0.6])
def test_logit_gradients_have_the_closed_form(skew):
  """METHODS 4.6, 1.2: q (log(q/m) - KL(q || m)), m a constant; SKL's q (g - <q, g>).

  Guards F2: DistiLLM's own SRKL goes through the q in m as well.
  """
  (student, _, base), batch = make_logits(), make_batch()
  log_q, log_p = oracle.log_softmax(student), oracle.log_softmax(base)
  q, p = np.exp(log_q), np.exp(log_p)
  own = oracle.mixture(skew, log_q, log_p)
  push = q * (log_q - own - oracle.kl(log_q, own)[..., None])
  g = -(1 - skew) * p / (skew * p + (1 - skew) * q)
  pull = q * (g - (q * g).sum(-1, keepdims=True))
  weights = np.asarray(sequence_weights(batch.mask), float)[..., None]
  for contrast in (0.0, 0.7, 2.0):
    trial = LogitTrial("distillm2", contrast=contrast, skew=skew)
    grads = jax.grad(lambda x, trial=trial: trial(*x, batch)[0])((student, base, base))
    want = weights * ((2 - contrast) * pull + contrast * push)
    np.testing.assert_allclose(grads[0], want, atol=1e-6)
    assert not any(grad.any() for grad in grads[1:])


@pytest.mark.parametrize(
  "knobs, message",
  [
    ({"skew": 0.0}, "method.skew=0.0 must lie between 0 and 1"),
    ({"contrast": 2.5}, "method.contrast=2.5 must lie between 0 and 2"),
    ({"end": {"contrast": 3.0}}, "must lie between 0 and 2"),
  ],
)
def test_bad_knobs(knobs, message):
  with pytest.raises(UserError) as error:
    methods.build("distillm2", KNOBS | knobs)
  assert message in str(error.value)
