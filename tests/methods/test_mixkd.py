"""MixKD's language model form: what mixing must and must not change."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from trial import LogitTrial, Setup, gradients, make_batch, make_logits, total, weighted

from okd_jax.methods import mixkd

PAIRS = [1, 0, 3, 2, 5, 4, 7, 6]


def mixed(batch, share, order=PAIRS):
  """The weighted batch with this lambda and this pairing of its rows."""
  return weighted(mixkd.paired(batch, jnp.asarray(order), share))


def test_lambda_one_is_kd_on_the_first_rows():
  """METHODS 5.3: CE twice and the divergence once, as if nothing had been mixed."""
  setup, batch = Setup("mixkd"), mixed(make_batch(), 1.0)
  loss, metrics = setup.loss(setup.params, batch)
  _, kd = Setup("kd").loss(setup.params, batch)
  np.testing.assert_allclose(metrics["divergence"], kd["divergence"], rtol=1e-5)
  np.testing.assert_allclose(loss, kd["divergence"] + 2 * kd["student_nll"], rtol=1e-5)


def test_swapping_the_rows_and_lambda_changes_nothing():
  """METHODS 5.3, for the mixed part: pairs are taken both ways round."""
  setup, batch = Setup("mixkd"), make_batch()
  there, back = [3, 0, 1, 2, 7, 4, 5, 6], [1, 2, 3, 0, 5, 6, 7, 4]
  _, first = setup.loss(setup.params, mixed(batch, 0.3, there))
  _, second = setup.loss(setup.params, mixed(batch, 0.7, back))
  for name in ("divergence", "mixed_student_nll", "mixed_teacher_nll"):
    np.testing.assert_allclose(first[name], second[name], rtol=1e-5)


def test_equal_rows_give_the_unmixed_loss():
  batch = make_batch()
  batch = mixed(jax.tree.map(lambda x: jnp.repeat(x[:1], 8, axis=0), batch), 0.3)
  setup = Setup("mixkd")
  loss, metrics = setup.loss(setup.params, batch)
  _, kd = Setup("kd").loss(setup.params, batch)
  np.testing.assert_allclose(metrics["divergence"], kd["divergence"], rtol=1e-5)
  np.testing.assert_allclose(loss, kd["divergence"] + 2 * kd["student_nll"], rtol=1e-5)


def test_loss_equals_the_formula():
  """Both rows' gold tokens by their shares, the divergence by the position's weight."""
  share, order = 0.3, np.array(PAIRS)
  (student, teacher, base), batch = make_logits(), mixed(make_batch(), share)
  loss, metrics = LogitTrial(
    "mixkd", mix_gold_weight=0.5, mix_kd_weight=2.0, gold_weight=0.1
  )(student, teacher, base, batch)
  labels, mask = np.asarray(batch.labels), np.asarray(batch.mask)
  weights = mask / mask.sum()
  both = share * weights + (1 - share) * weights[order]
  # Here the models ignore the mix, so their logits are those of row i throughout.
  own = oracle.cross_entropy(student, labels)
  other = oracle.cross_entropy(student, labels[order])
  nll = (share * weights * own + (1 - share) * weights[order] * other).sum()
  d = (both * oracle.forward_kl(base, student)).sum()
  np.testing.assert_allclose(metrics["mixed_student_nll"], nll, rtol=1e-5)
  np.testing.assert_allclose(metrics["divergence"], d, rtol=1e-5)
  want = 1.1 * (weights * own).sum() + 0.5 * nll + 2 * d
  np.testing.assert_allclose(loss, want, rtol=1e-5)
  np.testing.assert_allclose(both.sum(), 1)


@pytest.mark.slow
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_makes_no_difference(side):
  """Guards B2: of a pair of unequal rows the longer one's rest stays unmixed."""
  setup, batch = Setup("mixkd"), make_batch()
  want = setup.loss(setup.params, mixed(batch, 0.3))[0]
  real = batch.segment_ids == 1
  tokens, labels = (jnp.where(real, x, 7) for x in (batch.tokens, batch.labels))
  junk = batch.replace(tokens=tokens, labels=labels)
  assert setup.loss(setup.params, mixed(junk, 0.3))[0] == want
  pad = ((0, 0), (0, 4) if side == "right" else (4, 0))
  longer = jax.tree.map(lambda x: jnp.pad(x, pad), batch)
  np.testing.assert_allclose(
    setup.loss(setup.params, mixed(longer, 0.3))[0], want, rtol=1e-5
  )


def test_only_the_union_of_both_responses_is_trained():
  """Guards B1, B5: nothing elsewhere, and an all-masked batch adds nothing."""
  trial, batch = LogitTrial("mixkd"), mixed(make_batch(), 0.3)
  grad = jax.grad(lambda x: trial(x, *make_logits()[1:], batch)[0])(make_logits()[0])
  mask = np.asarray(batch.mask)
  union = mask | mask[PAIRS]
  np.testing.assert_array_equal(np.abs(grad).sum(-1) > 0, union)
  empty = make_batch()
  nothing = mixed(empty.replace(mask=jnp.zeros_like(empty.mask)), 0.3)
  assert trial(*make_logits(), nothing)[0] == 0


def test_one_lambda_mixes_both_models_embeddings():
  """Each model its own embeddings, with the same share, at every position."""
  setup, batch = Setup("mixkd"), mixed(make_batch(), 0.3)
  mix, rows, _ = mixkd.mix_rows(batch)
  real = np.asarray(batch.segment_ids) == 1
  other = real[PAIRS]
  want = np.where(real & other, np.float32(0.3), np.where(real, 1.0, 0.0))
  np.testing.assert_array_equal(mix.share, want)
  np.testing.assert_array_equal(rows.segment_ids, real | other)
  for output in (
    setup.models.student(setup.params["student"], rows, jax.random.key(0), mix),
    setup.models.teacher(setup.frozen, None, rows, mix),
  ):
    # Swapping rows and shares mixes the same text.
    swapped = jax.tree.map(lambda x: x[jnp.array(PAIRS)], rows)
    assert output.hidden.shape == (*real.shape, output.head.shape[1])
    np.testing.assert_array_equal(swapped.segment_ids, rows.segment_ids)
  logits = [
    setup.models.teacher(setup.frozen, None, rows, m).logits() for m in (mix, None)
  ]
  assert float(jnp.abs(logits[0] - logits[1]).max()) > 1e-2


def drawn(key, alpha):
  """The lambda and the pairing that a key gives."""
  batch = make_batch()
  models, now = LogitTrial("mixkd").models, {"mix_alpha": alpha}
  new = mixkd.prepare(models, {}, {}, batch, jax.random.key(key), now)
  shares = np.asarray(new.facts["share"])
  assert (shares == shares[0]).all() and new.partner.weights is None
  return float(shares[0]), np.asarray(new.partner.tokens)


def test_lambda_follows_the_key_and_its_distribution():
  """Beta(a, a): at a = 50 near one half; another key, another lambda."""
  shares, partners = zip(*(drawn(key, 50.0) for key in range(8)), strict=True)
  assert len(set(shares)) == 8 and max(abs(share - 0.5) for share in shares) < 0.25
  wide = [drawn(key, 0.4)[0] for key in range(8)]
  assert max(abs(share - 0.5) for share in wide) > 0.25
  assert (partners[0] != partners[1]).any()
  rows = {tuple(row) for row in np.asarray(make_batch().tokens)}
  assert {tuple(row) for row in partners[0]} == rows
  setup = Setup("mixkd")
  assert total(gradients(setup, mixed(make_batch(), 0.3))["student"]) > 0


@pytest.mark.slow
def test_micro_batches_share_lambda_and_partners():
  """Guards B4: however a batch is cut, the step is the same."""
  batch = mixkd.paired(make_batch(), jnp.array([3, 0, 1, 2, 7, 4, 5, 6]), 0.3)
  states = []
  for microbatches in (1, 4):
    setup = Setup("mixkd", microbatches=microbatches)
    states.append(setup.step(setup.state, setup.frozen, batch))
  (_, first), (_, second) = states
  np.testing.assert_allclose(first["loss"], second["loss"], rtol=1e-5)
  np.testing.assert_allclose(
    first["student_grad_norm"], second["student_grad_norm"], rtol=1e-4
  )
