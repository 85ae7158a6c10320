"""Answers to twenty-one short prompts, for the tests of `okd_jax.text.answers_file`."""

import jax
from alphabet import EOS, alphabet_model, alphabet_tokenizer

from okd_jax import models
from okd_jax.data import Record
from okd_jax.models import Decoder
from okd_jax.text import answers_file


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
