"""What holds for every method: its formula, what it trains, its knobs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trial import (
  KNOBS,
  SAMPLED,
  STUDENT,
  TEACHER,
  VOCAB,
  LogitTrial,
  Setup,
  gradients,
  make_batch,
  make_logits,
  only_read,
  total,
)

from configs import default
from okd_jax import methods
from okd_jax.errors import UserError
from okd_jax.losses import Output
from okd_jax.methods.base.divergences import DIVERGENCES, shape_knobs
from okd_jax.methods.kd import NAMED

# The named ones are kd with its divergence bound (test_named_methods_are_kd); what
# several teachers do is in test_ensemble.
CORE = sorted({*methods.METHODS} - {*NAMED, "ensemble"} - SAMPLED)
every = pytest.mark.parametrize("name", CORE)
# mixkd looks at other rows' positions, minillm at later ones: files of their own.
every_rowwise = pytest.mark.parametrize("name", sorted({*CORE} - {"mixkd", "minillm"}))
ADAPTED = {"clda", "okd", "promptkd"}


def ce(t, s, y, b):
  return oracle.cross_entropy(s, y)


def mean(values, batch):
  return oracle.token_mean(values, np.asarray(batch.mask))


@pytest.mark.parametrize("name", sorted(methods.METHODS))
def test_loss_falls(name):
  """Every objective, by plain gradient descent on the logits themselves."""
  trial, batch = LogitTrial(name), make_batch()
  step = jax.jit(jax.value_and_grad(lambda logits: trial(*logits, batch)[0]))
  logits, losses = make_logits(), []
  for _ in range(30):
    loss, grads = step(logits)
    logits = jax.tree.map(lambda x, g: x - 60 * g, logits, grads)
    losses.append(float(loss))
  assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("name", sorted(NAMED))
def test_named_methods_are_kd(name):
  shapes = {shape.key for shape in DIVERGENCES[NAMED[name]].arguments.values()}
  others = {
    shape.key
    for divergence in DIVERGENCES.values()
    for shape in divergence.arguments.values()
  }
  assert {*methods.used_knobs(name)} & ({"divergence"} | others) == shapes
  logits, batch = make_logits(), make_batch()
  want = LogitTrial("kd", divergence=NAMED[name])(*logits, batch)[0]
  assert LogitTrial(name)(*logits, batch)[0] == want


# (method, knobs, the loss per token from the adapted teacher's logits t, the student's
# s, gold y and the frozen teacher's b)
FORMULAS = [
  ("sft", {}, ce),
  ("kd", {}, lambda t, s, y, b: oracle.forward_kl(b, s)),
  ("kd", {"temperature": 2.0}, lambda t, s, y, b: oracle.forward_kl(b, s, 2.0)),
  (
    "kd",
    {"divergence": "alpha_beta", "ab_alpha": 0.4, "ab_beta": 0.5},
    lambda t, s, y, b: oracle.alpha_beta(b, s, alpha=0.4, beta=0.5),
  ),
  (
    "kd",
    {"divergence": "weighted_kl", "forward_share": 0.3},
    lambda t, s, y, b: 0.3 * oracle.forward_kl(b, s) + 0.7 * oracle.reverse_kl(b, s),
  ),
  (
    "kd",
    {"top_k": 4, "temperature": 2.0},
    lambda t, s, y, b: oracle.topk_forward_kl(b, s, np.argsort(-b)[..., :4], 2.0),
  ),
  ("rkd", {}, lambda t, s, y, b: oracle.reverse_kl(b, s)),
  (
    "rkd",
    {"kd_ratio": 0.3, "gold_weight": 0.2},
    lambda t, s, y, b: 0.3 * oracle.reverse_kl(b, s) + 0.9 * ce(t, s, y, b),
  ),
  (
    "rkd",
    {"top_k": 4},
    lambda t, s, y, b: oracle.topk_reverse_kl(b, s, np.argsort(-b)[..., :4]),
  ),
  ("jsd", {"beta": 0.1}, lambda t, s, y, b: oracle.jensen_shannon(b, s, beta=0.1)),
  (
    "jsd",
    {"normalize": True},
    lambda t, s, y, b: 4 * oracle.jensen_shannon(b, s, beta=0.5),
  ),
  ("tvd", {}, lambda t, s, y, b: oracle.total_variation(b, s)),
  (
    "akl",
    {"head_mass": 0.7},
    lambda t, s, y, b: oracle.adaptive_kl(b, s, head_mass=0.7),
  ),
  ("skl", {"skew": 0.3}, lambda t, s, y, b: oracle.skew_forward_kl(b, s, alpha=0.3)),
  ("srkl", {"skew": 0.3}, lambda t, s, y, b: oracle.skew_reverse_kl(b, s, alpha=0.3)),
  (
    "rlkd",
    {"rank_k": 4, "divergence": "reverse_kl", "rank_divisor": 4.0, "gold_weight": 0.5},
    lambda t, s, y, b: (
      oracle.rank_correlation(b, s, 4)
      + oracle.reverse_kl(b, s) / 4
      + 0.5 * ce(t, s, y, b)
    ),
  ),
  ("gkd", {}, lambda t, s, y, b: oracle.jensen_shannon(b, s)),
  (
    "gkd",
    {"kd_ratio": 0.7, "gold_weight": 0.2},
    lambda t, s, y, b: 0.7 * oracle.jensen_shannon(b, s) + 0.5 * ce(t, s, y, b),
  ),
  ("imitkd", {}, lambda t, s, y, b: oracle.forward_kl(b, s)),
  ("skd", {"top_k": 0}, lambda t, s, y, b: oracle.forward_kl(b, s)),
  ("distillm", {}, lambda t, s, y, b: oracle.skew_reverse_kl(b, s)),
  ("seqkd", {"gold_weight": 0.5}, lambda t, s, y, b: 1.5 * ce(t, s, y, b)),
  (
    "seqkd",
    {"seqkd_ratio": 0.4},
    lambda t, s, y, b: 0.4 * oracle.forward_kl(b, s) + 0.6 * ce(t, s, y, b),
  ),
  ("fdistill", {}, lambda t, s, y, b: oracle.total_variation(b, s)),
  (
    "fdistill",
    {"divergence": "jensen_shannon", "gold_weight": 0.3},
    lambda t, s, y, b: oracle.jensen_shannon(b, s) + 0.3 * ce(t, s, y, b),
  ),
  (
    "promptkd",
    {"gold_weight": 0.3},
    lambda t, s, y, b: (
      oracle.reverse_kl(t, s)
      + oracle.reverse_kl(s, t)
      + oracle.reverse_kl(b, t)
      + 0.3 * ce(t, s, y, b)
    ),
  ),
  (
    "okd",
    {"teacher_kl_weight": 0.5},
    lambda t, s, y, b: (
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
      "gold_weight": 0.15,
      "temperature": 2.0,
      "anchor_weight": 0.3,
    },
    lambda t, s, y, b: (
      0.6 * oracle.jensen_shannon(t, s, 2.0, beta=0.2)
      + 0.55 * ce(t, s, y, b)
      + 0.25 * oracle.reverse_kl(s, t, 2.0)
      + 0.75 * oracle.cross_entropy(t, y)
      + 0.3 * oracle.forward_kl(b, t)
    ),
  ),
]


@pytest.mark.parametrize("name, knobs, truth", FORMULAS)
def test_loss_equals_the_formula(name, knobs, truth):
  """Guards C3, C4: the value is the token mean of the formula, and nothing else."""
  (student, teacher, base), batch = make_logits(), make_batch()
  per_token = truth(*map(np.asarray, (teacher, student, batch.labels, base)))
  got, _ = LogitTrial(name, **knobs)(student, teacher, base, batch)
  np.testing.assert_allclose(got, mean(per_token, batch), rtol=1e-5)


def test_every_method_has_its_formula():
  # clda's is okd's, by test_clda; ensemble's by test_ensemble
  others = {"mixkd", "minillm", "distillm2", "clda", "ensemble"}
  assert {name for name, _, _ in FORMULAS} == {*methods.METHODS} - others


# What the logged parts must add up to, with the knobs of every method at work.
PARTS = {
  "sft": lambda m: m["student_nll"],
  "minillm": lambda m: m["policy_loss"] + m["divergence"] + 0.3 * m["gold_nll"],
  "fdistill": lambda m: m["divergence"] + 0.3 * m["gold_nll"],
  "distillm2": lambda m: (
    m["divergence"] + m["student_divergence"] + 0.3 * m["gold_nll"]
  ),
  "promptkd": lambda m: (
    m["divergence"] + m["module_divergence"] + m["pull"] + 0.3 * m["gold_nll"]
  ),
  "rlkd": lambda m: m["rank_loss"] + m["divergence"] / 2 + 0.3 * m["student_nll"],
  "mixkd": lambda m: 1.3 * m["student_nll"] + m["mixed_student_nll"] + m["divergence"],
  "okd": lambda m: (
    0.9 * m["divergence"]
    + (0.1 + 0.3) * m["student_nll"]
    + 0.25 * m["module_divergence"]
    + 0.75 * m["teacher_nll"]
    + 0.5 * m["drift"]
  ),
}
PARTS["clda"] = PARTS["okd"]


@every
def test_logged_parts_make_the_loss(name):
  """Guards C4: what is logged is what is optimised (TRL#5731)."""
  shares = {"kd_ratio": 0.9, "student_kl_weight": 0.9}
  knobs = only_read(name, **shares, gold_weight=0.3, anchor_weight=0.5)
  trial = LogitTrial(name, **knobs)
  loss, metrics = trial(*make_logits(), make_batch())
  parts = PARTS.get(name, lambda m: 0.9 * m["divergence"] + 0.4 * m["student_nll"])
  np.testing.assert_allclose(loss, parts(metrics), rtol=1e-5)


@every
def test_diagnostics(name):
  """Every distillation logs both entropies, both KLs, both NLLs and the agreement."""
  (student, teacher, base), batch = make_logits(), make_batch()
  trial = LogitTrial(name)
  _, metrics = trial(student, teacher, base, batch)
  if name in ("sft", "mixkd"):  # no teacher, or none on the plain rows
    want = mean(oracle.cross_entropy(student, np.asarray(batch.labels)), batch)
    np.testing.assert_allclose(metrics["student_nll"], want, rtol=1e-5)
    return
  teacher = np.asarray(teacher if name in ADAPTED else base)
  student, labels = np.asarray(student), np.asarray(batch.labels)

  def entropy(logits):
    return -(oracle.softmax(logits) * oracle.log_softmax(logits)).sum(-1)

  for key, values in {
    "student_nll": oracle.cross_entropy(student, labels),
    "teacher_nll": oracle.cross_entropy(teacher, labels),
    "student_entropy": entropy(student),
    "teacher_entropy": entropy(teacher),
    "forward_kl": oracle.forward_kl(teacher, student),
    "reverse_kl": oracle.reverse_kl(teacher, student),
    "top1_agreement": student.argmax(-1) == teacher.argmax(-1),
    "acceptance": np.minimum(oracle.softmax(teacher), oracle.softmax(student)).sum(-1),
  }.items():
    want = (values * np.asarray(trial.method.weights(batch.mask))).sum()
    np.testing.assert_allclose(metrics[key], want, rtol=1e-5, err_msg=key)


@every
def test_who_gets_gradient(name):
  """Guards F1, F2: the student always, the module where one learns, the base never."""
  trial = LogitTrial(name, **only_read(name, anchor_weight=0.5))
  batch = make_batch()
  grads = jax.grad(lambda logits: trial(*logits, batch)[0])(make_logits())
  student, teacher, base = (float(jnp.abs(g).sum()) for g in grads)
  assert student > 0
  assert (teacher > 0) == (trial.method.adapts) == (name in ADAPTED)
  assert base == 0


@every_rowwise
@settings(max_examples=6, deadline=None)
@given(
  seed=st.integers(0, 999), chunk=st.sampled_from([1, 7, 12]), rows=st.integers(0, 8)
)
def test_masked_positions_and_chunks(name, seed, chunk, rows):
  """Guards B1, B2, B3, B5, D1: only what the mask names counts, in any chunks.

  tunix: .739 becomes 6.322 when only pads change; axolotl: NaN for an empty chunk;
  EasyDeL and DistillKit: the first response token is lost, one too many at the end.
  """
  batch, logits = make_batch(seed), make_logits(seed)
  batch = batch.replace(mask=batch.mask & (jnp.arange(8) < rows)[:, None])
  junk = batch.replace(labels=jnp.where(batch.mask, batch.labels, 3))
  mask = batch.mask[..., None]
  dirty = [
    jnp.where(mask, x, 1e4 * jnp.sin(jnp.arange(x.size).reshape(x.shape)))
    for x in logits
  ]
  value, other = (_compiled(name, size) for size in (5, chunk))
  loss, grads = value(logits, batch)
  again, dirty_grads = value(dirty, junk)
  assert loss == again  # bit for bit
  rechunked, same = other(logits, batch)
  np.testing.assert_allclose(rechunked, loss, rtol=1e-5, atol=1e-7)
  for grad, after, chunked in zip(grads, dirty_grads, same, strict=True):
    np.testing.assert_array_equal(jnp.where(mask, 0, grad), 0)
    np.testing.assert_array_equal(grad, after)
    np.testing.assert_allclose(grad, chunked, atol=1e-6)
  moved = jnp.abs(grads[0]).sum(-1) > 0
  np.testing.assert_array_equal(moved, batch.mask)  # the first and EOS included


@functools.cache
def _compiled(name, chunk):
  trial = LogitTrial(name, chunk=chunk, **only_read(name, anchor_weight=0.5))
  return jax.jit(jax.value_and_grad(lambda x, batch: trial(*x, batch)[0]))


@every
def test_a_padded_teacher_equals_the_cut_one(name):
  """Guards E1: Liger pads with 0, which at a mean of -35 takes all the mass."""
  if name == "sft":
    pytest.skip("has no teacher")
  trial, batch = LogitTrial(name), make_batch()
  student, teacher, base = make_logits()
  want = trial(student, teacher, base, batch)[0]
  [(only, plain)] = trial.models.teachers.items()

  def padded(output):
    # As a padded model's head would: 16 more rows, with logits of their own.
    more = 100 * jnp.ones((16, VOCAB))
    return Output(output.hidden, jnp.concatenate([output.head, more]))

  def apply(*arguments, **keywords):
    return padded(plain.apply(*arguments, **keywords))

  def both(*arguments):
    return tuple(map(padded, plain.both(*arguments)))

  teachers = {only: dataclasses.replace(plain, apply=apply, both=both)}
  trial.models = dataclasses.replace(trial.models, teachers=teachers)
  got = trial(student - 35, teacher - 35, base - 35, batch)[0]
  np.testing.assert_allclose(got, want, rtol=1e-4)


# A value unlike the default, and what else must be set for it to matter.
OTHER = {
  "kd_ratio": (0.5, {}),
  "temperature": (2.0, {}),
  "gold_weight": (0.4, {}),
  "top_k": (3, {}),
  "divergence": ("reverse_kl", {}),
  "beta": (0.2, {"divergence": "jensen_shannon"}),
  "normalize": (True, {"divergence": "jensen_shannon"}),
  "skew": (0.4, {"divergence": "skew_forward_kl"}),
  "head_mass": (0.05, {"divergence": "adaptive_kl"}),
  "forward_share": (0.1, {"divergence": "weighted_kl"}),
  "ab_alpha": (0.6, {"divergence": "alpha_beta"}),
  "ab_beta": (0.2, {"divergence": "alpha_beta"}),
  "teacher_divergence": ("reverse_kl", {}),
  "teacher_kl_weight": (0.7, {}),
  "student_kl_weight": (0.7, {}),
  "anchor_weight": (0.5, {}),
  "drift_target": (0.2, {}),
  "target_mix": (0.3, {}),
  "target_kind": ("geometric", {"target_mix": 0.5}),
  "token_weight": ("top:0.5", {}),
  "student_mix": (0.4, {}),
  "rank_k": (3, {}),
  "rank_temperature": (0.2, {}),
  "rank_divisor": (1.0, {}),
  "mix_alpha": (2.0, {}),
  "mix_kd_weight": (0.3, {}),
  "mix_gold_weight": (0.3, {}),
  "update_order": ("sequential", {}),
  "variant": ("paper", {}),
  "teacher_mix": (0.5, {}),
  "ppo_clip": (0.01, {}),
  "length_norm": (False, {}),
  "single_step": (False, {}),
  "updates_per_sample": (2, {}),
  "exact_mixture": (True, {"divergence": "jensen_shannon"}),
  "contrast": (0.5, {}),
  "pull_weight": (0.2, {}),
  "seqkd_ratio": (0.5, {}),
  "replay": (True, {}),
  "replay_capacity": (10, {"replay": True}),
  "replay_ratio": ("constant", {}),
  "loss_eps": (0.2, {}),
  "accept_top": (3, {}),
  "teacher_temperature": (1.0, {}),
  "teacher_top_p": (0.9, {}),
  "sampled_share": (0.3, {}),
  "max_new_tokens": (7, {}),
  "sample_temperature": (0.7, {}),
  "sample_top_p": (0.6, {}),
  "sample_top_k": (3, {}),
}
# A divergence's own knobs are kd's affair: all methods hand them on by one function.
USED = [
  (n, k)
  for n in sorted({*CORE, *SAMPLED})
  for k in methods.used_knobs(n)
  if k != "student_mix_adapts"  # from one step to the next: test_targets.py
  if n == "kd" or k not in (shape_knobs() if n in CORE else methods.used_knobs("kd"))
]


@pytest.mark.parametrize("name, knob", USED)
def test_every_knob_changes_something(name, knob):
  """Guards H1: KDFlow's temperature and --hrl_topk are swallowed."""
  value, base = OTHER[knob]
  assert value != KNOBS[knob]
  base = only_read(name, **base)
  before, after = LogitTrial(name, **base), LogitTrial(name, **base | {knob: value})
  batch = make_batch()
  losses = [float(t(*make_logits(), batch)[0]) for t in (before, after)]
  changed = abs(losses[0] - losses[1]) > 1e-4 * abs(losses[0])
  one, other = before.method, after.method
  plans = [dataclasses.replace(m.sequences, prepare=None) for m in (one, other)]
  assert changed or one.updates != other.updates or plans[0] != plans[1]


FLOATS = [(n, k) for n, k in USED if type(KNOBS[k]) is float]


@pytest.mark.parametrize(
  "name, knob",
  [  # One method of each knob; `make test-slow` has them all.
    pytest.param(n, k, marks=[pytest.mark.slow] * (k in {x for _, x in FLOATS[:i]}))
    for i, (n, k) in enumerate(FLOATS)
  ],
)
def test_a_knob_moves_linearly(name, knob):
  """Halfway through a schedule the loss is the one of the value halfway."""
  value, base = OTHER[knob]
  if knob not in default.get_config().method.end:
    return  # the configuration has no such key
  base = only_read(name, **base)
  logits, batch = make_logits(), make_batch()
  # What moves by itself is held.
  held = {"pull_weight": 1.0} if name == "promptkd" and knob != "pull_weight" else {}
  moving = LogitTrial(name, end=held | {knob: value}, **base)
  progress = 0.5
  now = KNOBS[knob] + progress * (value - KNOBS[knob])
  at = {"progress": jnp.float32(progress)}
  still = {knob: now} if knob == "pull_weight" else held
  want = LogitTrial(name, **base | {knob: now}, end=still)(*logits, batch, **at)[0]
  got = moving(*logits, batch, **at)[0]
  np.testing.assert_allclose(got, want, rtol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_moving_knob_in_a_training_step(microbatches):
  """The step hands the knob on, differentiates through it and logs its value."""
  setup = Setup(
    "okd",
    end={"temperature": 3.0, "anchor_weight": 1.0},
    steps=3,
    microbatches=microbatches,
  )
  state, seen = setup.state, []
  for i in range(4):
    state, metrics = setup.step(state, setup.frozen, make_batch(i))
    seen.append(float(metrics["method.temperature"]))
    assert metrics["finite"] == 1
  np.testing.assert_allclose(seen, [1.0, 2.0, 3.0, 3.0])
  first = Setup("okd", temperature=1.0, microbatches=microbatches)
  want, _ = first.step(first.state, first.frozen, make_batch(0))
  got, _ = setup.step(setup.state, setup.frozen, make_batch(0))
  for a, b in zip(
    jax.tree.leaves(got.params), jax.tree.leaves(want.params), strict=True
  ):
    np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize(
  "name, knobs, message",
  [
    ("okdd", {}, "method.name='okdd' is unknown; did you mean okd? use one of akl, "),
    ("gdk", {}, "method.name='gdk' is unknown; did you mean gkd? use one of akl, clda"),
    ("none", {}, "method.name='none' is unknown; use one of akl, clda, distillm, "),
    ("kd", {"kd_ratio": 1.5}, "method.kd_ratio=1.5 must lie between 0 and 1"),
    ("kd", {"gold_weight": -1.0}, "method.gold_weight=-1.0 must be at least 0"),
    ("kd", {"top_k": -1}, "method.top_k=-1 must be at least 0"),
    ("okd", {"temperature": 0.0}, "method.temperature=0.0 must be above 0"),
    ("okd", {"temperature": float("nan")}, "method.temperature=nan must be above 0"),
    ("okd", {"teacher_kl_weight": -1.0}, "method.teacher_kl_weight=-1.0"),
    ("okd", {"anchor_weight": -1.0}, "method.anchor_weight=-1.0 must be at least 0"),
    ("okd", {"divergence": "kld"}, "method.divergence='kld' is no divergence"),
    ("okd", {"update_order": "both"}, "method.update_order='both' must be one of"),
    ("jsd", {"beta": 2.0}, "method.beta=2.0"),
    ("jsd", {"end": {"beta": 1.0}}, "method.beta=0.5 moving to 1.0: the Jensen"),
    ("skl", {"skew": 1.0}, "method.skew=1.0 must be at least 0 and below 1"),
    ("akl", {"head_mass": -0.1}, "method.head_mass=-0.1 must lie between 0 and 1"),
    ("rlkd", {"rank_k": 1}, "method.rank_k=1 must be 2 or more"),
    ("rlkd", {"rank_divisor": 0.0}, "method.rank_divisor=0.0 must be above 0"),
    ("mixkd", {"mix_alpha": 0.0}, "method.mix_alpha=0.0 must be above 0"),
    ("kd", {"end": {"temperature": -1.0}}, "method.temperature=1.0 moving to -1.0"),
    ("kd", {"end": {"beta": 0.9}}, "method.end.beta: here kd reads no such"),
    (
      "kd",
      {"end": {"rank_divisor": 1.0}},
      "method.end.rank_divisor: here kd reads no such",
    ),
  ],
)
def test_bad_knobs(name, knobs, message):
  with pytest.raises(UserError) as error:
    methods.build(name, KNOBS | knobs)
  assert message in str(error.value)


def test_alpha_beta_needs_one_above_zero():
  with pytest.raises(UserError, match="method.ab_alpha=0.0 and method.ab_beta=0.0"):
    methods.build(
      "kd", KNOBS | {"divergence": "alpha_beta", "ab_alpha": 0.0, "ab_beta": 0.0}
    )


@pytest.mark.parametrize("beta, warns", [(0.01, True), (0.99, True), (0.1, False)])
def test_jensen_shannon_near_its_ends_warns(beta, warns, caplog):
  """Guards A3: .031 at beta = .01, 3.69 at 0 (TRL and others)."""
  methods.build("jsd", KNOBS | {"beta": beta})
  assert ("set method.normalize=True" in caplog.text) == warns
  caplog.clear()
  methods.build("jsd", KNOBS | {"beta": beta, "normalize": True})
  assert not caplog.text


def test_sft_never_looks_at_the_teacher():
  """Without any teacher at all, its gradient is what it was beside one."""
  with_teacher, without = Setup("sft"), Setup("sft")
  without.frozen = {}
  for a, b in zip(
    *(jax.tree.leaves(gradients(s)) for s in (with_teacher, without)), strict=True
  ):
    np.testing.assert_array_equal(a, b)
  assert total(gradients(without)["student"]) > 0


@pytest.mark.parametrize(
  "name, knobs, other",
  [
    ("kd", {"kd_ratio": 0.0}, ("sft", {})),
    ("kd", {"divergence": "reverse_kl"}, ("rkd", {})),
    ("skl", {"skew": 0.0}, ("kd", {})),
    ("srkl", {"skew": 0.0}, ("rkd", {})),
    ("jsd", {"beta": 0.0}, ("kd", {})),
    ("jsd", {"beta": 1.0}, ("rkd", {})),
    ("kd", {"divergence": "weighted_kl", "forward_share": 1.0}, ("kd", {})),
    ("kd", {"top_k": 32}, ("kd", {})),
  ],
)
def test_special_cases(name, knobs, other):
  """METHODS 3: each method's ends are the methods they are said to be."""
  logits, batch = make_logits(), make_batch()
  got = LogitTrial(name, **knobs)(*logits, batch)[0]
  want = LogitTrial(other[0], **other[1])(*logits, batch)[0]
  np.testing.assert_allclose(got, want, rtol=1e-5)


def test_student_and_teacher_of_the_tests_differ():
  assert STUDENT.hidden_size != TEACHER.hidden_size
