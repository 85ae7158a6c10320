"""Several teachers: whose distribution is the target, and who decides that."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from trial import KNOBS, LogitTrial, Setup, make_batch, make_logits, total, weighted

from configs import debug
from okd_jax import methods
from okd_jax.data.batch import Batch
from okd_jax.errors import UserError
from okd_jax.evaluation.tokens import STUDENT, TEACHER, token_metrics
from okd_jax.losses import log_probs, mixture
from okd_jax.methods.ensemble import gate, policy
from okd_jax.run.build import build
from okd_jax.runtime.workdir import Workdir

WEIGHTINGS = ("mean", "gated", "reinforced")


def softmax(z, temperature=1.0):
  z = np.asarray(z, np.float64) / temperature
  e = np.exp(z - z.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def kl(p, q):
  return (p * (np.log(p) - np.log(q))).sum(-1)


def mean(values, batch):
  mask = np.asarray(batch.mask)
  return values[mask].mean()


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_mean_is_taken_of_probabilities(temperature):
  """Against float64; not of logits, which would multiply the teachers."""
  _, a, b = make_logits()
  weights = jnp.broadcast_to(jnp.array([1.0, 3.0]), (*a.shape[:2], 2))
  got = softmax(mixture([a, b], weights, temperature), temperature)
  want = 0.25 * softmax(a, temperature) + 0.75 * softmax(b, temperature)
  np.testing.assert_allclose(got, want, atol=1e-6)
  nobody = mixture([a, b], jnp.zeros(weights.shape))
  np.testing.assert_allclose(
    nobody, mixture([a, b], jnp.ones(weights.shape)), atol=1e-6
  )


@pytest.mark.parametrize("weights", [(), (1.0, 3.0)])
def test_fixed_weights(weights):
  """r T^2 KL(mean p || q) + (1 - r + g) CE."""
  (student, b, a), batch = make_logits(), make_batch()
  trial = LogitTrial(
    "ensemble", teacher_weights=weights, kd_ratio=0.7, gold_weight=0.2, temperature=2.0
  )
  loss, metrics = trial(student, b, a, batch)
  w = np.array(weights or (1.0, 1.0)) / sum(weights or (1.0, 1.0))
  p = w[0] * softmax(a, 2.0) + w[1] * softmax(b, 2.0)
  ce = oracle.cross_entropy(np.asarray(student), np.asarray(batch.labels))
  want = 0.7 * 4 * mean(kl(p, softmax(student, 2.0)), batch) + 0.5 * mean(ce, batch)
  np.testing.assert_allclose(loss, want, rtol=1e-5)
  np.testing.assert_allclose(metrics["weight_b"], w[1], rtol=1e-6)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_one_teacher_twice_is_kd(weighting):
  """METHODS 5.5, 5.6: the student's gradient is that of KD from it."""
  (student, teacher, _), batch = make_logits(), make_batch()
  several = LogitTrial("ensemble", weighting=weighting)
  if weighting == "reinforced":  # all are chosen
    several.trees["policy"]["bias"] += 50.0
  grad = jax.grad(lambda q: several(q, teacher, teacher, batch)[0])(student)
  kd = LogitTrial("kd")
  want = jax.grad(lambda q: kd(q, teacher, teacher, batch)[0])(student)
  np.testing.assert_allclose(grad, want, atol=1e-6)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_teachers_stay_as_they_are(weighting):
  """Guards F1: the student and the gate or policy move, nobody else."""
  logits, batch = make_logits(), make_batch()
  trial = LogitTrial("ensemble", weighting=weighting, kd_ratio=0.5)
  grads = jax.grad(lambda z: trial(*z, batch)[0])(logits)
  assert total(grads[0]) > 0 and total(grads[1:]) == 0


class TestGate:
  def facts(self, seed=0):
    rng = np.random.default_rng(seed)
    names = ("nll", "entropy", "divergence")
    return {k: jnp.array(rng.uniform(0.1, 2, (8, 12, 2)), jnp.float32) for k in names}

  def test_it_starts_uniform_and_sums_to_one(self):
    """METHODS 5.6."""
    batch, params = weighted(make_batch()), gate.init(jax.random.key(0), 2, 4)
    a, _ = gate.weigh(params, self.facts(), batch, "token")
    np.testing.assert_allclose(a, 0.5)
    params = jax.tree.map(lambda x: x + jnp.arange(x.size).reshape(x.shape), params)
    a, _ = gate.weigh(params, self.facts(), batch, "token")
    np.testing.assert_allclose(a.sum(-1), 1, rtol=1e-6)
    assert a.std(axis=(0, 1)).min() > 1e-3

  def test_an_example_has_one_weight(self):
    batch, facts = weighted(make_batch()), self.facts()
    params = jax.tree.map(lambda x: x + 0.3, gate.init(jax.random.key(0), 2, 4))
    params["kernel"] = params["kernel"].at[0, 0].set(-1.0)
    a, _ = gate.weigh(params, facts, batch, "example")
    np.testing.assert_allclose(a, jnp.broadcast_to(a[:, :1], a.shape))
    assert a[:, 0].std() > 1e-4
    hidden = jax.tree.map(
      lambda x: jnp.where(batch.mask[..., None], x, 1e9), facts
    )  # what is masked must not count
    again, _ = gate.weigh(params, hidden, batch, "example")
    np.testing.assert_allclose(again, a, rtol=1e-5)

  def test_its_loss(self):
    """sum a D - log sum a p(y), the token mean, by hand."""
    batch, facts = weighted(make_batch()), self.facts()
    params = {"kernel": jnp.zeros((4, 2)), "bias": jnp.array([0.0, jnp.log(3.0)])}
    _, loss = gate.weigh(params, facts, batch, "token")
    d, nll = (np.asarray(facts[k], np.float64) for k in ("divergence", "nll"))
    a = np.array([0.25, 0.75])
    values = (a * d).sum(-1) - np.log((a * np.exp(-nll)).sum(-1))
    np.testing.assert_allclose(loss, mean(values, batch), rtol=1e-6)

  def test_it_learns_to_prefer_the_better_teacher(self):
    """One knows the answers, the other guesses."""
    student = jnp.zeros_like(make_logits()[0])
    trial, weights = LogitTrial("ensemble", weighting="gated"), []
    params = trial.trees["gate"]
    grad = jax.jit(jax.value_and_grad(self._loss(trial), has_aux=True))
    for seed in range(40):
      batch = make_batch(seed)
      good = 6.0 * jax.nn.one_hot(batch.labels, student.shape[-1])
      bad = jax.random.normal(jax.random.key(seed), student.shape)
      (_, metrics), grads = grad(params, student, good, bad, batch)
      params = jax.tree.map(lambda x, g: x - 0.3 * g, params, grads)
      weights.append(float(metrics["weight_a"]))
    assert abs(weights[0] - 0.5) < 1e-5 and weights[-1] > 0.9

  def _loss(self, trial):
    def loss(params, student, good, bad, batch):
      trial.trees["gate"] = params
      return trial(student, bad, good, batch)

    return loss


class TestPolicy:
  def facts(self, student_nll=1.0, divergence=1.0):
    shape = (8, 12, 2)
    return {
      "nll": jnp.full(shape, 0.5),
      "entropy": jnp.full(shape, 0.7),
      "divergence": jnp.full(shape, divergence),
      "student_nll": jnp.full(shape[:2], student_nll),
    }

  def chosen(self, params, seed=0, **more):
    batch = weighted(make_batch())
    hidden = jax.random.normal(jax.random.key(1), (8, 12, 4))
    facts = self.facts(**more)
    key = jax.random.key(seed)
    chosen = policy.choose(params, facts, hidden, batch.mask, key)
    return batch.replace(facts=chosen)

  def test_permuted_teachers_are_permuted_actions(self):
    """METHODS 5.5."""
    params = policy.init(jax.random.key(0), 2, 4)
    params["kernel"] += jax.random.normal(jax.random.key(2), (2, 7))
    batch = self.chosen(params)
    swapped = {k: v[::-1] if v.ndim else v for k, v in params.items()}
    z = policy.logits(params, batch.facts["state"])
    np.testing.assert_allclose(
      policy.logits(swapped, batch.facts["state"][:, ::-1]), z[:, ::-1], rtol=1e-6
    )
    assert jnp.abs(z[:, 0] - z[:, 1]).max() > 0.1

  def test_what_the_baseline_expects_teaches_nothing(self):
    """METHODS 5.5: a constant reward with its baseline has no policy gradient."""
    params = policy.init(jax.random.key(0), 2, 4) | {"baseline": jnp.float32(0.3)}
    batch = self.chosen(params)
    after = self.facts(student_nll=0.7)

    def loss(params):
      return policy.loss(params, after, batch, "gold", {"kd_ratio": 1.0})[0]

    grads = jax.grad(loss)(params)
    np.testing.assert_allclose(grads["kernel"], 0, atol=1e-6)
    np.testing.assert_allclose(grads["baseline"], 0, atol=1e-6)
    surprised = jax.grad(loss)(params | {"baseline": jnp.float32(0.0)})
    assert total(surprised["kernel"]) > 1e-3 and surprised["baseline"] < 0

  @pytest.mark.parametrize(
    "reward, gain", [("gold", 0.25), ("gold_and_teachers", 0.55)]
  )
  def test_rewards(self, reward, gain):
    """The fall of CE, and with the teachers' of r times their divergence."""
    params = policy.init(jax.random.key(0), 2, 4)
    params["bias"] += 50.0  # both teachers
    batch = self.chosen(params)
    after = self.facts(student_nll=0.75, divergence=0.4)
    _, metrics = policy.loss(params, after, batch, reward, {"kd_ratio": 0.5})
    np.testing.assert_allclose(metrics["policy_gain"], gain, rtol=1e-5)

  def test_reinforce_is_the_gradient_of_the_expected_reward(self):
    """All actions of one teacher enumerated: E[r grad log pi] = grad E[r]."""
    state = jnp.ones((1, 1, 3))
    params = {"kernel": jnp.full((1, 3), 0.2), "bias": jnp.zeros(1)}
    params |= {"baseline": jnp.float32(0.1)}
    rewards = {0.0: 0.4, 1.0: 1.3}

    def expected(params):
      pi = jax.nn.sigmoid(policy.logits(params, state))[0, 0]
      return -(pi * rewards[1.0] + (1 - pi) * rewards[0.0])

    def sampled(params, action):
      known = {
        "actions": jnp.full((1, 1), action),
        "state": state,
        "before": jnp.array([[rewards[action], 0.0]]),
      }
      ids = jnp.ones((1, 1), jnp.int32)
      batch = Batch(ids, ids, ids > 0, ids, weights=jnp.ones((1, 1)), facts=known)
      facts = {"student_nll": jnp.zeros((1, 1)), "divergence": jnp.zeros((1, 1, 1))}
      return policy.loss(params, facts, batch, "gold", {"kd_ratio": 1.0})[0]

    pi = jax.nn.sigmoid(policy.logits(params, state))[0, 0]
    want = jax.grad(expected)(params)["kernel"]
    got = sum(
      weight * jax.grad(sampled)(params, action)["kernel"]
      for action, weight in ((1.0, pi), (0.0, 1 - pi))
    )
    np.testing.assert_allclose(got, want, rtol=1e-5)

  def test_nobody_chosen_leaves_gold(self):
    """METHODS 5.5: CE alone, of the weight that it has anyway."""
    (student, b, a), batch = make_logits(), make_batch()
    trial = LogitTrial("ensemble", weighting="reinforced", kd_ratio=0.5)
    trial.trees["policy"]["bias"] -= 50.0
    grad = jax.grad(lambda q: trial(q, b, a, batch)[0])(student)
    sft = LogitTrial("sft")
    want = jax.grad(lambda q: sft(q, b, a, batch)[0])(student)
    np.testing.assert_allclose(grad, 0.5 * want, atol=1e-7)

  def test_a_student_that_stays_gains_nothing(self):
    """Whatever the temperature does meanwhile: before and after are one measure."""
    trial = LogitTrial(
      "ensemble",
      weighting="reinforced",
      reward="gold_and_teachers",
      end={"temperature": 4.0},
    )
    _, metrics = trial(*make_logits(), make_batch(), progress=1.0)
    np.testing.assert_allclose(metrics["policy_gain"], 0, atol=1e-6)

  @pytest.mark.slow
  def test_it_finds_the_better_teacher(self):
    """A real step: the student moves first, then the policy by what that did."""
    setup = Setup(
      "ensemble", weighting="reinforced", kd_ratio=0.9, gate_lr=0.03, lr=0.03
    )
    good, state = setup.frozen["a"], setup.state
    setup.frozen = {"a": good, "b": jax.tree.map(lambda x: -3 * x, good)}
    chances = []

    @jax.jit
    def answered(params, frozen, batch, key):
      """The batch with the good teacher's choice as gold, and the actions on it."""
      logits = setup.models.teachers["a"].apply(frozen["a"], None, batch)
      gold = (logits.hidden @ logits.head.T).argmax(-1).astype(jnp.int32)
      full = weighted(batch.replace(labels=gold))
      prepare = setup.method.sequences.prepare
      return prepare(setup.models, params, frozen, full, key)

    for seed in range(80):
      batch, key = make_batch(seed % 4), jax.random.key(seed)
      full = answered(state.params, setup.frozen, batch, key)
      state, metrics = setup.step(state, setup.frozen, full)
      z = policy.logits(state.params["policy"], full.facts["state"])
      chances.append(jax.nn.sigmoid(z).mean(0))
    last = np.mean(chances[-10:], axis=0)
    assert last[0] - last[1] > 0.2, chances[:: len(chances) // 8]
    assert np.isfinite(metrics["policy_reward"])


@pytest.mark.parametrize(
  "knobs, words",
  [
    ({"weighting": "best"}, "must be one of mean, gated, reinforced"),
    ({"weighting": "gated", "teacher_weights": (1.0,)}, "finds its own"),
    ({"teacher_weights": (-1.0, 2.0)}, "must be 0 or more"),
    ({"gate_per": "batch"}, "must be one of token, example"),
    ({"reward": "money"}, "must be one of gold, gold_and_teachers"),
    ({"gate_lr": 0.0}, "method.gate_lr=0.0 must be above 0"),
  ],
)
def test_what_makes_no_ensemble(knobs, words):
  with pytest.raises(UserError, match=words):
    methods.build("ensemble", KNOBS | knobs)


@pytest.mark.slow
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_micro_batches_change_nothing(weighting):
  """Guards C1: losses and both gradients are plain sums over rows."""
  whole = Setup("ensemble", weighting=weighting, kd_ratio=0.5)
  parts = Setup("ensemble", weighting=weighting, kd_ratio=0.5, microbatches=4)
  one, losses = whole.train(3)
  other, same = parts.train(3)
  np.testing.assert_allclose(losses, same, rtol=1e-5)
  for a, b in zip(
    jax.tree.leaves(one.params), jax.tree.leaves(other.params), strict=True
  ):
    np.testing.assert_allclose(a, b, atol=2e-4)


@pytest.mark.parametrize("weights", [(), (3.0, 1.0)])
def test_evaluation_is_beside_the_weighted_mean(weights):
  student, a, b = make_logits()
  labels = make_batch().labels
  logits = {(STUDENT, ""): student, (TEACHER, "a"): a, (TEACHER, "b"): b}
  _, metrics = token_metrics(logits, labels, teacher_weights=weights)
  share = np.array(weights or (1.0, 1.0)) / sum(weights or (1.0, 1.0))
  p = share[0] * softmax(a) + share[1] * softmax(b)
  np.testing.assert_allclose(metrics["forward_kl"], kl(p, softmax(student)), rtol=1e-4)


@pytest.mark.parametrize(
  "name", ["teacher", "student", "adapted", "old_adapted", "a b"]
)
def test_names_that_would_hide_other_figures(name, tmp_path):
  """A teacher called 'teacher' once took the place of the one that was checked."""
  config = debug.get_config()
  config.method.name = "ensemble"
  config.teachers[name] = "somewhere"
  with pytest.raises(UserError, match="cannot be a name"):
    build(config, Workdir(tmp_path))


def test_the_mixture_is_normalised():
  _, a, b = make_logits()
  weights = jax.random.uniform(jax.random.key(0), (*a.shape[:2], 2))
  p = jnp.exp(log_probs(mixture([a, b], weights)))
  np.testing.assert_allclose(p.sum(-1), 1, rtol=1e-6)


def test_a_single_teacher_is_an_ensemble_of_one(tmp_path):
  """So that the method runs wherever any other does."""
  config = debug.get_config()
  config.method.name = "ensemble"
  config.data.train = "embedded:eval"
  config.adapter.kind = "lora"
  run = build(config, Workdir(tmp_path))
  cast = run.cast
  assert {*cast.frozen} == {*cast.teachers} == {*cast.adapted} == {"teacher"}
  assert {*cast.decoders} == {"student", "teacher", "adapted teacher"}
  assert {*run.plan.abstract.params["adapter"]} == {"teacher"}
  config.method.name = "kd"
  config.teachers.a = "somewhere"
  with pytest.raises(UserError, match="kd has one teacher"):
    build(config, Workdir(tmp_path))
