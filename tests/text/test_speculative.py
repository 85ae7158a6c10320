"""Speculative decoding: the large model's text, and drafts kept as often as said."""

import dataclasses
import itertools

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from okd_jax import models
from okd_jax.errors import UserError
from okd_jax.models import Decoder, ModelConfig
from okd_jax.text import rollout, speculative
from okd_jax.text.rollout import Sampling
from okd_jax.text.source import decoder_source
from okd_jax.text.speculative import Side

GREEDY = Sampling(temperature=0.0)
KEY = jax.random.key(3)


def side(config, seed=0, sharp=4.0):
  """A model at random whose choices are clear, `sharp` times as far apart."""
  params = families.params(config, seed)
  params["norm"]["scale"] = sharp * params["norm"]["scale"]
  return Side(Decoder(config), {"params": params})


def noisy(model, noise):
  """The same model, its weights disturbed: a draft that is often right."""
  leaves, tree = jax.tree.flatten(model.variables)
  random = np.random.default_rng(0)
  moved = [x + noise * random.normal(size=x.shape).astype(np.float32) for x in leaves]
  return model._replace(variables=jax.tree.unflatten(tree, moved))


def plain(model, prompt, limit, eos_ids=()):
  [found] = rollout.generate(
    decoder_source(model.decoder),
    model.variables,
    [prompt],
    KEY,
    max_new_tokens=limit,
    sampling=GREEDY,
    eos_ids=eos_ids,
  )
  return found.tokens.tolist()


@pytest.mark.parametrize(
  "name", ["gpt2", pytest.param("llama_gqa", marks=pytest.mark.slow)]
)
def test_greedy_text_is_the_large_models(name):
  config = families.CONFIGS[name]
  model = side(config)
  prompt = [5, 9, 2, 11, 7]
  alone = plain(model, prompt, 40)
  kept = []
  for draft in (model, noisy(model, 0.02), side(config, seed=1)):
    for draft_tokens in (1, 4):
      found = speculative.generate(
        model,
        draft,
        prompt,
        KEY,
        max_new_tokens=40,
        sampling=GREEDY,
        draft_tokens=draft_tokens,
      )
      assert found.tokens.tolist() == alone
      assert found.expected == found.kept  # greedy: a draft is right or wrong
      kept.append((found.kept, found.judged, found.passes))
  copy, close, other = kept[1::2]  # with drafts of 4
  assert copy == (32, 32, 8)  # 5 tokens a pass
  assert copy[2] < close[2] < 40 and 0 < close[0] < close[1]
  assert other[2] <= 40


@pytest.mark.slow
def test_prompts_of_any_length_and_texts_that_end():
  config = families.CONFIGS["llama_gqa"]
  model = side(config)
  draft = noisy(model, 0.02)
  for length in (1, 2, 31, 32, 33):
    prompt = (np.arange(length) * 7 % 60 + 1).tolist()
    alone = plain(model, prompt, 12)
    end = alone[4]
    cut = alone[: alone.index(end) + 1]
    for eos_ids, right in (((), alone), ((end, 66), cut)):
      found = speculative.generate(
        model,
        draft,
        prompt,
        KEY,
        max_new_tokens=12,
        sampling=GREEDY,
        eos_ids=eos_ids,
        draft_tokens=3,
      )
      assert found.tokens.tolist() == right


@pytest.mark.slow
def test_a_text_may_fill_the_context():
  """Positions beyond it are read while drafting, and must not spoil what is kept."""
  config = dataclasses.replace(families.CONFIGS["gpt2"], max_length=20)
  model = side(config)
  found = speculative.generate(
    model, model, [4, 5, 6], KEY, max_new_tokens=17, sampling=GREEDY, draft_tokens=7
  )
  assert found.tokens.tolist() == plain(model, [4, 5, 6], 17)


TINY = ModelConfig(vocab_size=5, hidden_size=8, num_layers=1, num_heads=2, mlp_size=8)
SAMPLINGS = {
  "as it is": Sampling(1.0),
  "filtered": Sampling(1.5, 4, 0.9),
}


COUNT = 2000


@jax.jit
def _texts(sampling, variables):
  """COUNT texts of 3 tokens from one prompt, in one program."""

  def one(key):
    decoder = Decoder(TINY)
    loop = speculative.speculate(
      (decoder, decoder),
      variables,
      jnp.array([0, 0, 1, 3]),
      jnp.int32(2),
      key,
      sampling,
      jnp.zeros(0, jnp.int32),
      max_new_tokens=3,
      draft_tokens=2,
    )
    return loop.tokens[:3], loop.judged, loop.kept, loop.expected

  return jax.vmap(one)(jax.random.split(KEY, COUNT))


def texts(sampling, model, draft):
  variables = (model.variables, draft.variables)
  return jax.device_get(_texts(rollout.traced(sampling), variables))


def probabilities(sampling, model, limit=3):
  """Of every text of `limit` tokens after the prompt, by the model alone."""
  every = list(itertools.product(range(TINY.vocab_size), repeat=limit))
  rows = jnp.array([(1, 3, *text) for text in every])
  hidden, _ = model.decoder.apply(model.variables, rows)
  logits = models.unembed(hidden, models.head_kernel(model.variables["params"], TINY))
  warped = rollout.warp(logits[:, 1:-1].reshape(-1, 5), rollout.traced(sampling))
  p = np.asarray(jax.nn.softmax(warped)).reshape(len(every), limit, 5)
  return {
    text: float(np.prod([own[i, token] for i, token in enumerate(text)]))
    for text, own in zip(every, p, strict=True)
  }


@pytest.mark.parametrize(
  "name", ["as it is", pytest.param("filtered", marks=pytest.mark.slow)]
)
def test_texts_are_distributed_as_the_large_models(name):
  """Pearson's test of the texts against the product of the model's probabilities."""
  sampling, count = SAMPLINGS[name], COUNT
  model, draft = side(TINY, sharp=3.0), side(TINY, seed=1, sharp=3.0)
  drawn, *_ = texts(sampling, model, draft)
  expected = probabilities(sampling, model)
  assert sum(expected.values()) == pytest.approx(1, abs=1e-5)
  seen = {text: 0 for text in expected}
  for text in map(tuple, drawn.tolist()):
    seen[text] += 1
  assert not any(n for text, n in seen.items() if expected[text] < 1e-9)
  likely = [text for text, p in expected.items() if p * count >= 5]
  o = [seen[t] for t in likely]
  e = [expected[t] * count for t in likely]
  o, e = [*o, count - sum(o)], [*e, count - sum(e)]
  if e[-1] < 1e-6:
    o, e = o[:-1], np.array(e[:-1]) * sum(o[:-1]) / sum(e[:-1])
  assert scipy.stats.chisquare(o, e).pvalue > 1e-3
  # The draft is another distribution: the same test must tell them apart.
  other = probabilities(sampling, draft)
  wrong = [max(other[t], 1e-9) * count for t in likely]
  wrong = np.array(wrong) * sum(o[: len(wrong)]) / sum(wrong)
  assert scipy.stats.chisquare(o[: len(wrong)], wrong).pvalue < 1e-6


def test_drafts_are_kept_as_often_as_their_distributions_say():
  model, draft = side(TINY, sharp=3.0), side(TINY, seed=1, sharp=3.0)
  _, judged, kept, expected = texts(Sampling(1.0), model, draft)
  share = expected.sum() / judged.sum()
  assert 0.2 < share < 0.9
  error = np.sqrt(share * (1 - share) / judged.sum())
  assert abs(kept.sum() / judged.sum() - share) < 4 * error
  whole = texts(Sampling(1.0), model, model)
  assert (whole[1] == whole[2]).all()  # p = q: nothing is ever rejected


@pytest.mark.parametrize("size", [pytest.param(40, marks=pytest.mark.slow), 80])
def test_vocabularies_may_be_padded_differently(size):
  config = families.CONFIGS["llama_gqa"]
  model = side(config)
  draft = side(dataclasses.replace(config, vocab_size=size), seed=1)
  found = speculative.generate(
    model, draft, [5, 9, 2], KEY, max_new_tokens=10, sampling=GREEDY
  )
  assert found.tokens.tolist() == plain(model, [5, 9, 2], 10)


def test_what_cannot_be_generated_is_told():
  model = side(TINY)
  short = side(dataclasses.replace(TINY, max_length=8))
  with pytest.raises(UserError, match="the prompt is empty"):
    speculative.generate(model, model, [], KEY, max_new_tokens=2)
  with pytest.raises(UserError, match="take at most 8"):
    speculative.generate(model, short, [1, 2], KEY, max_new_tokens=7)
  with pytest.raises(UserError, match="a token to draft"):
    speculative.generate(model, model, [1], KEY, max_new_tokens=2, draft_tokens=0)
