"""Answers to twenty-one short prompts, for the tests of files of answers."""

import jax
import numpy as np
from alphabet import EOS, alphabet_model, alphabet_tokenizer

from okd_jax import models
from okd_jax.data import Record
from okd_jax.models import Decoder
from okd_jax.text import answers_file
from okd_jax.text.answers_beforehand import answer_prompts
from okd_jax.text.rollout import Sampling
from okd_jax.text.source import decoder_source


def random_model(seed=0):
  """(decoder, variables, tokenizer) of a model that draws bytes, some of them ends."""
  tokenizer = alphabet_tokenizer()
  config = models.preset(
    "llama",
    vocab_size=len(tokenizer),
    hidden_size=16,
    num_layers=2,
    num_heads=2,
    max_length=64,
    eos_ids=(EOS, *range(32)),
  )
  return (
    Decoder(config),
    {"params": models.init(config, jax.random.key(seed))},
    tokenizer,
  )


def alphabet():
  """(decoder, variables, tokenizer) of the model that goes on with the alphabet."""
  params, config = alphabet_model()
  return Decoder(config), {"params": params}, alphabet_tokenizer()


def ask(prompt, where="f:1"):
  return Record("completion", where, prompt=prompt, references=("old",))


PROMPTS = [ask("ab" * (i % 5 + 1), f"f:{i + 1}") for i in range(21)]


def write(path, records=PROMPTS, model=None, **options):
  """The bytes of the file; rows are written eight at a time."""
  decoder, variables, tokenizer = model or random_model()
  options = {"max_new_tokens": 12, "batch_size": 2} | options
  answers_file.write_samples(decoder, variables, records, tokenizer, path, **options)
  return path.read_bytes()


def say(path, prompts=None, model=None, **options):
  """The answers' tokens, by the same model; prompts are bytes."""
  decoder, variables, *_ = model or random_model()
  prompts = [x.prompt.encode() for x in PROMPTS] if prompts is None else prompts
  tokens = [np.array(list(x), np.int32) for x in prompts]
  defaults = {"key": jax.random.key(0), "max_new_tokens": 12, "sampling": Sampling()}
  defaults |= {"eos_ids": decoder.config.eos_ids, "batch_size": 2, "sharding": None}
  options = defaults | {"about": {"model": "random"}} | options
  return answer_prompts(decoder_source(decoder), variables, tokens, path, **options)
