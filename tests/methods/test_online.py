"""Any method with a teacher that learns: whose loss moves what, and on which text."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from trial import KNOBS, VOCAB, LogitTrial, make_batch, make_logits, only_read, weighted

from okd_jax import methods
from okd_jax.errors import UserError
from okd_jax.losses import Output
from okd_jax.methods.base.knobs import knobs_at
from okd_jax.methods.kd import NAMED
from okd_jax.methods.online_module import Knobs

FROZEN = [
  name
  for name in sorted({*methods.METHODS} - {*NAMED})
  if (method := methods.build(name, KNOBS)).taught
  and not (method.adapts or method.several)
]


def logit_gradients(trial, logits, batch, progress=0.0):
  def loss(logits):
    return trial(*logits, batch, progress=progress)[0]

  return jax.jit(jax.value_and_grad(loss))(logits)


@pytest.mark.parametrize(
  "knobs, kd, okd",
  [
    ({}, {}, {}),
    (
      {"divergence": "reverse_kl", "teacher_divergence": "reverse_kl"},
      {},
      {},
    ),
    (
      {
        "divergence": "skew_reverse_kl",
        "temperature": 2.0,
        "anchor_weight": 0.3,
        "teacher_kl_weight": 0.5,
        "gold_weight": 0.2,
      },
      {"kd_ratio": 0.7},
      {"student_kl_weight": 0.7},
    ),
  ],
  ids=["default", "reverse", "all"],
)
def test_kd_on_gold_with_a_module_is_okd(knobs, kd, okd):
  """METHODS 2.3: loss and both gradients, with the same divergences."""
  logits, batch = make_logits(), make_batch()
  wrapped = LogitTrial("kd", module="lora", **knobs, **kd)
  assert not wrapped.method.sequences.gold and not wrapped.method.sequences.sampled
  assert wrapped.method.updates == (("student", "adapter"),)
  loss, grads = logit_gradients(wrapped, logits, batch)
  want, others = logit_gradients(LogitTrial("okd", **knobs, **okd), logits, batch)
  np.testing.assert_allclose(loss, want, rtol=1e-5)
  for grad, other in zip(grads, others, strict=True):
    np.testing.assert_allclose(grad, other, atol=1e-7)
  assert jnp.abs(grads[1]).max() > 1e-4
  np.testing.assert_array_equal(grads[2], 0)


@pytest.mark.parametrize("name", FROZEN)
def test_each_loss_moves_its_own_side(name):
  """METHODS 2.3; guards F2: the method's loss for the student, L_t for the module."""
  (student, teacher, base), batch = make_logits(), make_batch()
  own = only_read(name, "lora", seqkd_ratio=0.5)
  wrapped = LogitTrial(name, module="lora", anchor_weight=0.3, **own)
  method = wrapped.method
  assert method.adapts and method.updates == (("student", "adapter"),)
  assert method.sequences.gold == (method.sequences.source != "gold")
  plain, okd = LogitTrial(name, **own), LogitTrial("okd", anchor_weight=0.3)
  okd.method = dataclasses.replace(okd.method, weights=method.weights)

  @jax.jit
  def gradients(logits):
    return [
      jax.grad(lambda x, t=trial, last=last: t(*x, last, batch)[0])(logits)
      for trial, last in ((wrapped, base), (plain, None), (okd, base))
    ]

  got, by_method, by_okd = gradients((student, teacher))
  np.testing.assert_allclose(got[0], by_method[0], atol=1e-7)
  np.testing.assert_allclose(got[1], by_okd[1], atol=1e-7)
  for grad in got:
    assert jnp.abs(grad).max() > 1e-5


class ByToken:
  """Models that look their logits up by the token before, on any rows."""

  def __init__(self, name, module="", **knobs):
    self.method = methods.build(name, KNOBS | knobs, module)

    def output(table, batch):
      return Output(table[batch.tokens], jnp.eye(VOCAB))

    teacher = methods.Teacher(
      lambda frozen, adapter, batch, mix=None: output(
        frozen if adapter is None else adapter, batch
      ),
      lambda frozen, adapter, batch: (output(adapter, batch), output(frozen, batch)),
    )
    self.models = methods.Models(
      lambda params, batch, key, mix=None: output(params, batch),
      {"teacher": teacher},
      5,
    )

    def loss(params, base, batch):
      key, now = jax.random.key(0), knobs_at(self.method.knobs, 0.0)
      return self.method.loss(self.models, params, base, batch, key, now)[0]

    self.gradient = jax.jit(jax.grad(loss))


def tables():
  """(params, base): logits by the token before."""
  keys = jax.random.split(jax.random.key(0), 3)
  shape = (VOCAB, VOCAB)
  student, adapter, base = (2 * jax.random.normal(key, shape) for key in keys)
  return {"student": student, "adapter": {"teacher": adapter}}, {"teacher": base}


@functools.cache
def rows(seed):
  return weighted(make_batch(seed))


@pytest.mark.parametrize("anchor_weight", [0.0, 0.4])
def test_gkds_module_learns_on_gold_alone(anchor_weight):
  """Only on gold is there gold to hold it: okd's L_t there, whatever is sampled."""
  params, base = tables()
  knobs = {"anchor_weight": anchor_weight, "teacher_kl_weight": 0.5}
  wrapped, okd = ByToken("gkd", "lora", **knobs), ByToken("okd", **knobs)
  one, other = (
    wrapped.gradient(params, base, rows(seed).replace(gold=rows(0))) for seed in (1, 2)
  )
  want = okd.gradient(params, base, rows(0))
  one_adapter = one["adapter"]["teacher"]
  np.testing.assert_allclose(one_adapter, want["adapter"]["teacher"], atol=1e-7)
  np.testing.assert_array_equal(one_adapter, other["adapter"]["teacher"])
  assert jnp.abs(one["student"] - other["student"]).max() > 1e-3
  # On gold steps the sampled rows are the gold ones.
  both = wrapped.gradient(params, base, rows(0).replace(gold=rows(0)))
  np.testing.assert_array_equal(both["adapter"]["teacher"], one_adapter)


@pytest.mark.parametrize("gold_weight", [0.0, 0.3])
def test_gkds_student_follows_the_adapted_teacher(gold_weight):
  """Its gradient is gkd's with the adapted teacher as the teacher, gold CE included."""
  params, base = tables()
  wrapped = ByToken("gkd", "lora", gold_weight=gold_weight)
  plain = ByToken("gkd", gold_weight=gold_weight)
  assert wrapped.method.sequences.gold
  assert plain.method.sequences.gold == bool(gold_weight)
  beside = rows(1).replace(gold=rows(0))
  got = wrapped.gradient(params, base, beside)["student"]
  teacher = params["adapter"]
  batch = beside if gold_weight else rows(1)
  want = plain.gradient({"student": params["student"]}, teacher, batch)["student"]
  np.testing.assert_allclose(got, want, atol=1e-7)
  batch = rows(1).replace(gold=rows(2))
  elsewhere = wrapped.gradient(params, base, batch)["student"]
  assert jnp.allclose(elsewhere, got, atol=1e-7) == (gold_weight == 0)


def test_minillm_is_prepared_with_the_adapted_teacher():
  """Its rewards and weights are those of the teacher that writes with the student."""
  (student, teacher, base), batch = make_logits(), make_batch()
  wrapped, plain = LogitTrial("minillm", module="lora"), LogitTrial("minillm")
  params = {"student": student, "adapter": {"teacher": teacher}}
  got = wrapped.beside(params, {"teacher": base}, batch).facts
  want = plain.beside({"student": student}, {"teacher": teacher}, batch).facts
  for name in ("old", "weight", "advantage", "reward"):
    np.testing.assert_array_equal(got[name], want[name])
  labels, mask = np.asarray(batch.labels), np.asarray(batch.mask)
  reward = oracle.cross_entropy(student, labels) - oracle.cross_entropy(teacher, labels)
  np.testing.assert_allclose(got["reward"], reward * mask, rtol=1e-4, atol=1e-5)


def test_the_modules_knobs_are_knobs():
  """METHODS 2.5: they move over the run, are checked, and count as the method's own."""
  logits, batch = make_logits(), make_batch()
  moving = LogitTrial("kd", module="lora", end={"anchor_weight": 1.0})
  got = moving(*logits, batch, progress=jnp.float32(0.5))[0]
  want = LogitTrial("kd", module="lora", anchor_weight=0.5)(*logits, batch)[0]
  np.testing.assert_allclose(got, want, rtol=1e-5)
  read = {field.name for field in dataclasses.fields(Knobs)} - {"shape"}
  assert read - {*moving.method.knobs} == {"teacher_divergence", "drift_target"}
  for knobs, message in (
    ({"teacher_kl_weight": 1.5}, "method.teacher_kl_weight=1.5 must lie between"),
    ({"anchor_weight": -1.0}, "method.anchor_weight=-1.0 must be at least 0"),
    ({"teacher_divergence": "kld"}, "method.teacher_divergence='kld' is no divergence"),
  ):
    with pytest.raises(UserError) as error:
      methods.build("gkd", KNOBS | knobs, "lora")
    assert message in str(error.value)
    # Without an adapter nobody reads them.
    with pytest.raises(UserError) as error:
      methods.build("gkd", KNOBS | knobs)
    assert f"{next(iter(knobs))}=" in str(error.value)
    assert "gkd here does not read it; it is read by clda, okd" in str(error.value)
    assert str(error.value).endswith("and by any method with adapter.kind")


@pytest.mark.parametrize("name", ["okd", "promptkd"])
def test_a_teacher_that_learns_anyway_is_left_alone(name):
  plain, named = (methods.build(name, KNOBS, module) for module in ("", "prefix"))
  assert (named.updates, named.knobs) == (plain.updates, plain.knobs)
  assert named.sequences.gold == plain.sequences.gold


def test_without_a_teacher_there_is_nothing_to_adapt():
  with pytest.raises(UserError, match="adapter.kind=lora: sft here has no teacher in"):
    methods.build("sft", KNOBS, "lora")
