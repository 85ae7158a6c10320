"""The trunk below the modules: what is kept gives the losses of what is computed."""

import chex
import jax
import numpy as np
import pytest
from small import built, config, opened, step_of
from small import kept as kept_trunk

from okd_jax.data import train_loader
from okd_jax.errors import UserError
from okd_jax.run import distill
from okd_jax.run.batches import Batches


def okd(**changes):
  defaults = {"method.name": "okd", "adapter.layers": 1, "method.anchor_weight": 0.3}
  return config(**defaults | {"teacher.model.num_layers": 3} | changes)


def steps(settings, folder, count=3, hide=False):
  """(metrics of the last step, its parameters); `hide` breaks the trunk's layers."""
  run = built(settings, folder)
  loader = train_loader(run.data.train, batch_size=8, length=96, pad_id=0, seed=0)
  with jax.set_mesh(run.mesh):
    kept = kept_trunk(run)
    sampler, state = Batches(run, {}, kept), run.init()
    step = step_of(run, 2)
    frozen = run.cast.frozen
    if hide:
      frozen = frozen["teacher"]
      broken = jax.tree.map(lambda x: x.at[:2].set(np.nan), frozen["layers"])
      frozen = {"teacher": frozen | {"layers": broken}}
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
  with pytest.raises(UserError, match="layers=2 there, 1 here"):
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
    ({"method.name": "kd", "method.anchor_weight": 0.0}, "kd has no adapter"),
    (
      {
        "method.name": "promptkd",
        "adapter.kind": "lora",
        "method.anchor_weight": 0.0,
      },
      "sampled rows alone",
    ),
  ],
)
def test_where_there_is_no_trunk(changes, words, tmp_path):
  run = built(okd(**changes | {"teacher.trunk": "memory"}), tmp_path)
  with pytest.raises(UserError, match=words):
    opened(run)


def test_an_ensemble_keeps_none(tmp_path):
  changes = {"method.name": "ensemble", "adapter.kind": "lora"}
  with pytest.raises(UserError, match="method ensemble keeps no trunk"):
    built(okd(**changes | {"teacher.trunk": "memory"}), tmp_path)


def test_a_refused_trunk_leaves_the_workdir_free(tmp_path):
  """Else the corrected configuration would not be the one the workdir belongs to."""
  (tmp_path / "file").write_text("")
  workdir = tmp_path / "run"
  with pytest.raises(UserError):
    distill.run(okd(**{"teacher.trunk": str(tmp_path / "file")}), workdir)
  assert not (workdir / "config.json").exists()
