"""The arithmetic of a step, against counts made by hand."""

import pytest

from okd_jax.bench import flops
from okd_jax.methods.base import TokenWeight
from okd_jax.models import ModelConfig

LLAMA = ModelConfig(
  vocab_size=100,
  hidden_size=8,
  num_layers=3,
  num_heads=4,
  num_kv_heads=2,
  mlp_size=16,
)
GPT = ModelConfig(
  vocab_size=100, hidden_size=4, num_layers=2, num_heads=2, gated_mlp=False
)
TOKENS, LENGTH = 10, 5
# A layer: query and out 8x8, key and value 8x4, three of the MLP 8x16.
LAYER = 2 * TOKENS * (2 * 64 + 2 * 32 + 3 * 128)
ATTENTION = 4 * TOKENS * LENGTH * 8
SMALL = 2 * TOKENS * (4 * 16 + 2 * 4 * GPT.mlp_size) + 4 * TOKENS * LENGTH * 4


def head(size):
  return 2 * TOKENS * 100 * size


def test_alone():
  assert flops.step(GPT, None, TOKENS, LENGTH) == {
    "student": 3 * 2 * SMALL,
    "heads": 3 * head(4),
  }


@pytest.mark.parametrize("layers", [1, 3])
def test_modules_in_the_top_layers(layers):
  """The backward pass stops there: no weight's gradient, both sides of attention."""
  assert flops.step(
    GPT, LLAMA, TOKENS, LENGTH, adapted_layers=layers, module_size=7
  ) == pytest.approx(
    {
      "student": 3 * 2 * SMALL,
      "teacher forward": 3 * (LAYER + ATTENTION),
      "teacher backward": layers * (LAYER + 2 * ATTENTION),
      "modules": 6 * 7 * TOKENS,
      "heads": 3 * head(4) + 2 * head(8),
    }
  )


@pytest.mark.parametrize(
  ("weight", "gate", "heads"),
  [
    # Scored by both heads; a fifth of the tokens in the loss, in taught rows half.
    ("top:0.2", "top:0.5", 12 + 0.2 * 20 + 0.5 * (12 + 0.3 * 20 + 0.5 * 8)),
    # The teacher's entropy takes its own head; the student's loss has all tokens.
    ("entropy", "top:0.1", 8 + 20 + 0.5 * (12 + 8)),
    ("", "divergence", 20 + 0.5 * (12 + 8)),
  ],
)
def test_weighed_tokens(weight, gate, heads):
  """In units of a head of one channel; half of the rows teach the modules."""
  parts = flops.step(
    GPT,
    LLAMA,
    TOKENS,
    LENGTH,
    adapted_layers=1,
    taught=0.5,
    token_weight=TokenWeight.read("method.token_weight", weight),
    module_tokens=TokenWeight.read("adapter.tokens", gate),
  )
  assert parts["heads"] == pytest.approx(heads * head(1))


def test_a_frozen_teacher_runs_forwards_only():
  parts = flops.step(GPT, LLAMA, TOKENS, LENGTH)
  assert "teacher backward" not in parts
  assert parts["heads"] == 3 * head(4) + head(8)


def test_a_student_that_is_trained_in_part():
  """Backwards through its top layer alone, to a LoRA of 5 numbers and 30 kernels'."""
  in_part = flops.InPart(layers=1, kernels=30, modules=5, head=False)
  attention = 4 * TOKENS * LENGTH * 4
  assert flops.step(GPT, None, TOKENS, LENGTH, in_part=in_part) == {
    "student": 2 * SMALL + (SMALL + attention) + 2 * TOKENS * (30 + 3 * 5),
    "heads": 2 * head(4),
  }


def test_all_in_part_is_all():
  """A part that is everything costs what the whole student costs."""
  kernels = 2 * (4 * 16 + 2 * 4 * GPT.mlp_size)
  whole = flops.InPart(layers=2, kernels=kernels, modules=0, head=True)
  steps = [flops.step(GPT, LLAMA, TOKENS, LENGTH, in_part=x) for x in (whole, None)]
  assert steps[0] == pytest.approx(steps[1])
