"""Online Knowledge Distillation: who is pulled where, and the identities it obeys."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from trial import (
  KNOBS,
  TEACHER,
  VOCAB,
  LogitTrial,
  Setup,
  gradients,
  make_batch,
  make_logits,
  total,
  weighted,
)

from okd_jax import methods
from okd_jax.models.adapters import Lora, Prefix, Prompt


def test_okd_gradients_stay_on_their_side():
  """Guards F2; METHODS 2.5 (d): each loss moves its own parameters only."""
  setup, batch = Setup("okd"), make_batch()
  grads = gradients(setup, batch)
  assert total(grads["student"]) > 0
  assert total(grads["adapter"]) > 0
  # Student: as if the (adapted) teacher were a constant, whatever alpha.
  for alpha in (0.0, 0.75, 1.0):
    other = gradients(Setup("okd", teacher_kl_weight=alpha), batch)
    chex.assert_trees_all_close(other["student"], grads["student"], atol=1e-6)
  # Module: as if the student were a constant, whatever the student's own loss.
  for divergence in ("reverse_kl", "jensen_shannon"):
    other = gradients(Setup("okd", divergence=divergence), batch)
    chex.assert_trees_all_close(other["adapter"], grads["adapter"], atol=1e-6)


def test_okd_starts_as_forward_kd():
  """METHODS 2.5 (a): with up = 0 the first student gradient is forward KD's."""
  batch = make_batch()
  okd, kd = gradients(Setup("okd"), batch), gradients(Setup("kd"), batch)
  chex.assert_trees_all_close(okd["student"], kd["student"], atol=1e-6)


def test_okd_module_ignores_the_student_at_alpha_zero():
  """METHODS 2.5 (b): the module then trains as plain LoRA fine-tuning."""
  setup, batch = Setup("okd", teacher_kl_weight=0.0), make_batch()
  moved = setup.params | {
    "student": jax.tree.map(lambda x: 2 * x, setup.params["student"])
  }
  chex.assert_trees_all_equal(
    gradients(setup, batch)["adapter"], gradients(setup, batch, moved)["adapter"]
  )
  assert total(gradients(setup, batch)["adapter"]) > 0


@pytest.mark.parametrize(
  "update", ["simultaneous", pytest.param("sequential", marks=pytest.mark.slow)]
)
def test_okd_with_a_held_module_is_forward_kd(update):
  """METHODS 2.5 (c): module learning rate 0 makes the whole run forward KD's."""
  okd, _ = Setup("okd", lr_scale=0.0, update_order=update).train(5)
  kd, _ = Setup("kd").train(5)
  chex.assert_trees_all_equal(okd.params["student"], kd.params["student"])


def test_okd_logit_gradients_have_the_closed_form():
  """METHODS 2.5 (e): q - p_ta, and p_ta - (a q + (1 - a) e_y) + c (p_ta - p).

  Guards F2, F3: a stop_gradient on the wrong side.
  """
  logits, batch = make_logits(), make_batch()
  trial = LogitTrial("okd", teacher_kl_weight=0.4, anchor_weight=0.3)
  grads = jax.grad(lambda x: trial(*x, batch)[0])(logits)
  q, p_ta, p = map(jax.nn.softmax, logits)
  weights = weighted(batch).weights[..., None]
  gold = jax.nn.one_hot(batch.labels, VOCAB)
  by_module = p_ta - (0.4 * q + 0.6 * gold) + 0.3 * (p_ta - p)
  np.testing.assert_allclose(grads[0], weights * (q - p_ta), atol=1e-7)
  np.testing.assert_allclose(grads[1], weights * by_module, atol=1e-7)
  np.testing.assert_array_equal(grads[2], 0)


def test_okd_rests_where_student_and_teacher_agree():
  """METHODS 2.5 (g): alpha 1, student = teacher, up = 0, no decay: nothing moves."""
  setup = Setup("okd", teacher_kl_weight=1.0, student=TEACHER, weight_decay=0.0)
  setup.params["student"] = jax.tree.map(jnp.copy, setup.frozen["teacher"])
  loss, _ = setup.loss(setup.params, weighted(make_batch()))
  assert abs(loss) < 1e-6
  assert (
    max(
      jax.tree.leaves(jax.tree.map(lambda g: float(jnp.abs(g).max()), gradients(setup)))
    )
    < 1e-6
  )


@pytest.mark.slow
def test_sequential_update_shows_the_student_the_moved_module():
  """The module's step comes first; the student's target is the updated teacher."""
  setup = Setup("okd", update_order="sequential")
  together = Setup("okd")
  batch = make_batch()
  moved, _ = setup.step(setup.state, setup.frozen, batch)
  simultaneous, _ = together.step(together.state, together.frozen, batch)
  chex.assert_trees_all_close(
    moved.params["adapter"], simultaneous.params["adapter"], atol=1e-6
  )
  again = gradients(setup, batch, setup.params | {"adapter": moved.params["adapter"]})
  want, _ = setup.optimizers["student"].update(
    again["student"], setup.state.opt_state["student"], setup.params["student"]
  )
  got = jax.tree.map(jnp.subtract, moved.params["student"], setup.params["student"])
  chex.assert_trees_all_close(got, want, atol=1e-5)
  assert (
    total(
      jax.tree.map(
        jnp.subtract, moved.params["student"], simultaneous.params["student"]
      )
    )
    > 1e-3
  )


@pytest.mark.parametrize(
  "adapter",
  [
    pytest.param(Lora(rank=4), marks=pytest.mark.slow),
    pytest.param(Lora(rank=4, layers=1), marks=pytest.mark.slow),
    pytest.param(Prefix(length=3, layers=2), marks=pytest.mark.slow),
    pytest.param(Prompt(length=3), marks=pytest.mark.slow),
  ],
  ids=["lora", "lora-top", "prefix-top", "prompt"],
)
def test_every_module_is_anchored_to_the_plain_teacher(adapter):
  """The plain teacher's logits, shared trunk or not, are those of a pass of its own."""
  setup = Setup("okd", adapter=adapter, anchor_weight=0.3)
  batch = weighted(make_batch())
  if isinstance(adapter, Lora):  # away from the start, where both teachers are one
    setup.params["adapter"] = jax.tree.map(lambda x: x + 0.3, setup.params["adapter"])
  adapted, plain = setup.models.both(setup.frozen, setup.params["adapter"], batch)
  for got, modules in ((adapted, setup.params["adapter"]), (plain, None)):
    want = setup.models.teacher(setup.frozen, modules, batch)
    chex.assert_trees_all_close(got, want, atol=1e-5)
  logits = [np.asarray(o.hidden @ o.head.T) for o in (plain, adapted)]
  drift = oracle.token_mean(oracle.forward_kl(*logits), np.asarray(batch.mask))
  assert drift > 1e-4
  _, metrics = setup.loss(setup.params, batch)
  np.testing.assert_allclose(metrics["drift"], drift, rtol=1e-3)
  state, losses = setup.train(3)
  for before, after in zip(
    jax.tree.leaves(setup.params), jax.tree.leaves(state.params), strict=True
  ):
    assert jnp.any(before != after)
  assert np.isfinite(losses).all()


def test_the_anchor_holds_the_module():
  """METHODS 2.10: with alpha 1 nothing but the anchor remembers the teacher."""
  drift = {}
  for weight in (0.0, 2.0):
    setup = Setup("okd", teacher_kl_weight=1.0, anchor_weight=weight, lr=3e-2)
    state, _ = setup.train(40)
    batch = weighted(make_batch(99))
    outputs = setup.models.both(setup.frozen, state.params["adapter"], batch)
    adapted, plain = (np.asarray(o.hidden @ o.head.T) for o in outputs)
    values = oracle.forward_kl(plain, adapted)
    drift[weight] = oracle.token_mean(values, np.asarray(batch.mask))
  assert drift[2.0] < 0.5 * drift[0.0]


@pytest.mark.parametrize(
  "knobs, warns",
  [
    ({"teacher_kl_weight": 0.75}, False),
    ({"teacher_kl_weight": 0.8}, True),
    ({"teacher_kl_weight": 0.8, "anchor_weight": 0.3}, False),
    ({"end": {"teacher_kl_weight": 1.0}}, True),
    ({"end": {"teacher_kl_weight": 1.0, "anchor_weight": 0.5}}, False),
  ],
)
def test_a_large_alpha_without_an_anchor_warns(knobs, warns, caplog):
  methods.build("okd", KNOBS | knobs)
  assert ("set method.anchor_weight" in caplog.text) == warns


def test_module_norm():
  """It starts at 0, is that of down @ up, and is logged by the step."""
  setup = Setup("okd")
  only = setup.params["adapter"]["teacher"], setup.frozen["teacher"]
  assert Lora().norm(*only) == 0
  state, metrics = setup.step(setup.state, setup.frozen, make_batch())
  attention = state.params["adapter"]["teacher"]["layers"]["attention"]
  products = [attention[n]["down"] @ attention[n]["up"] for n in ("query", "value")]
  want = np.sqrt(sum((np.asarray(x, np.float64) ** 2).sum() for x in products))
  np.testing.assert_allclose(metrics["adapter_norm"], want, rtol=1e-5)
  prefix = {"layers": {"prefix_key": jnp.full((2, 2), 3.0)}}
  assert Prefix().norm(prefix, None) == 6
