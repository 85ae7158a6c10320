"""Log-likelihoods of continuations: their values, and which texts are read for them."""

import functools

import families
import jax
import numpy as np
import pytest

from okd_jax.errors import UserError
from okd_jax.evaluation import continuations
from okd_jax.evaluation.continuations import log_likelihoods
from okd_jax.losses import log_probs
from okd_jax.models import Decoder, Model

PLAIN, CAPPED = "llama_gqa", "gemma2"  # with a soft cap of its logits, with windows
VOCABULARY = 67
ROWS = [row.tolist() for row in families.tokens(families.CONFIGS[PLAIN], 5, 40)]


def likelihoods(pairs, name=PLAIN, **options):
  config = families.CONFIGS[name]
  variables = {"params": families.params(config)}
  return log_likelihoods(Decoder(config), variables, pairs, **options)


@functools.partial(jax.jit, static_argnames="name")
def table_of(tokens, name):
  config = families.CONFIGS[name]
  params = families.params(config)
  return log_probs(Model(config, params).logits(params, tokens[None])[0])


def padded(tokens):
  """As one program reads them; what comes behind changes nothing before."""
  return np.pad(np.array(tokens, np.int32), (0, 48 - len(tokens)))


def expected(context, continuation, name=PLAIN):
  """Token by token, of the logits of the whole text."""
  tokens = np.array([*context, *continuation], np.int32)
  table = np.asarray(table_of(padded(tokens), name))[len(context) - 1 : len(tokens) - 1]
  taken = np.take_along_axis(table, tokens[len(context) :, None], axis=1)
  return float(taken.sum()), bool((table.argmax(-1) == tokens[len(context) :]).all())


def greedy(context, count, name):
  tokens = list(context)
  for _ in range(count):
    tokens.append(int(table_of(padded(tokens), name)[len(tokens) - 1].argmax()))
  return tokens[len(context) :]


@pytest.mark.parametrize("name", [PLAIN, CAPPED])
def test_values_and_flags_of_pairs_of_all_lengths(name):
  likely = greedy(ROWS[0][:5], 3, name)
  other = [*likely[:2], (likely[2] + 1) % VOCABULARY]
  cuts = [(1, 2), (7, 11), (30, 40), (3, 40), (9, 11)]
  pairs = [(row[:n], row[n:k]) for row, (n, k) in zip(ROWS, cuts, strict=True)]
  unlikely = [(likely[0] + 1) % VOCABULARY]
  unlikely += greedy([*ROWS[0][:5], *unlikely], 2, name)  # but for its first token
  pairs += [(ROWS[0][:5], tokens) for tokens in (likely, other, unlikely)]
  found = likelihoods(pairs, name, batch_size=3)
  for (value, flag), pair in zip(found, pairs, strict=True):
    assert (pytest.approx(value, abs=1e-4), flag) == expected(*pair, name)
  assert [flag for _, flag in found[-3:]] == [True, False, False]


def test_too_long_a_pair_loses_the_start_of_its_context():
  context, continuation = ROWS[1][:30], ROWS[1][30:]
  [found] = likelihoods([(context, continuation)], max_length=16)
  assert found == pytest.approx(expected(context[-7:], continuation), abs=1e-4)
  # All that the model reads is the continuation but for its last token.
  [found] = likelihoods([(context, continuation)], max_length=10)
  assert found == pytest.approx(expected(context[-1:], continuation), abs=1e-4)


def test_pairs_that_differ_in_the_last_token_are_read_once(monkeypatch):
  shapes, score = [], continuations._scores

  def counted(decoder, variables, tokens, lengths, **options):
    shapes.append(lengths[lengths > 0].tolist())
    return score(decoder, variables, tokens, lengths, **options)

  monkeypatch.setattr(continuations, "_scores", counted)
  choices = [(ROWS[2][:20], [token]) for token in (4, 5, 6, 4)]
  choices += [(ROWS[2][:18], [*ROWS[2][18:20], 5]), (ROWS[3][:6], ROWS[3][6:8])]
  done = []
  found = likelihoods(choices, progress=done.append)
  assert shapes == [[20, 7]]
  assert sum(done) == len(choices)
  assert found[0] == found[3]
  for (value, _), pair in zip(found, choices, strict=True):
    assert value == pytest.approx(expected(*pair)[0], abs=1e-4)


def test_nothing_is_certain():
  done = []
  found = likelihoods([(ROWS[0][:3], []), (ROWS[0][:3], [1])], progress=done.append)
  assert found[0] == (0.0, True) and found[1][0] < 0
  assert sum(done) == 2
  assert likelihoods([]) == []


def test_what_cannot_be_read():
  with pytest.raises(UserError, match="context has no tokens"):
    likelihoods([([], [1])])
  with pytest.raises(UserError, match="continuation has 9 tokens, .* only 8"):
    likelihoods([([1], [2] * 9)], max_length=8)
