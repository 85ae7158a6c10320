"""Agreement by difficulty against numpy, and what belongs to which group."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from okd_jax.analysis import agreement
from okd_jax.analysis.positions import at_positions
from okd_jax.data import Example
from okd_jax.models import Decoder, ModelConfig, init
from okd_jax.text.source import Side


def softmax(x):
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


@pytest.fixture(scope="module")
def logits():
  generator = np.random.default_rng(0)
  teacher, student = (2 * generator.normal(size=(2, 5, 60)) for _ in range(2))
  return teacher.astype(np.float32), student.astype(np.float32)


@pytest.fixture(scope="module")
def compared(logits):
  labels = jnp.array(np.random.default_rng(1).integers(0, 60, (2, 5)))
  return labels, agreement.compare(*map(jnp.asarray, logits), labels)


def test_every_figure_is_its_definition(logits, compared):
  teacher, student = logits
  labels, found = compared
  p, q = softmax(teacher.astype(np.float64)), softmax(student.astype(np.float64))
  order = np.argsort(-teacher, axis=-1)
  want = {
    "forward_kl": (p * np.log(p / q)).sum(-1),
    "reverse_kl": (q * np.log(q / p)).sum(-1),
    "top1_agreement": p.argmax(-1) == q.argmax(-1),
    "acceptance": np.minimum(p, q).sum(-1),
    "teacher_std": teacher.std(-1),
    "student_std": student.std(-1),
  }
  for name, value in want.items():
    np.testing.assert_allclose(found[name], value, rtol=2e-5, err_msg=name)
  for row in np.ndindex(2, 5):
    top = order[row][:50]
    gold = p[row][labels[row]]
    np.testing.assert_allclose(found["unc"][row], 1 - gold, rtol=1e-5)
    np.testing.assert_allclose(
      found["student_std_top"][row], student[row][top].std(), rtol=1e-5
    )
    count = 1 + int(np.searchsorted(p[row][order[row]].cumsum(), 0.5))
    head = order[row][:count]
    gap = np.abs(p[row] - q[row])
    np.testing.assert_allclose(found["head_gap"][row], gap[head].sum(), rtol=1e-5)
    tail = gap.sum() - gap[head].sum()
    np.testing.assert_allclose(found["tail_gap"][row], tail, rtol=1e-4)
    np.testing.assert_allclose(found["head_mass"][row], q[row][head].sum(), rtol=1e-5)


def test_a_copy_agrees_everywhere(logits):
  teacher, _ = map(jnp.asarray, logits)
  found = agreement.compare(teacher, teacher, jnp.zeros((2, 5), jnp.int32))
  np.testing.assert_allclose(found["acceptance"], 1, rtol=1e-5)
  np.testing.assert_allclose(found["forward_kl"], 0, atol=1e-6)
  assert bool((found["top1_agreement"] == 1).all())


def test_the_median_splits_the_valid_tokens():
  unc = np.array([[0.1, 0.2, 0.3, 0.9], [0.4, 9.0, 9.0, 9.0]])
  mask = np.array([[1, 1, 1, 1], [1, 0, 0, 0]], bool)
  groups = agreement.difficulty(unc, mask)
  assert groups["all"].sum() == 5 and groups["hard"].sum() == 2
  assert groups["hard"][0, 3] and groups["hard"][1, 0] and groups["easy"][0, 2]
  assert not (groups["hard"] & groups["easy"]).any()
  assert ((groups["hard"] | groups["easy"]) == mask).all()


def test_the_chosen_positions_go_from_easy_to_hard():
  unc = np.linspace(0, 1, 24).reshape(2, 12)
  places = agreement.chosen_positions(unc, np.ones((2, 12), bool))
  chosen = [unc[place] for place in places]
  assert chosen == sorted(chosen) and len(set(chosen)) == 3


def test_a_perfectly_calibrated_model_has_no_error():
  confidence = np.repeat([0.25, 0.75], 400).astype(float)
  correct = np.concatenate([np.tile([1.0, 0, 0, 0], 100), np.tile([1.0, 1, 1, 0], 100)])
  assert agreement.calibration(confidence, correct)["error"] < 1e-9
  sure = agreement.calibration(np.full(800, 1.0), correct)
  assert sure["error"] == pytest.approx(0.5) and sure["bins"][0]["tokens"] == 800


def test_positions_are_those_of_the_response():
  """Chunks, batches and padding change nothing; the smaller vocabulary counts."""
  sides, params = {}, {}
  for name, size in (("teacher", 40), ("student", 32)):
    config = ModelConfig(vocab_size=size, hidden_size=16, num_layers=1, num_heads=2)
    params[name] = init(config, jax.random.key(size))
    sides[name] = Side(Decoder(config), {"params": params[name]})
  texts = [
    Example(np.arange(1, n, dtype=np.int32), p, (), "here")
    for n, p in ((9, 3), (20, 1), (6, 4))
  ]

  def function(logits, labels):
    return {name: z.argmax(-1) for name, z in logits.items()} | {"labels": labels}

  values, mask = at_positions(sides, texts, function, batch_size=2, chunk=3)
  other, _ = at_positions(sides, texts, function, batch_size=3, chunk=0)
  assert mask.sum(1).tolist() == [8 - 3, 19 - 1, 5 - 4]
  for name in values:
    assert (values[name][mask] == other[name][mask]).all()
  assert values["teacher"].max() < 32
  assert values["labels"][0][mask[0]].tolist() == [4, 5, 6, 7, 8]
