"""Text in parts, up to what stops it."""

import functools

import families
import jax
import numpy as np
import pytest

from okd_jax.models import Decoder
from okd_jax.text import rollout
from okd_jax.text.rollout import Completion, Sampling
from okd_jax.text.source import decoder_source
from okd_jax.text.until import _parts, generate_until

END = ord("z") + 1


def alphabet(prompts, *, key, rows, max_new_tokens, batch_size):
  """As `rollout.generate`: goes on with the alphabet, and from its end with a again."""
  assert len(prompts) <= batch_size
  for prompt in prompts:
    new, ended = [], False
    while len(new) < max_new_tokens and not ended:
      last = [*prompt.tolist(), *new][-1]
      new.append(ord("a") if last == END else last + 1)
      ended = new[-1] in alphabet.ends
    yield Completion(np.array(new, np.int32), np.zeros(len(new)), ended)


alphabet.ends = ()


def dice(prompts, *, key, rows, max_new_tokens, batch_size):
  """Draws from the key, the row and the place within a part, whatever the prompt."""
  for row in rows:
    own = jax.random.fold_in(key, row)
    tokens = np.asarray(jax.random.randint(own, (max_new_tokens,), 0, 1000))
    yield Completion(tokens, np.zeros(max_new_tokens), False)


def write(generate, prompts, *, seed=0, stopped=lambda tokens: False, **options):
  return generate_until(
    lambda *args, **kwargs: list(generate(*args, **kwargs)),
    [list(prompt.encode()) for prompt in prompts],
    jax.random.key(seed),
    stopped=stopped,
    **{"rows": range(len(prompts)), "max_new_tokens": 40, "batch_size": 2, **options},
  )


def test_parts_double():
  assert list(_parts(250)) == [(0, 32), (32, 64), (96, 128), (224, 26)]
  assert list(_parts(20)) == [(0, 20)]


@pytest.mark.slow
def test_greedy_parts_are_the_whole():
  """A text that no string stops is what one loop would have written."""
  config = families.CONFIGS["gpt2_untied"]
  source, variables = (
    decoder_source(Decoder(config)),
    {"params": families.params(config)},
  )
  settings = {"sampling": Sampling(temperature=0.0)}
  write = functools.partial(rollout.generate, source, variables, **settings)
  prompts, key = [[5, 6], [7, 8, 9]], jax.random.key(0)
  rows = generate_until(
    write, prompts, key, stopped=lambda _: False, max_new_tokens=36, rows=range(2)
  )
  for row, whole in zip(rows, write(prompts, key, max_new_tokens=36), strict=True):
    np.testing.assert_array_equal(row, whole.tokens)


def test_each_text_ends_at_its_own_stop_or_end(monkeypatch):
  done = []
  letters = functools.partial(write, alphabet, ["a", "y", "t"], progress=done.append)
  # What stops a text in a part is cut by who knows how.
  found = letters(stopped=lambda tokens: ord("b") in tokens)
  assert [len(row) for row in found] == [32, 32, 32]
  found = letters(stopped=lambda tokens: len(tokens) > 32 or END + 1 in tokens)
  assert [chr(row[-1]) for row in found] == list("nkf") and len(found[0]) == 40
  monkeypatch.setattr(alphabet, "ends", (END,))
  found = letters()
  assert [row.tolist() for row in found] == [
    list(range(ord(first), END + 1)) for first in "bzu"
  ]
  assert sum(done) == 3 * 3 * 40


def test_draws_depend_on_the_row_the_part_and_the_seed_alone():
  two = write(dice, ["same", "same", "long other"])
  for row, alone in zip(
    two, write(dice, ["same", "same", "x"], batch_size=1), strict=True
  ):
    np.testing.assert_array_equal(row, alone)
  assert two[0].tolist() != two[1].tolist()
  assert two[0][32:].tolist() != two[0][:8].tolist()
  [moved] = write(dice, ["same"], rows=[1])
  np.testing.assert_array_equal(moved, two[1])
  [other] = write(dice, ["same"], seed=1)
  assert other.tolist() != two[0].tolist()


def test_no_prompts():
  assert write(alphabet, []) == []
