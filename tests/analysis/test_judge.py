"""What a judge thinks of a student's own text: by enumeration, and where it is 0."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from okd_jax.analysis.judge import judged
from okd_jax.data import Example
from okd_jax.errors import UserError
from okd_jax.models import Decoder, ModelConfig, head_kernel, init, unembed
from okd_jax.text.source import Side

CONFIG = ModelConfig(
  vocab_size=3, hidden_size=8, num_layers=1, num_heads=2, tie_embeddings=False
)
LENGTH = 2
PROMPTS = [Example(np.array([1, 2], np.int32), 2, (), f"row {i}") for i in range(1500)]


def side(seed):
  params = init(CONFIG, jax.random.key(seed))
  params["norm"]["scale"] *= 30.0  # opinions
  return Side(Decoder(CONFIG), {"params": params})


def log_probs(model, row):
  hidden, _ = model.decoder.apply(model.variables, jnp.array([row]))
  logits = unembed(hidden[0], head_kernel(model.variables["params"], CONFIG))
  return np.asarray(jax.nn.log_softmax(logits), np.float64)


def test_by_enumeration():
  """The mean over all texts, as often as the student writes each."""
  student, judge = side(0), side(1)
  total = 0.0
  for text in itertools.product(range(3), repeat=LENGTH):
    q, j = (log_probs(m, [1, 2, *text])[1:-1] for m in (student, judge))
    weight = np.exp(sum(q[i, token] for i, token in enumerate(text)))
    total += weight * (np.exp(q) * (q - j)).sum(-1).mean()
  found = judged(judge, student, PROMPTS, eos_ids=(), length=LENGTH, batch_size=500)
  assert found["tokens"] == LENGTH * len(PROMPTS)
  assert total > 0.05
  np.testing.assert_allclose(found["kl"], total, rtol=0.1)
  same = judged(student, student, PROMPTS[:8], eos_ids=(), length=LENGTH)
  assert abs(same["kl"]) < 1e-6


def test_rows_without_a_prompt():
  rows = [Example(np.array([1, 2], np.int32), 0, (), "row 0")]
  with pytest.raises(UserError, match="no row has a prompt"):
    judged(side(0), side(0), rows, eos_ids=(), length=LENGTH)
