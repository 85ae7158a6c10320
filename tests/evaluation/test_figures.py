"""Every figure is declared, belongs to somebody, and ranks as it should."""

import functools
import math

import jax
import numpy as np
import optax
import pytest
from trial import (
  LogitTrial,
  Setup,
  make_batch,
  make_logits,
  only_read,
  unmeasured,
  with_others,
)

from okd_jax import methods
from okd_jax.errors import UserError
from okd_jax.evaluation import figures
from okd_jax.evaluation.figures import FIGURES, Figure
from okd_jax.evaluation.tokens import ADAPTED, STUDENT, TEACHER, token_metrics
from okd_jax.methods.base.knobs import knobs_at
from okd_jax.run.state import init_state
from okd_jax.run.step import train_step

# Those of the sampler and of the loop, which no method computes.
ABOUT_STEPS = {"lr", "tokens", "trained_tokens", "tokens_per_s", "sampled"}
ABOUT_STEPS |= {"sampled_length", "sampled_ended", "sampling_time_share", "replay_age"}
WEIGHTINGS = ("mean", "gated", "reinforced")


@pytest.fixture
def table_of_figures(monkeypatch):
  """A copy that a test may add to."""
  monkeypatch.setattr(figures, "FIGURES", dict(FIGURES))
  return figures.FIGURES


def undeclared(names):
  return {name for name in names if figures.figure(name) not in FIGURES.values()}


def logged_by_loss(name, **knobs):
  """The names of a method's own figures; nothing is computed."""
  trial, batch = LogitTrial(name, **knobs), make_batch()
  return set(jax.eval_shape(lambda z: trial(*z, batch)[1], make_logits()))


def logged_by_step(name, **knobs):
  """The names in a row of training, but for moving knobs, which are configuration."""
  setup = Setup(name, **knobs)

  def step(state):
    batch = with_others(setup, state.params, setup.frozen, make_batch())
    return setup.train_step(state, setup.frozen, batch)[1]

  names = set(jax.eval_shape(step, setup.state)) - {"finite"}
  return {name for name in names if not name.startswith("method.")}


@pytest.mark.parametrize("module", ["", "lora"])
@pytest.mark.parametrize("name", sorted({*methods.METHODS} - {"ensemble"}))
def test_what_a_method_logs_is_declared(name, module):
  module = "" if name == "sft" else module
  knobs = only_read(name, module, anchor_weight=0.5, gold_weight=0.5, seqkd_ratio=0.5)
  names = logged_by_loss(name, module=module, **knobs)
  assert names and not undeclared(names)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_what_several_teachers_log_is_declared(weighting):
  """With a module on one of them."""
  (student, b, a), batch = make_logits(), make_batch()
  trial = LogitTrial("ensemble", module="lora", weighting=weighting, anchor_weight=0.5)
  frozen = {"a": a, "b": b}

  def loss(student):
    params = {"student": student, "adapter": {"b": b}} | trial.trees
    rows, key = trial.beside(params, frozen, batch), jax.random.key(0)
    now = knobs_at(trial.method.knobs, 0.0)
    return trial.method.loss(trial.models, params, frozen, rows, key, now)[1]

  names = set(jax.eval_shape(loss, student))
  assert {"module_loss_b", "module_divergence_b", "drift_b", "weight_a"} <= names
  assert not undeclared(names)
  owned = {name for name in names if figures.owner(name) == "adapter"}
  assert owned == {"module_loss_b", "module_divergence_b", "drift_b"}


def test_other_tokens_figures_are_declared():
  assert not undeclared(["aligned", "divergence", "student_nll", "own_token_loss"])


@pytest.mark.parametrize(
  "name, knobs",
  [
    ("okd", {"update_order": "sequential", "anchor_weight": 0.5}),
    ("promptkd", {}),
    ("ensemble", {"weighting": "gated"}),
    ("ensemble", {"weighting": "reinforced"}),
  ],
)
def test_a_row_of_training_is_declared(name, knobs):
  names = logged_by_step(name, **knobs)
  assert {"student_grad_norm", "student_update_norm", "tokens"} <= names
  assert not undeclared(names | ABOUT_STEPS)


def test_what_is_evaluated_is_declared():
  (student, adapted, teacher), labels = make_logits(), make_batch().labels
  one = {(STUDENT, ""): student, (TEACHER, "x"): teacher, (ADAPTED, "x"): adapted}
  several = {(STUDENT, ""): student, (TEACHER, "a_b"): teacher}
  several |= {(TEACHER, "c"): teacher, (ADAPTED, "c"): adapted}
  for logits in (one, several):
    _, found = jax.eval_shape(lambda z: token_metrics(z, labels), logits)
    assert not undeclared({*found, "perplexity", "rougeL", "exact_match"})
  names = ("a_b_loss", "c_forward_kl", "c_adapted_loss", "c_adapted_forward_kl")
  assert [figures.figure(name).name for name in names] == [
    "loss",
    "forward_kl",
    "adapted_loss",
    "adapted_forward_kl",
  ]


def test_titles_are_unique_and_all_is_said():
  titles = [figure.title for figure in FIGURES.values()]
  assert len(set(titles)) == len(titles)
  assert all(f.name == name and f.title and f.meaning for name, f in FIGURES.items())
  assert list(figures.columns()) == [
    "loss",
    "perplexity",
    "forward_kl",
    "reverse_kl",
    "top1_agreement",
    "acceptance",
    "rougeL",
    "exact_match",
  ]


@pytest.mark.parametrize(
  "tree, names",
  [
    ("student", "loss student_loss student_nll divergence drifting gate module_x"),
    ("adapter", "module_loss module_divergence_a_b drift drift_big pull adapter_norm"),
    ("adapter", "adapter_norm_old adapter_grad_norm adapter_update_norm adapted_loss"),
    ("policy", "policy_loss policy_reward policy_gain policy_grad_norm"),
    ("gate", "gate_loss gate_update_norm"),
  ],
)
def test_owners(tree, names):
  assert {figures.owner(name) for name in names.split()} == {tree}


@pytest.mark.parametrize(
  "name, knobs, figure",
  [
    ("promptkd", {}, "pull"),
    ("okd", {"update_order": "sequential", "anchor_weight": 0.5}, "drift"),
  ],
)
def test_passes_in_sequence_log_the_figures_of_their_own_tree(name, knobs, figure):
  """The pull is what the module was moved by, not what came of it; it once was."""
  (student, module, base), batch = make_logits(), make_batch()
  trial = LogitTrial(name, **knobs)
  optimizers = {"student": optax.sgd(50.0), "adapter": optax.sgd(50.0)}
  trees = {"student": student, "adapter": {"teacher": module}}
  step = functools.partial(
    train_step,
    method=trial.method,
    models=unmeasured(trial.models),
    optimizers=optimizers,
    microbatches=1,
    steps=10,
  )
  state = init_state(trees, optimizers, jax.random.key(0))
  state, logged = jax.jit(step)(state, {"teacher": base}, batch)
  figures_of = jax.jit(lambda module: trial(student, module, base, batch)[1])
  before, between = figures_of(module), figures_of(state.params["adapter"]["teacher"])
  own = (figure, "module_loss", "module_divergence")
  for names, wanted, other in (
    (own, before, between),
    (["divergence"], between, before),
  ):
    for one in names:
      np.testing.assert_allclose(logged[one], wanted[one], rtol=1e-5, err_msg=one)
      assert abs(wanted[one] - other[one]) > 1e-2


def test_somebody_elses_figures(table_of_figures):
  own = Figure("spread", "spread", "how far", of="adapter", each="spread_{}")
  assert figures.figure("spread") == Figure("spread", "spread")
  figures.declare(own)
  figures.declare(own)  # a module that is imported twice
  assert figures.owner("spread") == figures.owner("spread_big") == "adapter"
  with pytest.raises(UserError, match="'spread' is declared already, as 'spread'"):
    figures.declare(Figure("spread", "another"))
  with pytest.raises(UserError, match="declared already"):
    figures.declare(Figure("loss", "loss"))
  with pytest.raises(UserError, match="needs='luck' must be one of"):
    Figure("a", "a", needs="luck")
  with pytest.raises(UserError, match="must have one {}"):
    Figure("a", "a", each="a_")


def test_table():
  text = figures.table(
    {"teacher": {"loss": 1.23456}, "student": {"loss": 22.5, "rougeL": 101.26}}
  )
  assert text.splitlines() == [
    "          loss  ROUGE-L",
    "-----------------------",
    "teacher  1.235        –",
    "student  22.50    101.3",
  ]


@pytest.mark.parametrize(
  "values, patience, stops",
  [
    ([3.0, 2.0, 1.0], 2, False),
    ([3.0, 2.0, 2.5], 2, False),
    ([3.0, 2.0, 2.5, 2.0], 2, True),  # as good is no better
    ([3.0, 2.0, 2.5, 1.9], 2, False),
    ([2.0, 2.5], 1, True),
    ([2.0, 2.5], 0, False),
    ([2.0], 1, False),
  ],
)
def test_a_run_stalls_when_nothing_gets_better(values, patience, stops):
  """METHODS 5.6: early stopping by a distillation loss; the start does not count."""
  evals = {10 * (i + 1): {"forward_kl": v} for i, v in enumerate(values)}
  evals[0] = {"forward_kl": 0.0}
  assert figures.stalled(evals, "forward_kl", patience) == stops
  larger = {step: {"rougeL": -row["forward_kl"]} for step, row in evals.items()}
  assert figures.stalled(larger, "rougeL", patience) == stops
  assert not figures.stalled(evals, "", 1)


@pytest.mark.parametrize("lost", [None, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["loss", "rougeL"])
def test_what_was_not_finite_is_the_worst(name, lost):
  """A resumed run reads null where the run before it had seen no finite number."""

  def evals(*values):
    return {step: {name: value} for step, value in enumerate(values, 1)}

  assert figures.stalled(evals(2.0, lost, lost), name, 2)
  assert figures.stalled(evals(lost, lost), name, 1)
  assert not figures.stalled(evals(lost, 2.0), name, 1)
  assert figures.score_by(name)({name: lost}) == -math.inf
  assert figures.score_by("") is None
