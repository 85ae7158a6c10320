"""A teacher that somebody adapted before: its LoRA is part of its weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trial import TEACHER, VOCAB

from configs import debug
from okd_jax import models
from okd_jax.data import make_tokenizer
from okd_jax.errors import UserError
from okd_jax.models import Decoder
from okd_jax.models.adapters import AdapterConfig, merge
from okd_jax.run import build as setup
from okd_jax.teachers import load as teachers


@pytest.mark.parametrize("layers", [0, 2])
def test_merged_weights_give_the_adapted_hidden_states(layers):
  """W + scale * down @ up, in the layers that carry a pair and nowhere else."""
  targets = ("query", "value", "up", "out")
  config = AdapterConfig(rank=3, scale=0.7, targets=targets, layers=layers)
  tokens = jax.random.randint(jax.random.key(1), (2, 9), 0, VOCAB)
  decoder = Decoder(TEACHER, config)
  variables = decoder.init(jax.random.key(0), tokens)
  adapter = jax.tree.map(lambda x: x + 0.1, variables["adapter"])
  merged = merge(variables["params"], adapter, config)
  want, _ = decoder.apply({"params": variables["params"], "adapter": adapter}, tokens)
  got, _ = Decoder(TEACHER).apply({"params": merged}, tokens)
  np.testing.assert_allclose(got, want, atol=2e-5)
  plain, _ = Decoder(TEACHER).apply({"params": variables["params"]}, tokens)
  assert jnp.abs(got - plain).max() > 0.05
  below = TEACHER.num_layers - (layers or TEACHER.num_layers)
  for one, other in zip(
    jax.tree.leaves(merged["layers"]),
    jax.tree.leaves(variables["params"]["layers"]),
    strict=True,
  ):
    np.testing.assert_array_equal(one[:below], other[:below])


def test_virtual_tokens_are_no_weights():
  with pytest.raises(UserError, match="prefix module cannot be merged"):
    merge({}, {}, AdapterConfig("prefix"))


def test_a_run_starts_from_an_adapted_teacher(tmp_path):
  """teacher.adapter, a PEFT folder or the run that holds it, below any method."""
  tokenizer = make_tokenizer("bytes", [])
  shape = models.preset(
    family="llama", hidden_size=16, num_layers=2, num_heads=2, vocab_size=len(tokenizer)
  )
  params = models.init(shape, jax.random.key(0))
  models.save(tmp_path / "base", params, shape, tokenizer)
  adapter = AdapterConfig(rank=2)
  tree = Decoder(shape, adapter).init(jax.random.key(1), jnp.ones((1, 1), jnp.int32))
  tree = jax.tree.map(lambda x: x + 0.1, tree["adapter"])
  models.save_adapter(tmp_path / "run" / "adapter", tree, adapter, shape, "base")
  config = debug.get_config()
  config.method.name = "kd"
  config.data.train = "embedded:eval"
  config.teacher.model.hidden_size = 0
  config.teacher.path = str(tmp_path / "base")
  config.teacher.adapter = str(tmp_path / "run")
  run = setup.build(config, tmp_path / "work")
  want = merge(params, tree, adapter)
  for one, other in zip(
    jax.tree.leaves(run.frozen), jax.tree.leaves(want), strict=True
  ):
    np.testing.assert_allclose(one, other, atol=1e-6)
  keys = {}
  for name in ("run", ""):
    config.teacher.adapter = name and str(tmp_path / name)
    keys[name] = teachers.stored_key(config, run.train)
  assert keys["run"]["teacher"] == keys[""]["teacher"]
  assert keys["run"]["adapter"] != keys[""]["adapter"] == ""
