"""What each method trains, what it must not touch, and the identities it obeys."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from trial import KNOBS, STUDENT, TEACHER, Setup, make_batch

from okd_jax import methods
from okd_jax.errors import UserError
from okd_jax.losses import token_weights, unembed


def weighted(batch):
  return batch | {"weights": token_weights(batch["mask"])}


def gradients(setup, batch=None, params=None):
  batch = weighted(make_batch() if batch is None else batch)
  params = setup.params if params is None else params
  return jax.jit(jax.grad(lambda p: setup.loss(p, batch)[0]))(params)


def total(tree):
  return sum(float(jnp.abs(leaf).sum()) for leaf in jax.tree.leaves(tree))


def logits_of(setup, batch):
  outputs = {
    "student": setup.models.student(setup.params["student"], batch, jax.random.key(0)),
    "teacher": setup.models.teacher(setup.frozen, None, batch),
  }
  return {name: np.asarray(unembed(*out)) for name, out in outputs.items()}


@pytest.mark.parametrize("name", methods.METHODS)
def test_loss_falls(name):
  setup = Setup(name)
  batch = make_batch()
  state, losses = setup.state, []
  for _ in range(20):
    state, metrics = setup.step(state, setup.frozen, batch)
    losses.append(float(metrics["loss"]))
  assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(
  "name, knobs, truth",
  [
    ("sft", {}, lambda t, s, y: oracle.cross_entropy(s, y)),
    ("kd", {}, lambda t, s, y: oracle.forward_kl(t, s)),
    ("kd", {"temperature": 2.0}, lambda t, s, y: oracle.forward_kl(t, s, 2.0)),
    ("rkd", {}, lambda t, s, y: oracle.reverse_kl(t, s)),
    (
      "rkd",
      {"kd_ratio": 0.3},
      lambda t, s, y: 0.3 * oracle.reverse_kl(t, s) + 0.7 * oracle.cross_entropy(s, y),
    ),
    (  # the module's up matrix is 0 at the start: the adapted teacher is the plain one
      "okd",
      {"teacher_kl_weight": 0.5},
      lambda t, s, y: (
        oracle.forward_kl(t, s)
        + 0.5 * oracle.forward_kl(s, t)
        + 0.5 * oracle.cross_entropy(t, y)
      ),
    ),
    (
      "okd",
      {
        "divergence": "jensen_shannon",
        "beta": 0.2,
        "teacher_divergence": "reverse_kl",
        "student_kl_weight": 0.6,
      },
      lambda t, s, y: (
        0.6 * oracle.jensen_shannon(t, s, beta=0.2)
        + 0.4 * oracle.cross_entropy(s, y)
        + 0.25 * oracle.reverse_kl(s, t)
        + 0.75 * oracle.cross_entropy(t, y)
      ),
    ),
  ],
)
def test_loss_equals_the_formula(name, knobs, truth):
  """Guards C3, C4: the value is the token mean of the formula, and nothing else."""
  setup, batch = Setup(name, **knobs), make_batch()
  logits, labels = logits_of(setup, batch), np.asarray(batch["labels"])
  per_token = truth(logits["teacher"], logits["student"], labels)
  want = oracle.token_mean(per_token, np.asarray(batch["mask"]))
  np.testing.assert_allclose(
    setup.loss(setup.params, weighted(batch))[0], want, rtol=1e-4
  )


@pytest.mark.parametrize("name", methods.METHODS)
def test_logged_parts_make_the_loss(name):
  """Guards C4: what is logged is what is optimised (TRL#5731)."""
  setup = Setup(name)
  loss, metrics = setup.loss(setup.params, weighted(make_batch()))
  parts = {
    "sft": lambda m: m["student_nll"],
    "kd": lambda m: m["divergence"],
    "rkd": lambda m: m["divergence"],
    "okd": lambda m: (
      m["divergence"] + 0.25 * m["module_divergence"] + 0.75 * m["teacher_nll"]
    ),
  }
  np.testing.assert_allclose(loss, parts[name](metrics), rtol=1e-5)


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


@pytest.mark.parametrize("update", ["simultaneous", "sequential"])
def test_okd_with_a_held_module_is_forward_kd(update):
  """METHODS 2.5 (c): module learning rate 0 makes the whole run forward KD's."""
  okd, _ = Setup("okd", lr_scale=0.0, update=update).train(5)
  kd, _ = Setup("kd").train(5)
  chex.assert_trees_all_equal(okd.params["student"], kd.params["student"])


def test_okd_logit_gradients_have_the_closed_form():
  """METHODS 2.5 (e): q - p_ta, and p_ta - (alpha q + (1 - alpha) e_y)."""
  teacher = jax.random.normal(jax.random.key(0), (1, 4, 9))
  student = jax.random.normal(jax.random.key(1), (1, 4, 9))
  labels = jnp.array([[0, 3, 8, 2]])
  seen = {}

  def record(models, token_loss, outputs, batch):
    seen["loss"] = token_loss
    return jnp.zeros(()), {}

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr("okd_jax.methods.okd.token_sums", record)
    Setup("okd", teacher_kl_weight=0.4).loss(Setup("okd").params, make_batch())

  def loss(t, s):
    return seen["loss"]({"teacher": t, "student": s}, labels)[0].sum()

  by_teacher, by_student = jax.grad(loss, argnums=(0, 1))(teacher, student)
  p, q = jax.nn.softmax(teacher), jax.nn.softmax(student)
  gold = jax.nn.one_hot(labels, 9)
  np.testing.assert_allclose(by_student, q - p, atol=1e-6)
  np.testing.assert_allclose(by_teacher, p - (0.4 * q + 0.6 * gold), atol=1e-6)


def test_okd_rests_where_student_and_teacher_agree():
  """METHODS 2.5 (g): alpha 1, student = teacher, up = 0, no decay: nothing moves."""
  setup = Setup("okd", teacher_kl_weight=1.0, student=TEACHER, weight_decay=0.0)
  setup.params["student"] = jax.tree.map(jnp.copy, setup.frozen)
  loss, _ = setup.loss(setup.params, weighted(make_batch()))
  assert abs(loss) < 1e-6
  assert (
    max(
      jax.tree.leaves(jax.tree.map(lambda g: float(jnp.abs(g).max()), gradients(setup)))
    )
    < 1e-6
  )


def test_sequential_update_shows_the_student_the_moved_module():
  """The module's step comes first; the student's target is the updated teacher."""
  setup = Setup("okd", update="sequential")
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


def test_sft_never_looks_at_the_teacher():
  """Without any teacher at all, its gradient is what it was beside one."""
  with_teacher, without = Setup("sft"), Setup("sft")
  without.frozen = None
  chex.assert_trees_all_equal(gradients(without), gradients(with_teacher))
  assert total(gradients(without)["student"]) > 0


def test_first_response_token_and_eos_get_gradient():
  """Guards B1, B3: exactly the masked positions' logits are trained."""
  for name in methods.METHODS:
    setup, batch = Setup(name), make_batch()
    batch["mask"] = jnp.zeros_like(batch["mask"]).at[0, 3].set(True)
    weights = token_weights(batch["mask"])
    output = setup.models.student(setup.params["student"], batch, jax.random.key(0))

    def loss(hidden, setup=setup, batch=batch, weights=weights, output=output):
      models = methods.Models(
        lambda *_: output._replace(hidden=hidden), setup.models.teacher, 5
      )
      return setup.method.loss(
        models,
        setup.params,
        setup.frozen,
        batch | {"weights": weights},
        jax.random.key(0),
      )[0]

    grad = jax.grad(loss)(output.hidden)
    assert float(jnp.abs(grad[0, 3]).sum()) > 0
    np.testing.assert_array_equal(grad.at[0, 3].set(0), 0)


def test_padded_vocabulary_equals_the_cut_one():
  """Guards E1: Liger pads logits with 0, which at a mean of -35 takes all the mass."""
  setup, batch = Setup("kd"), weighted(make_batch())
  want = setup.loss(setup.params, batch)[0]

  def padded(frozen, modules, batch):
    output = setup.models.teacher(frozen, modules, batch)
    rows = jnp.full((16, output.head.shape[1]), 100.0)
    return output._replace(head=jnp.concatenate([output.head, rows]))

  models = methods.Models(setup.models.student, padded, setup.models.chunk)
  got = setup.method.loss(models, setup.params, setup.frozen, batch, jax.random.key(0))
  np.testing.assert_allclose(got[0], want, rtol=1e-6)


@pytest.mark.parametrize(
  "name, knob, value",
  [
    ("kd", "kd_ratio", 0.5),
    ("kd", "temperature", 2.0),
    ("rkd", "kd_ratio", 0.5),
    ("rkd", "temperature", 2.0),
    ("okd", "temperature", 2.0),
    ("okd", "divergence", "reverse_kl"),
    ("okd", "teacher_divergence", "reverse_kl"),
    ("okd", "teacher_kl_weight", 0.7),
    ("okd", "student_kl_weight", 0.7),
    ("okd", "update", "sequential"),
    ("okd", "beta", 0.2),
  ],
)
def test_every_knob_changes_something(name, knob, value):
  """Guards H1: KDFlow's temperature and --hrl_topk are swallowed."""
  base = {"divergence": "jensen_shannon"} if knob == "beta" else {}
  before, after = Setup(name, **base), Setup(name, **(base | {knob: value}))
  batch = weighted(make_batch())
  # Away from the start, where up = 0 and both directions of a KL nearly agree.
  before.params["student"] = jax.tree.map(lambda x: 3 * x, before.params["student"])
  losses = [float(s.loss(before.params, batch)[0]) for s in (before, after)]
  changed = abs(losses[0] - losses[1]) > 1e-4 * abs(losses[0])
  assert changed or before.method.updates != after.method.updates


def test_every_knob_is_tested():
  tested = {
    (name, knob)
    for mark in test_every_knob_changes_something.pytestmark
    for name, knob, _ in mark.args[1]
  }
  assert tested == {(n, k) for n in methods.METHODS for k in methods.used_knobs(n)}


@pytest.mark.parametrize(
  "name, knobs, message",
  [
    ("okdd", {}, "method.name='okdd' is unknown; use one of kd, okd, rkd, sft"),
    ("kd", {"kd_ratio": 1.5}, "method.kd_ratio=1.5 must lie between 0 and 1"),
    ("okd", {"temperature": 0.0}, "method.temperature=0.0 must be above 0"),
    ("okd", {"teacher_kl_weight": -1.0}, "method.teacher_kl_weight=-1.0"),
    ("okd", {"divergence": "kld"}, "method.divergence='kld' is no divergence"),
    ("okd", {"update": "both"}, "method.update='both' must be one of"),
    ("okd", {"divergence": "jensen_shannon", "beta": 2.0}, "method.beta=2.0"),
  ],
)
def test_bad_knobs(name, knobs, message):
  with pytest.raises(UserError, match=message.replace("'", ".")):
    methods.build(name, KNOBS | knobs)


def test_student_and_teacher_of_the_tests_differ():
  assert STUDENT.hidden_size != TEACHER.hidden_size
