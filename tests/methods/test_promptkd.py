"""PromptKD: on-policy reverse KL both ways, and a pull that fades."""

import chex
import jax
import numpy as np
import optax
import oracle
import pytest
from trial import (
  KNOBS,
  VOCAB,
  LogitTrial,
  Setup,
  make_batch,
  make_logits,
  total,
  unmeasured,
  weighted,
)

from configs import debug
from okd_jax import methods
from okd_jax.errors import UserError
from okd_jax.methods.base.knobs import knobs_at
from okd_jax.methods.online import with_adapters
from okd_jax.models.adapters import Prompt
from okd_jax.run.build import build
from okd_jax.run.state import init_state
from okd_jax.run.step import train_step
from okd_jax.runtime.workdir import Workdir

PROMPT = Prompt(length=3)


def reverse_gradient(fitted, target, temperature=1.0):
  """METHODS 1.2: of KL(fitted || target) T^2 in the fitted logits."""
  log_q = oracle.log_softmax(fitted, temperature)
  log_p = oracle.log_softmax(target, temperature)
  gap = log_q - log_p - oracle.kl(log_q, log_p)[..., None]
  return temperature * np.exp(log_q) * gap


@pytest.mark.parametrize("progress", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_logit_gradients_have_the_closed_form(progress, temperature):
  """METHODS 5.2: KL(q || p_ta) and KL(p_ta || q) + c (1 - t/T) KL(p_ta || p).

  Guards F2: each side sees the other as a constant, and neither the other's terms.
  """
  logits, batch = make_logits(), make_batch()
  trial = LogitTrial("promptkd", pull_weight=0.8, temperature=temperature)
  grads = jax.grad(lambda x: trial(*x, batch, progress=progress)[0])(logits)
  student, teacher, base = map(np.asarray, logits)
  weights = np.asarray(weighted(batch).weights)[..., None]
  by_student = reverse_gradient(student, teacher, temperature)
  by_module = reverse_gradient(teacher, student, temperature)
  by_module += 0.8 * (1 - progress) * reverse_gradient(teacher, base)
  np.testing.assert_allclose(grads[0], weights * by_student, atol=1e-6)
  np.testing.assert_allclose(grads[1], weights * by_module, atol=1e-6)
  np.testing.assert_array_equal(grads[2], 0)


def test_the_pull_fades_to_nothing():
  """METHODS 5.2: at t = T its weight is 0, and the frozen teacher is forgotten."""
  (student, teacher, base), batch = make_logits(), make_batch()
  trial = LogitTrial("promptkd", pull_weight=0.8)
  weights = [knobs_at(trial.method.knobs, t)["pull_weight"] for t in (0.0, 0.5, 1.0)]
  np.testing.assert_allclose(weights, [0.8, 0.4, 0.0])
  last = [trial(student, teacher, b, batch, progress=1.0) for b in (base, student)]
  assert last[0][0] == last[1][0]
  parts = last[0][1]["divergence"] + last[0][1]["module_divergence"]
  np.testing.assert_allclose(last[0][0], parts, rtol=1e-6)
  # A run may keep it instead.
  kept = LogitTrial("promptkd", pull_weight=0.8, end={"pull_weight": 0.8})
  np.testing.assert_allclose(knobs_at(kept.method.knobs, 1.0)["pull_weight"], 0.8)


def test_gold_is_the_students_alone():
  """METHODS 5.2 and 2.10: cross-entropy on top, of which the module knows nothing."""
  logits, batch = make_logits(), make_batch()
  plain, gold = (
    jax.grad(lambda x, t=trial: t(*x, batch)[0])(logits)
    for trial in (LogitTrial("promptkd"), LogitTrial("promptkd", gold_weight=0.5))
  )
  np.testing.assert_array_equal(gold[1], plain[1])
  weights = np.asarray(weighted(batch).weights)[..., None]
  towards = oracle.softmax(logits[0]) - np.eye(VOCAB)[np.asarray(batch.labels)]
  np.testing.assert_allclose(gold[0] - plain[0], 0.5 * weights * towards, atol=1e-6)
  for weight in (0.0, 0.5):
    method = methods.build("promptkd", KNOBS | {"gold_weight": weight})
    assert method.sequences.gold == bool(weight)


def test_a_held_module_is_reverse_kd_under_a_fixed_prompt():
  """METHODS 5.2: real models, module learning rate 0; the text is the same here."""
  setup, batch = Setup("promptkd", lr_scale=0.0, adapter=PROMPT), weighted(make_batch())
  params, rkd = setup.params, methods.build("rkd", KNOBS)

  @jax.jit
  def gradients(params, frozen):
    fixed = with_adapters(setup.models, params["adapter"])

    def reverse_kd(student):
      own, key = {"student": student}, jax.random.key(0)
      return rkd.loss(fixed, own, frozen, batch, key, knobs_at(rkd.knobs, 0.0))[0]

    got = jax.grad(lambda p: setup.loss(p, batch)[0])(params)
    return got, jax.grad(reverse_kd)(params["student"])

  got, want = gradients(params, setup.frozen)
  chex.assert_trees_all_close(got["student"], want, rtol=1e-5, atol=1e-6)
  assert total(got["adapter"]) > 0  # it would move
  held, _ = setup.optimizers["adapter"].update(
    got["adapter"], setup.state.opt_state["adapter"], params["adapter"]
  )
  assert total(held) == 0


@pytest.mark.parametrize("rate", [50.0, 0.0])
def test_the_student_sees_the_moved_module(rate):
  """METHODS 5.2: the module first, then the teacher again; held, this is reverse KD."""
  (student, teacher, base), batch = make_logits(), make_batch()
  trial = LogitTrial("promptkd")
  method = trial.method
  assert method.updates == (("adapter",), ("student",))
  assert method.adapts and method.adapter == "prompt"
  assert method.sequences.source == "student" and method.sequences.share == 1.0
  optimizers = {"student": optax.sgd(50.0), "adapter": optax.sgd(rate)}
  trees = {"student": student, "adapter": {"teacher": teacher}}
  state = init_state(trees, optimizers, jax.random.key(0))
  moved, _ = train_step(
    state,
    {"teacher": base},
    batch,
    method=method,
    models=unmeasured(trial.models),
    optimizers=optimizers,
    microbatches=1,
    steps=10,
  )
  weights = np.asarray(weighted(batch).weights)[..., None]
  by_module = reverse_gradient(teacher, student) + reverse_gradient(teacher, base)
  adapted = np.asarray(teacher) - rate * weights * by_module
  np.testing.assert_allclose(moved.params["adapter"]["teacher"], adapted, atol=1e-4)
  followed = np.asarray(student) - 50 * weights * reverse_gradient(student, adapted)
  np.testing.assert_allclose(moved.params["student"], followed, atol=1e-4)
  assert (np.abs(adapted - np.asarray(teacher)).max() > 0.1) == (rate > 0)


def test_a_prompt_starts_from_a_texts_embeddings(tmp_path):
  """METHODS 5.2: the authors' vectors are a sentence's; a short one is repeated."""
  config = debug.get_config()
  config.method.name = "promptkd"
  config.adapter.text = "Hi!"
  config.adapter.length = 7
  config.data.train = "embedded:eval"
  run = build(config, Workdir(tmp_path))
  params = run.init().params["adapter"]
  assert jax.tree.structure(params) == jax.tree.structure(
    run.plan.abstract.params["adapter"]
  )
  ids = [ord(letter) for letter in "Hi!Hi!H"]
  assert run.data.tokenizer.encode("Hi!", add_special_tokens=False) == ids[:3]
  table = run.cast.frozen["teacher"]["embed"]["embedding"]
  want = {"teacher": {"prompt": {"vectors": table[np.array(ids)]}}}
  chex.assert_trees_all_equal(params, want)


def test_a_text_starts_prompts_only(tmp_path):
  config = debug.get_config()
  config.adapter.text = "Hi!"
  config.data.train = "embedded:eval"
  with pytest.raises(UserError, match="adapter.kind=prompt"):
    build(config, Workdir(tmp_path))
