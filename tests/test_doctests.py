"""The examples in the docstrings of losses and loaders run, and print what they say."""

import doctest
import importlib

import pytest

MODULES = (
  "okd_jax.bench.groups",
  "okd_jax.data.encode",
  "okd_jax.data.loader",
  "okd_jax.data.sources",
  "okd_jax.data.tokenizer",
  "okd_jax.losses.chunked",
  "okd_jax.losses.inline",
  "okd_jax.losses.layout",
  "okd_jax.losses.outputs",
  "okd_jax.losses.per_token",
  "okd_jax.losses.cross_tokenizer",
  "okd_jax.losses.divergences",
  "okd_jax.losses.logits",
  "okd_jax.losses.mean",
  "okd_jax.losses.mixture",
  "okd_jax.losses.ranking",
  "okd_jax.losses.sparse",
  "okd_jax.models.formats.hf",
  "okd_jax.models.formats.known",
  "okd_jax.models.model",
)


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_run(name):
  failed, tried = doctest.testmod(importlib.import_module(name))
  assert tried and not failed
