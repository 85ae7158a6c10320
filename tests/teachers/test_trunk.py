"""The trunk below the modules: what is kept gives the losses of what is computed."""

import chex
import jax
import numpy as np
import pytest
from small import config

from okd_jax.data import train_loader
from okd_jax.errors import UserError
from okd_jax.run import build as setup
from okd_jax.run import loop as train
from okd_jax.run.batches import Sampler
from okd_jax.run.step import compile_step
from okd_jax.teachers import trunk


def okd(**changes):
  defaults = {"method.name": "okd", "adapter.layers": 1, "method.anchor_weight": 0.3}
  return config(**defaults | {"teacher.model.num_layers": 3} | changes)


def steps(settings, folder, count=3, hide=False):
  """(metrics of the last step, its parameters); `hide` breaks the trunk's layers."""
  run = setup.build(settings, folder)
  loader = train_loader(run.train, batch_size=8, length=96, pad_id=0, seed=0)
  with jax.set_mesh(run.mesh):
    kept = trunk.prepare(run, trunk.opened(run))
    sampler, state = Sampler(run, {}, 0, kept), run.init()
    step = compile_step(
      run.method, run.models, run.optimizers, 2, run.steps, run.abstract, run.mesh
    )
    frozen = run.frozen
    if hide:
      broken = jax.tree.map(lambda x: x.at[:2].set(np.nan), frozen["layers"])
      frozen = frozen | {"layers": broken}
    for i in range(count):
      batch, _ = sampler.batch(i, state.params, next(loader))
      state, values = step(state, frozen, batch)
  return values, state.params


@pytest.mark.parametrize(
  "order", ["simultaneous", pytest.param("sequential", marks=pytest.mark.slow)]
)
def test_a_kept_trunk_changes_no_loss(order, tmp_path):
  """Within what bfloat16 holds; and nothing below the modules is read any more."""
  changes = {"method.update_order": order}
  wanted, _ = steps(okd(**changes), tmp_path)
  kept = okd(**changes | {"teacher.trunk": "memory"})
  got, params = steps(kept, tmp_path, hide=True)
  chex.assert_trees_all_close(got, wanted, rtol=2e-2, atol=2e-3)
  chex.assert_tree_all_finite(params)
  assert abs(float(got["loss"] / wanted["loss"]) - 1) < 1e-3


@pytest.mark.slow
def test_on_disk_as_in_memory(tmp_path):
  disk = {"teacher.trunk": str(tmp_path / "trunk")}
  one = steps(okd(**disk), tmp_path, 2)
  again = steps(okd(**disk), tmp_path, 2)
  memory = steps(okd(**{"teacher.trunk": "memory"}), tmp_path, 2)
  chex.assert_trees_all_equal(one, again)
  chex.assert_trees_all_equal(one, memory)
  with pytest.raises(UserError, match="layers was 2, here it is 1"):
    steps(okd(**disk | {"adapter.layers": 2}), tmp_path)


@pytest.mark.slow
def test_sampled_rows_have_no_trunk_but_gold_ones_have(tmp_path):
  """On-policy OKD: the module's loss is on gold, and that is what is kept."""
  changes = {"method.name": "gkd", "adapter.kind": "lora", "method.sampled_share": 1.0}
  wanted, _ = steps(okd(**changes), tmp_path, 1)
  got, _ = steps(okd(**changes | {"teacher.trunk": "memory"}), tmp_path, 1)
  assert got["module_loss"] != wanted["module_loss"]  # bfloat16
  chex.assert_trees_all_close(got, wanted, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"adapter.layers": 0}, "set adapter.layers=k"),
    ({"adapter.layers": 3}, "set adapter.layers=k"),
    ({"method.name": "kd"}, "kd has no online module"),
    ({"method.name": "promptkd", "adapter.kind": "lora"}, "sampled rows alone"),
  ],
)
def test_where_there_is_no_trunk(changes, words, tmp_path):
  run = setup.build(okd(**changes | {"teacher.trunk": "memory"}), tmp_path)
  with pytest.raises(UserError, match=words):
    trunk.opened(run)


def test_an_ensemble_keeps_none(tmp_path):
  changes = {"method.name": "ensemble", "adapter.kind": "lora"}
  with pytest.raises(UserError, match="method ensemble keeps no trunk"):
    setup.build(okd(**changes | {"teacher.trunk": "memory"}), tmp_path)


def test_a_refused_trunk_leaves_the_workdir_free(tmp_path):
  """Else the corrected configuration would not be the one the workdir belongs to."""
  (tmp_path / "file").write_text("")
  workdir = tmp_path / "run"
  with pytest.raises(UserError):
    train.run(okd(**{"teacher.trunk": str(tmp_path / "file")}), workdir)
  assert not (workdir / "config.json").exists()
