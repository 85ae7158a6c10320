"""The trunk below the modules: what is kept gives the losses of what is computed."""

import signal

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
from okd_jax.run.evaluator import Evaluator
from okd_jax.run.stop import Stop, Stopped
from okd_jax.runtime import metrics


def okd(**changes):
  defaults = {"method.name": "okd", "adapter.layers": 1, "method.anchor_weight": 0.3}
  return config(**defaults | {"teacher.model.num_layers": 3} | changes)


def steps(settings, folder, count=3, hide=False, drop=False):
  """(metrics of the last step, its parameters).

  hide: break the trunk's layers.
  drop: do without them.
  """
  run = built(settings, folder)
  loader = train_loader(run.data.train, batch_size=8, length=96, pad_id=0, seed=0)
  with jax.set_mesh(run.mesh):
    kept = kept_trunk(run)
    sampler, state = Batches(run, {}, kept), run.init()
    run = run.only_top() if drop else run
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
  """Within what bfloat16 holds; what lies below the modules is not even needed."""
  changes = {"method.update_order": order}
  wanted, _ = steps(okd(**changes), tmp_path)
  kept = okd(**changes | {"teacher.trunk": "memory"})
  # In either way nothing below can be read: by weights that are NaN, or are not there.
  broken = {"hide": True} if order == "sequential" else {"drop": True}
  got, params = steps(kept, tmp_path, **broken)
  chex.assert_trees_all_close(got, wanted, rtol=2e-2, atol=2e-3)
  chex.assert_tree_all_finite(params)
  assert abs(float(got["loss"] / wanted["loss"]) - 1) < 1e-3


def test_the_layers_below_can_be_dropped(tmp_path):
  """What only the trunk reads is gone from the devices."""
  settings = okd(**{"teacher.trunk": "memory"})
  settings.teacher.model.tie_embeddings = False
  run = built(settings, tmp_path)
  whole, sizes = run.cast.frozen["teacher"], []
  gone = [whole["embed"]["embedding"]]
  gone += [x[:2] for x in jax.tree.leaves(whole["layers"])]
  fewer = sum(x.nbytes for x in gone)
  for each in (run, run.only_top()):
    top = each.cast.frozen["teacher"]
    sizes.append(sum(x.nbytes for x in jax.tree.leaves(top)))
  assert sizes[0] - sizes[1] == fewer > sizes[1] / 4
  assert all(x.is_deleted() for x in jax.tree.leaves(whole["layers"]))
  batch = {
    "tokens": np.ones((1, 4), np.int32),
    "segment_ids": np.ones((1, 4), np.int32),
  }
  for decoder in (*each.cast.teachers.values(), *each.cast.adapted.values()):
    with pytest.raises(ValueError, match="layers below were dropped"):
      decoder.apply({"params": top}, **batch)


@pytest.mark.slow
def test_figures_of_a_teacher_without_its_trunk(tmp_path):
  """Those of the whole teacher, within what bfloat16 holds."""
  run = built(okd(**{"teacher.trunk": "memory"}), tmp_path)
  with jax.set_mesh(run.mesh):
    params, kept = run.init().params, kept_trunk(run)
    noisy = jax.tree.map(lambda x: x + 0.5, params["adapter"])
    params |= {"adapter": noisy}
    want = Evaluator(run)(params)
    got = Evaluator(run.only_top(), kept.eval)(params)
  assert got["adapted_drift"] > 1e-3
  assert {*got} == {*want}
  for name, value in want.items():
    assert got[name] == pytest.approx(value, rel=1e-2, abs=1e-3), name


@pytest.mark.parametrize(
  "changes",
  [
    {"method.name": "gkd", "adapter.kind": "lora"},
    {"adapter.kind": "blocks", "adapter.share": 0.3, "adapter.layers": 0},
  ],
)
def test_who_keeps_the_whole_teacher(changes, tmp_path):
  """Those that sample rows, and those whose own blocks are exported with the rest."""
  run = built(okd(**changes | {"teacher.trunk": "memory"}), tmp_path)
  assert opened(run).eval is None


def evaluated(result):
  rows = metrics.read(result.workdir)
  return [row for row in rows if row["kind"] == "eval"]


@pytest.mark.slow
def test_a_run_drops_the_layers_below(tmp_path):
  """From its start to its end, export included; and where it is taken up again."""
  changes = {"teacher.trunk": str(tmp_path / "trunk"), "train.steps": 2}
  changes |= {"eval.generate": False, "checkpoint.every": 1}
  [one] = distill.run(okd(**changes), tmp_path / "one")
  assert one.adapter.exists()
  assert evaluated(one)[-1]["adapted_drift"] > 0

  class Once(Stop):
    """After the first checkpoint of step 1."""

    @property
    def number(self):
      return signal.SIGTERM * (tmp_path / "two/checkpoints/1").exists()

  with pytest.raises(Stopped):
    distill.run(okd(**changes), tmp_path / "two", stop=Once())
  [two] = distill.run(okd(**changes), tmp_path / "two")
  assert evaluated(two) == evaluated(one)


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
    ({"adapter.layers": 3}, "set adapter.layers to fewer"),
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
  """Told before anything is loaded, but for the teacher's depth."""
  with pytest.raises(UserError, match=words):
    opened(built(okd(**changes | {"teacher.trunk": "memory"}), tmp_path))


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
