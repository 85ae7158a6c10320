"""MixKD's language model form: what mixing must and must not change."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from trial import LogitTrial, Setup, gradients, make_batch, make_logits, total, weighted

from okd_jax.losses import unembed
from okd_jax.methods import mixkd


def fixed(monkeypatch, share, order=None):
  """Draws this lambda, and this pairing of the rows if one is given."""
  monkeypatch.setattr(jax.random, "beta", lambda key, a, b: jnp.float32(share))
  if order is not None:
    monkeypatch.setattr(jax.random, "permutation", lambda key, n: jnp.asarray(order))


def test_lambda_one_is_kd_on_the_first_rows(monkeypatch):
  """METHODS 5.3: CE twice and the divergence once, as if nothing had been mixed."""
  fixed(monkeypatch, 1.0)
  setup, batch = Setup("mixkd"), weighted(make_batch())
  loss, metrics = setup.loss(setup.params, batch)
  _, kd = Setup("kd").loss(setup.params, batch)
  np.testing.assert_allclose(metrics["divergence"], kd["divergence"], rtol=1e-5)
  np.testing.assert_allclose(loss, kd["divergence"] + 2 * kd["student_nll"], rtol=1e-5)


def test_swapping_the_rows_and_lambda_changes_nothing(monkeypatch):
  """METHODS 5.3, for the mixed part: pairs are taken both ways round."""
  setup, batch = Setup("mixkd"), weighted(make_batch())
  there, back = [3, 0, 1, 2, 7, 4, 5, 6], [1, 2, 3, 0, 5, 6, 7, 4]
  fixed(monkeypatch, 0.3, there)
  _, first = setup.loss(setup.params, batch)
  fixed(monkeypatch, 0.7, back)
  _, second = setup.loss(setup.params, batch)
  for name in ("divergence", "mixed_student_nll", "mixed_teacher_nll"):
    np.testing.assert_allclose(first[name], second[name], rtol=1e-5)


def test_equal_rows_give_the_unmixed_loss(monkeypatch):
  fixed(monkeypatch, 0.3)
  batch = make_batch()
  batch = weighted({k: jnp.repeat(v[:1], 8, axis=0) for k, v in batch.items()})
  setup = Setup("mixkd")
  loss, metrics = setup.loss(setup.params, batch)
  _, kd = Setup("kd").loss(setup.params, batch)
  np.testing.assert_allclose(metrics["divergence"], kd["divergence"], rtol=1e-5)
  np.testing.assert_allclose(loss, kd["divergence"] + 2 * kd["student_nll"], rtol=1e-5)


def test_loss_equals_the_formula(monkeypatch):
  """Both rows' gold tokens by their shares, the divergence by the position's weight."""
  share, order = 0.3, np.array([1, 0, 3, 2, 5, 4, 7, 6])
  fixed(monkeypatch, share, order)
  (student, teacher, base), batch = make_logits(), make_batch()
  loss, metrics = LogitTrial(
    "mixkd", mix_gold_weight=0.5, mix_kd_weight=2.0, gold_weight=0.1
  )(student, teacher, base, batch)
  labels, mask = np.asarray(batch["labels"]), np.asarray(batch["mask"])
  weights = mask / mask.sum()
  mixed = share * weights + (1 - share) * weights[order]
  # Here the models ignore the mix, so their logits are those of row i throughout.
  own = oracle.cross_entropy(student, labels)
  other = oracle.cross_entropy(student, labels[order])
  nll = (share * weights * own + (1 - share) * weights[order] * other).sum()
  d = (mixed * oracle.forward_kl(base, student)).sum()
  np.testing.assert_allclose(metrics["mixed_student_nll"], nll, rtol=1e-5)
  np.testing.assert_allclose(metrics["divergence"], d, rtol=1e-5)
  want = 1.1 * (weights * own).sum() + 0.5 * nll + 2 * d
  np.testing.assert_allclose(loss, want, rtol=1e-5)
  np.testing.assert_allclose(mixed.sum(), 1)


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_makes_no_difference(side, monkeypatch):
  """Guards B2: of a pair of unequal rows the longer one's rest stays unmixed."""
  fixed(monkeypatch, 0.3, [1, 0, 3, 2, 5, 4, 7, 6])
  setup, batch = Setup("mixkd"), make_batch()
  want = setup.loss(setup.params, weighted(batch))[0]
  real = batch["segment_ids"] == 1
  junk = batch | {k: jnp.where(real, batch[k], 7) for k in ("tokens", "labels")}
  assert setup.loss(setup.params, weighted(junk))[0] == want
  pad = ((0, 0), (0, 4) if side == "right" else (4, 0))
  longer = {k: jnp.pad(v, pad) for k, v in batch.items()}
  np.testing.assert_allclose(
    setup.loss(setup.params, weighted(longer))[0], want, rtol=1e-5
  )


def test_only_the_union_of_both_responses_is_trained(monkeypatch):
  """Guards B1, B5: nothing elsewhere, and an all-masked batch adds nothing."""
  fixed(monkeypatch, 0.3, [1, 0, 3, 2, 5, 4, 7, 6])
  trial, batch = LogitTrial("mixkd"), make_batch()
  grad = jax.grad(lambda x: trial(x, *make_logits()[1:], batch)[0])(make_logits()[0])
  mask = np.asarray(batch["mask"])
  union = mask | mask[[1, 0, 3, 2, 5, 4, 7, 6]]
  np.testing.assert_array_equal(np.abs(grad).sum(-1) > 0, union)
  nothing = batch | {"mask": jnp.zeros_like(batch["mask"])}
  assert trial(*make_logits(), nothing)[0] == 0


def test_one_lambda_mixes_both_models_embeddings(monkeypatch):
  """Each model its own embeddings, with the same share, at every position."""
  fixed(monkeypatch, 0.3, [1, 0, 3, 2, 5, 4, 7, 6])
  setup, batch = Setup("mixkd"), weighted(make_batch())
  mix, mixed, _ = mixkd.mix_rows(batch, jnp.array([1, 0, 3, 2, 5, 4, 7, 6]), 0.3)
  real = np.asarray(batch["segment_ids"]) == 1
  other = real[[1, 0, 3, 2, 5, 4, 7, 6]]
  want = np.where(real & other, np.float32(0.3), np.where(real, 1.0, 0.0))
  np.testing.assert_array_equal(mix.share, want)
  np.testing.assert_array_equal(mixed["segment_ids"], real | other)
  for output in (
    setup.models.student(setup.params["student"], mixed, jax.random.key(0), mix),
    setup.models.teacher(setup.frozen, None, mixed, mix),
  ):
    # Swapping rows and shares mixes the same text.
    swapped = {k: v[jnp.array([1, 0, 3, 2, 5, 4, 7, 6])] for k, v in mixed.items()}
    assert output.hidden.shape == (*real.shape, output.head.shape[1])
    np.testing.assert_array_equal(swapped["segment_ids"], mixed["segment_ids"])
  logits = [
    unembed(*setup.models.teacher(setup.frozen, None, mixed, m)) for m in (mix, None)
  ]
  assert float(jnp.abs(logits[0] - logits[1]).max()) > 1e-2


def test_lambda_follows_the_key_and_its_distribution():
  """Beta(a, a): at a = 50 near one half; another step, another lambda."""
  setup, batch = Setup("mixkd"), weighted(make_batch())
  losses = {
    float(setup.loss(setup.params, batch, jax.random.key(seed))[0]) for seed in range(3)
  }
  assert len(losses) == 3
  assert total(gradients(setup)["student"]) > 0
