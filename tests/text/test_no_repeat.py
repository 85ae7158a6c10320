"""The ban on n tokens in a row that come a second time."""

import functools

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from okd_jax import models
from okd_jax.errors import UserError
from okd_jax.models import Decoder
from okd_jax.text import rollout
from okd_jax.text.filters import ban_repeats
from okd_jax.text.rollout import Sampling, generate
from okd_jax.text.source import decoder_source

GREEDY = Sampling(temperature=0.0)
WIDTH, VOCABULARY = 24, 5
SOURCE = rollout.Source(
  lambda batch, slots: (),
  lambda table, tokens, segment_ids, positions, state: (table[tokens[:, -1]], state),
  1000,
)
TABLE = 2 * jax.random.normal(jax.random.key(7), (12, 12))


def banned(text, n):
  """The tokens that would end n in a row that `text` has already."""
  seen = {tuple(text[i : i + n]) for i in range(len(text) - n + 1)}
  tail = tuple(text[len(text) - n + 1 :])
  return {token for token in range(VOCABULARY) if (*tail, token) in seen}


@functools.partial(jax.jit, static_argnames="n")
def ban(tokens, start, stop, n):
  logits = jnp.zeros((len(tokens), VOCABULARY))
  return jnp.isneginf(ban_repeats(logits, tokens, start, stop, n))


@settings(max_examples=150, deadline=None)
@given(
  rows=st.lists(
    st.lists(st.integers(0, VOCABULARY - 1), max_size=12), min_size=2, max_size=2
  ),
  stop=st.integers(12, WIDTH),
  n=st.integers(1, 4),
)
def test_it_bans_what_a_search_bans(rows, stop, n):
  """Whatever lies before a row's start or behind the newest token, repeats or not."""
  tokens = np.tile(np.arange(WIDTH) % 2, (len(rows), 1))
  for row, text in zip(tokens, rows, strict=True):
    row[stop - len(text) : stop] = text
  start = np.array([stop - len(text) for text in rows])
  found = ban(tokens, start, stop, n)
  for bans, text in zip(found, rows, strict=True):
    wanted = banned(text, n)
    if len(wanted) == VOCABULARY:
      wanted = set()
    assert set(np.flatnonzero(bans)) == wanted


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(), Sampling(top_p=0.9)])
def test_nothing_comes_twice(sampling):
  """In a prompt and its answer together; and without the ban something does."""
  prompts = [[0, 1, 2, 3], [5], [7, 8, 7]]
  run = functools.partial(
    generate, SOURCE, TABLE, prompts, jax.random.key(1), max_new_tokens=40
  )

  def repeats(n, completions):
    count = 0
    for prompt, completion in zip(prompts, completions, strict=True):
      text = prompt + completion.tokens.tolist()
      grams = [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]
      count += len(grams) - len(set(grams))
    return count

  for n in (2, 3):
    assert repeats(n, run(sampling=sampling)) > 0
    assert repeats(n, run(sampling=sampling, no_repeat_ngram=n)) == 0


def test_log_probabilities_are_the_models_own():
  [found] = generate(
    SOURCE,
    TABLE,
    [[1, 2]],
    jax.random.key(2),
    max_new_tokens=30,
    no_repeat_ngram=2,
    sampling=Sampling(temperature=0.7),
  )
  before = [2, *found.tokens[:-1]]
  wanted = jax.nn.log_softmax(TABLE)[np.array(before), found.tokens]
  np.testing.assert_allclose(found.logprobs, wanted, atol=1e-6)


def test_a_row_depends_on_no_other():
  """Neither on the width of its batch nor on who sits in it."""
  prompts = [[0, 1, 2, 3] * 10, [5], [7, 8, 7]]
  run = functools.partial(
    generate, SOURCE, TABLE, key=jax.random.key(1), max_new_tokens=40, no_repeat_ngram=2
  )
  together = run(prompts=prompts)
  for i, prompt in enumerate(prompts):
    [alone] = run(prompts=[prompt], rows=[i])
    assert alone.tokens.tolist() == together[i].tokens.tolist()


def test_a_negative_length_is_refused():
  with pytest.raises(UserError, match="no_repeat_ngram=-1 must be at least 0"):
    generate(
      SOURCE, TABLE, [[1]], jax.random.key(0), max_new_tokens=2, no_repeat_ngram=-1
    )


@pytest.mark.filterwarnings("ignore")  # transformers' own
@pytest.mark.parametrize("n", [1, 2, 4])
def test_equals_transformers(n, tmp_path):
  torch = pytest.importorskip("torch")
  _, config = families.save("llama_gqa", tmp_path / "model")
  theirs, ours = (
    families.torch_model(tmp_path / "model"),
    models.load(tmp_path / "model"),
  )
  source = decoder_source(Decoder(ours.config))
  for prompt in ([3, 4, 3, 4, 3], [9]):
    with torch.no_grad():
      wanted = theirs.generate(
        torch.tensor([prompt]),
        max_new_tokens=min(60, config.vocab_size - 10),
        do_sample=False,
        no_repeat_ngram_size=n,
        eos_token_id=-1,
        pad_token_id=0,
      )
    [found] = generate(
      source,
      {"params": ours.params},
      [prompt],
      jax.random.key(0),
      max_new_tokens=min(60, config.vocab_size - 10),
      sampling=GREEDY,
      no_repeat_ngram=n,
    )
    assert found.tokens.tolist() == wanted[0, len(prompt) :].tolist()
