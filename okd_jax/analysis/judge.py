"""How a student's own text looks to a model that neither taught it nor saw its data."""

from collections.abc import Sequence

import jax

from okd_jax import losses
from okd_jax.analysis.exposure_bias import continued
from okd_jax.analysis.positions import at_positions
from okd_jax.data import Example
from okd_jax.errors import UserError
from okd_jax.text.source import Side


def judged(
  judge: Side,
  student: Side,
  prompts: Sequence[Example],
  *,
  eos_ids: Sequence[int],
  length: int,
  seed: int = 0,
  batch_size: int = 32,
) -> dict[str, float]:
  """KL(q || judge) per token of texts that the student q draws at temperature 1.

  The expectation over the next token is exact, that over the text one continuation of
  `length` tokens a prompt. Less is better; a copy of the judge has 0.

  Returns:
    {'kl': the mean over tokens in nats, 'cross_entropy': of the judge on these texts,
    'tokens': how many they are}.

  Raises:
    UserError: if no text has a prompt.
  """
  prompts = [example for example in prompts if example.prompt_length]
  if not prompts:
    raise UserError("a judge reads answers to prompts, and no row has a prompt")
  texts = continued(student, prompts, eos_ids, length, jax.random.key(seed), batch_size)
  values, mask = at_positions(
    {"judge": judge, "student": student},
    texts,
    lambda logits, labels: {
      "kl": losses.forward_kl(logits["student"], logits["judge"]),
      "cross_entropy": losses.cross_entropy(logits["judge"], labels),
    },
    batch_size=batch_size,
  )
  means = {name: float(value[mask].mean()) for name, value in values.items()}
  return means | {"tokens": int(mask.sum())}
