"""A model made by hand that has learned the alphabet.

After a letter it says the next one, after z it ends the text, after anything else it
begins with a.
"""

import jax
import jax.numpy as jnp
import numpy as np

from okd_jax import models
from okd_jax.data import make_tokenizer

EOS, PAD, TURN, BOS = 256, 257, 258, 259
VOCABULARY = 260


def alphabet_model(end=EOS, **changes):
  """(parameters, config): embeddings are one-hot, layers add nothing to them."""
  config = models.ModelConfig(
    vocab_size=VOCABULARY,
    hidden_size=VOCABULARY,
    num_layers=1,
    num_heads=1,
    head_dim=2,
    mlp_size=2,
    tie_embeddings=False,
    **{"max_length": 200, "eos_ids": (EOS,), "pad_id": PAD, **changes},
  )
  params = jax.tree.map(
    lambda leaf: jnp.zeros(leaf.shape),
    jax.eval_shape(lambda: models.init(config, jax.random.key(0))),
  )
  follows = np.full(VOCABULARY, ord("a"))
  follows[ord("a") : ord("z")] = np.arange(ord("b"), ord("z") + 1)
  follows[ord("z")] = end
  params["embed"]["embedding"] = jnp.eye(VOCABULARY)
  params["norm"]["scale"] = jnp.ones(VOCABULARY)
  params["head"] = jnp.eye(VOCABULARY)[follows].T
  return params, config


def alphabet_tokenizer():
  tokenizer = make_tokenizer("bytes", [])
  tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>", "<|bos|>"]})
  return tokenizer


def save(folder, tokenizer=None, template="", **changes):
  params, config = alphabet_model(**changes)
  tokenizer = tokenizer or alphabet_tokenizer()
  models.save(folder, params, config, tokenizer, template=template)
  return str(folder)
