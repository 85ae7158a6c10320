"""Text that two models write together: mixtures and interleaving."""

import functools

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from okd_jax.models import Decoder
from okd_jax.text.pairs import (
  Interleaved,
  Mixed,
  draw_interleaved,
  draw_mixed,
  pair_source,
)
from okd_jax.text.rollout import Sampling, generate
from okd_jax.text.source import decoder_source

KEY, GREEDY = jax.random.key(0), Sampling(0.0)
CONFIG = families.CONFIGS["llama_gqa"]


@pytest.fixture(scope="module")
def pair():
  """(one decoder's source, the pair of it with itself, variables of both)."""
  single = decoder_source(Decoder(CONFIG))
  params = [jax.tree.map(jnp.asarray, families.params(CONFIG, seed)) for seed in (0, 1)]
  return single, pair_source(single, single), tuple({"params": p} for p in params)


def texts(source, variables, sampling, **more):
  rng = np.random.default_rng(0)
  prompts = [rng.integers(0, CONFIG.vocab_size, n) for n in (4, 9)]
  found = generate(
    source,
    variables,
    prompts,
    KEY,
    max_new_tokens=20,
    sampling=sampling,
    **more,
  )
  return [row.tokens.tolist() for row in found]


def test_the_same_pair_is_the_same_source(pair):
  """Or every step would compile its program anew."""
  single, both, _ = pair
  assert pair_source(single, single) is both


@pytest.mark.parametrize("weight, who", [(0.0, 0), (1.0, 1)])
def test_a_mixture_of_one_is_that_one(pair, weight, who):
  """METHODS 4.4: the teacher's share, not the student's."""
  single, both, variables = pair
  settings = Mixed(Sampling(0.8), np.float32(weight))
  mixed = texts(both, variables, settings, choose=draw_mixed)
  assert mixed == texts(single, variables[who], Sampling(0.8))


def test_mixture_frequencies_and_log_probabilities():
  """Guards G2: drawn from a p + (1 - a) q, whatever the temperature reports."""
  q, p = np.array([0.7, 0.2, 0.1]), np.array([0.1, 0.3, 0.6])
  want = 0.25 * p + 0.75 * q
  keys = jax.random.split(KEY, 20000)
  logits = tuple(
    jnp.broadcast_to(jnp.log(x).astype(jnp.float32), (20000, 3)) for x in (q, p)
  )
  tokens, logprobs = draw_mixed(keys, logits, Mixed(Sampling(), jnp.float32(0.25)))
  found = np.bincount(tokens, minlength=3) / 20000
  np.testing.assert_allclose(found, want, atol=0.015)
  np.testing.assert_allclose(logprobs, np.log(want)[np.asarray(tokens)], rtol=1e-5)


@pytest.mark.parametrize("top, who", [(CONFIG.vocab_size, 0), (1, 1)])
def test_interleaving_at_its_ends(pair, top, who):
  """METHODS 4.7: K = V keeps every student token, K = 1 the teacher's first choice."""
  single, both, variables = pair
  settings = Interleaved(Sampling(), GREEDY, np.int32(top))
  mixed = texts(both, variables, settings, choose=draw_interleaved)
  alone = texts(single, variables[who], GREEDY if who else Sampling())
  assert mixed == alone


def test_interleaving_ranks_before_the_teachers_warping():
  """METHODS 4.7: top_p would leave the teacher one token and refuse the second."""
  student = jnp.array([[0.0, 10.0, 0.0]])
  teacher = jnp.log(jnp.array([[0.6, 0.3, 0.1]]))
  draw = functools.partial(draw_interleaved, jax.random.split(KEY, 1))
  strict = Sampling(0.2, 0, 0.5)
  for top, token in ((1, 0), (2, 1)):
    found, logprob = draw((student, teacher), Interleaved(GREEDY, strict, top))
    assert found.tolist() == [token]
    own = student if token == 1 else teacher
    want = jax.nn.log_softmax(own)[0, token]
    np.testing.assert_allclose(logprob[0], want, atol=1e-6)


def test_vocabularies_padded_differently():
  """Guards E1: ids beyond the shorter vocabulary are never drawn."""
  source = decoder_source(Decoder(CONFIG))

  def wide(variables, *arguments):
    logits, state = source.apply(variables, *arguments)
    return jnp.pad(logits, ((0, 0), (0, 5)), constant_values=50.0), state

  both = pair_source(source, source._replace(apply=wide))
  params = {"params": jax.tree.map(jnp.asarray, families.params(CONFIG, 0))}
  settings = Mixed(Sampling(), np.float32(0.5))
  drawn = texts(both, (params, params), settings, choose=draw_mixed)
  assert max(map(max, drawn)) < CONFIG.vocab_size
