"""A teacher that somebody adapted before: its LoRA is part of its weights."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trial import TEACHER, VOCAB

from configs import debug
from okd_jax import models
from okd_jax.config import schema
from okd_jax.data import make_tokenizer
from okd_jax.errors import UserError
from okd_jax.models import Decoder
from okd_jax.models.adapters import Blocks, Lora, Prefix, Prompt
from okd_jax.run.build import build
from okd_jax.runtime.workdir import Workdir
from okd_jax.teachers import load as teachers


@pytest.mark.parametrize("layers", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_merged_weights_give_the_adapted_hidden_states(layers):
  """W + scale * down @ up, in the layers that carry a pair and nowhere else."""
  targets = ("query", "value", "up", "out")
  config = Lora(rank=3, scale=0.7, targets=targets, layers=layers)
  tokens = jax.random.randint(jax.random.key(1), (2, 9), 0, VOCAB)
  decoder = Decoder(TEACHER, config)
  variables = jax.jit(decoder.init)(jax.random.key(0), tokens)
  adapter = jax.tree.map(lambda x: x + 0.1, variables["adapter"])
  bare = jax.jit(Decoder(TEACHER).apply)
  merged = config.merge(variables["params"], adapter)
  variables |= {"adapter": adapter}
  want, _ = jax.jit(decoder.apply)(variables, tokens)
  got, _ = bare({"params": merged}, tokens)
  np.testing.assert_allclose(got, want, atol=2e-5)
  plain, _ = bare({"params": variables["params"]}, tokens)
  assert jnp.abs(got - plain).max() > 0.05
  below = TEACHER.num_layers - (layers or TEACHER.num_layers)
  for one, other in zip(
    jax.tree.leaves(merged["layers"]),
    jax.tree.leaves(variables["params"]["layers"]),
    strict=True,
  ):
    np.testing.assert_array_equal(one[:below], other[:below])


def test_virtual_tokens_are_no_weights():
  for adapter in (Prefix(), Prompt()):
    with pytest.raises(UserError, match=f"a {adapter.kind} module cannot be merged"):
      adapter.merge({}, {})


def test_blocks_take_the_places_of_their_layers():
  """In the dtype of the weights, whatever theirs; all other parameters as they are."""
  params = models.init(TEACHER, jax.random.key(0))
  params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  blocks = Blocks((0, 2))
  tree = jax.tree.map(lambda x: x + 1, blocks.start(params))
  merged = blocks.merge(params, tree)
  for name in set(params) - {"layers"}:
    chex.assert_trees_all_equal(merged[name], params[name])
  leaves = (jax.tree.leaves(x["layers"]) for x in (params, tree, merged))
  for old, own, new in zip(*leaves, strict=True):
    assert (old.dtype, own.dtype, new.dtype) == ("bfloat16", "float32", "bfloat16")
    np.testing.assert_array_equal(new[1], old[1])
    np.testing.assert_array_equal(new[np.array([0, 2])], own.astype(jnp.bfloat16))


@pytest.mark.slow
def test_a_run_starts_from_an_adapted_teacher(tmp_path):
  """teacher.adapter, a PEFT folder or the run that holds it, below any method."""
  tokenizer = make_tokenizer("bytes", [])
  shape = models.preset(
    family="llama", hidden_size=16, num_layers=2, num_heads=2, vocab_size=len(tokenizer)
  )
  params = models.init(shape, jax.random.key(0))
  models.save(tmp_path / "base", params, shape, tokenizer)
  adapter = Lora(rank=2)
  tree = Decoder(shape, adapter).init(jax.random.key(1), jnp.ones((1, 1), jnp.int32))
  tree = jax.tree.map(lambda x: x + 0.1, tree["adapter"])
  models.save_adapter(tmp_path / "run" / "adapter", tree, adapter, shape, "base")
  config = debug.get_config()
  config.method.name = "kd"
  config.data.train = "embedded:eval"
  config.teacher.model.hidden_size = 0
  config.teacher.path = str(tmp_path / "base")
  config.teacher.adapter = str(tmp_path / "run")
  run = build(config, Workdir(tmp_path / "work"))
  want = adapter.merge(params, tree)
  for one, other in zip(
    jax.tree.leaves(run.cast.frozen), jax.tree.leaves({"teacher": want}), strict=True
  ):
    np.testing.assert_allclose(one, other, atol=1e-6)
  keys = {}
  for name in ("run", ""):
    config.teacher.adapter = name and str(tmp_path / name)
    keys[name] = teachers.stored_key(schema.settings(config), run.data.train)
  assert keys["run"]["teacher"] == keys[""]["teacher"]
  assert keys["run"]["adapter"] != keys[""]["adapter"] == ""
