"""ExAccErr against its definition, by hand, by enumeration and by real models."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from okd_jax.analysis import exposure_bias
from okd_jax.analysis.exposure_bias import Errors, excess, interval, measure
from okd_jax.data import Example
from okd_jax.errors import UserError
from okd_jax.models import Decoder, ModelConfig, init
from okd_jax.text.source import Side

TOKENS, LENGTH = 3, 3
SHARPNESS = 40.0  # of logits that begin near 0


def toy(seed):
  """A table of next-token probabilities by what stands before: text -> [3]."""
  generator = np.random.default_rng(seed)
  texts = [t for n in range(LENGTH) for t in itertools.product(range(TOKENS), repeat=n)]
  return {text: generator.dirichlet(np.ones(TOKENS)) for text in texts}


def kl(p, q):
  return float((p * np.log(p / q)).sum())


def probability(model, text):
  return float(np.prod([model[text[:i]][text[i]] for i in range(len(text))]))


def by_definition(p, q):
  """ExAccErr(l), l = 1 … 3: sums over all texts before each token."""
  totals = []
  for writer in (q, p):
    steps = [
      sum(
        probability(writer, before) * kl(p[before], q[before])
        for before in itertools.product(range(TOKENS), repeat=t)
      )
      for t in range(LENGTH)
    ]
    totals.append(np.cumsum(steps))
  r, e = totals
  return 100 * (r - e) / e


def test_the_estimator_is_the_definition_where_all_texts_are_drawn():
  """On a toy of 3 tokens and length 3: every text, as often as it is written."""
  p, q = toy(0), toy(1)
  texts = list(itertools.product(range(TOKENS), repeat=LENGTH))
  errors = Errors(
    np.array([[kl(p[t[:i]], q[t[:i]]) for i in range(LENGTH)] for t in texts]),
    np.ones((len(texts), LENGTH), bool),
  )
  weights = [np.array([probability(m, t) for t in texts]) for m in (q, p)]
  found = excess(errors, errors, *weights)
  np.testing.assert_allclose(found, by_definition(p, q), rtol=1e-12, atol=1e-12)
  assert abs(found[0]) < 1e-10 and abs(found[-1]) > 1  # the first token has no past


def test_rows_that_have_ended_no_longer_count():
  own = Errors(np.array([[1.0, 3.0], [2.0, 99.0]]), np.array([[1, 1], [1, 0]], bool))
  theirs = Errors(np.array([[1.0, 1.0], [1.0, 1.0]]), np.ones((2, 2), bool))
  np.testing.assert_allclose(own.cumulated(np.ones(2)), [1.5, 4.5])
  np.testing.assert_allclose(excess(own, theirs), [50.0, 125.0])
  none = Errors(np.array([[1.0, 5.0]]), np.array([[1, 0]], bool))
  np.testing.assert_allclose(none.cumulated(np.ones(1)), [1.0, 1.0])


def test_two_equal_models_have_no_ratio():
  zero = Errors(np.zeros((2, 2)), np.ones((2, 2), bool))
  assert np.isnan(excess(zero, zero)).all()


@pytest.fixture(scope="module")
def pair():
  """Two real decoders over three tokens, and their tables by text."""
  config = ModelConfig(
    vocab_size=TOKENS,
    hidden_size=8,
    num_layers=1,
    num_heads=2,
    tie_embeddings=False,  # tied ones repeat the last token
  )
  sides, tables = {}, {}
  for seed, name in enumerate(("teacher", "student")):
    params = init(config, jax.random.key(seed))
    params["embed"]["embedding"] *= 50.0  # or what stands before hardly matters
    params["head"] *= SHARPNESS
    decoder = Decoder(config)
    sides[name] = Side(decoder, {"params": params})
    table = {}
    for text in toy(0):
      tokens = jnp.array([[0, *text]])
      hidden, _ = decoder.apply({"params": params}, tokens)
      logits = hidden[0, -1] @ params["head"].T
      exact = np.exp(np.asarray(logits, np.float64))
      table[text] = exact / exact.sum()
    tables[name] = table
  return sides, tables


def test_real_models_agree_with_enumeration(pair):
  """Position, expectation and weights: LMOps begins one token late."""
  sides, tables = pair
  prompt = Example(np.array([0], np.int32), 1, (), "here")
  prompts = [prompt] * 3000
  found = measure(
    sides["teacher"],
    sides["student"],
    prompts,
    eos_ids=[],
    length=LENGTH,
    batch_size=500,
  )
  want = by_definition(tables["teacher"], tables["student"])
  assert abs(want[-1]) > 5
  assert abs(found["excess"] - want[-1]) < 4 * found["std"] + 1e-6
  assert found["std"] < abs(want[-1])  # or this would show nothing
  assert found["low"] < found["excess"] < found["high"]
  first = kl(tables["teacher"][()], tables["student"][()])
  assert found["curve"]["own"][0] == pytest.approx(first, rel=1e-5)
  assert found["curve"]["teachers"][0] == pytest.approx(first, rel=1e-5)


def test_the_interval_shrinks_with_the_prompts():
  generator = np.random.default_rng(0)

  def errors(count, mean):
    kl = generator.gamma(2.0, mean / 2, (count, 4))
    return Errors(kl, np.ones(kl.shape, bool))

  few, many = (
    interval(errors(n, 1.2), errors(n, 1.0), seed=1)[0][-1] for n in (40, 4000)
  )
  assert many < few / 5


def test_prompts_are_needed(pair):
  sides, _ = pair
  text = Example(np.array([0, 1], np.int32), 0, (), "here")
  with pytest.raises(UserError, match="at least two rows with a prompt"):
    measure(sides["teacher"], sides["student"], [text] * 3, eos_ids=[])


def test_the_same_seed_gives_the_same(pair):
  sides, _ = pair
  prompts = [Example(np.array([0, i % 3], np.int32), 2, (), "here") for i in range(6)]
  both = [
    exposure_bias.measure(
      *(sides[n] for n in ("teacher", "student")), prompts, eos_ids=[]
    )
    for _ in range(2)
  ]
  assert both[0] == both[1]
