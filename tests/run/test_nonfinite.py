"""What is not finite: it is named, the run stops, or leaves out some updates."""

import math
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import same_folder
from small import built, config

from okd_jax import models
from okd_jax.config import schema
from okd_jax.errors import UserError
from okd_jax.run import distill, nonfinite, stop
from okd_jax.runtime import metrics
from okd_jax.teachers import trunk

SOUND = {"the teacher": {"kernel": jnp.ones(3)}, "the student": {"kernel": jnp.ones(3)}}
BROKEN = SOUND | {"the teacher": {"bias": jnp.ones(2), "kernel": jnp.full(3, jnp.nan)}}


@pytest.mark.parametrize(
  "values, trees, words",
  [
    (
      {"teacher_nll": math.nan, "loss": math.nan, "student_nll": 1.0},
      BROKEN,
      "of the teacher: teacher_nll nan; its rows are 4 (f:5); none is saved; weights "
      "are not finite: those of the teacher (kernel)",
    ),
    ({"teacher_nll": math.inf}, SOUND, "the teacher overflows on these rows"),
    (
      {"loss": math.nan, "student_grad_norm": math.nan},
      SOUND,
      "of the student: loss nan, student_grad_norm nan",
    ),
    ({"module_loss": math.nan}, SOUND, "of the online module: module_loss nan"),
    ({"student_update_norm": math.inf}, SOUND, "lower optim.lr, or raise optim.eps"),
  ],
)
def test_the_message_says_which_term_of_which_model(values, trees, words):
  found = nonfinite.NotFinite(3, np.array([4]), values)
  told = str(nonfinite.error(found, "4 (f:5)", trees, []))
  assert told.startswith("step 3: not finite of the ")
  assert all(part in told for part in words.split("; "))


def test_it_names_the_checkpoint_that_is_there():
  found = nonfinite.NotFinite(9, np.array([4]), {"loss": math.nan}, skipped=3)
  told = str(nonfinite.error(found, "4 (f:5)", SOUND, [2, 6]))
  assert "the checkpoint of step 6 is sound; 2 updates were skipped before it" in told


def test_a_perplexity_may_overflow():
  nonfinite.check_scores("the student", {"loss": 800.0, "perplexity": math.inf}, SOUND)
  with pytest.raises(UserError, match="figures of the student are not finite .*loss"):
    nonfinite.check_scores("the student", {"loss": math.inf}, SOUND)


@pytest.mark.parametrize("value", ["skip", "skip:0", "skip:-1", "skip:1.5", "go on"])
def test_what_may_be_skipped_is_a_number(value):
  with pytest.raises(UserError, match="train.on_nonfinite=.*'stop', or 'skip:N'"):
    schema.check_values(config(**{"train.on_nonfinite": value}))


@pytest.mark.slow
def test_a_broken_teacher_is_found_before_the_first_step(tmp_path):
  """And blamed: neither the rows nor the learning rate are at fault."""
  run = built(config(), tmp_path / "built")
  [params] = run.cast.frozen.values()
  params = jax.tree.map(jnp.copy, params)
  up = params["layers"]["mlp"]["up"]
  up["kernel"] = up["kernel"].at[1, 0, 0].set(jnp.nan)
  shape = run.cast.teachers["teacher"].config
  models.save(tmp_path / "broken", params, shape, run.data.tokenizer)
  changes = {"teacher.path": str(tmp_path / "broken"), "data.tokenizer": ""}
  changes |= {"teacher.model.hidden_size": 0}
  with pytest.raises(UserError) as error:
    distill.run(config(**changes), tmp_path / "run")
  told = str(error.value)
  assert "before the first step the held-out figures of teacher" in told
  assert "those of the teacher (layers/mlp/up/kernel)" in told
  assert "nothing was trained" in told and "optim.lr" not in told
  assert not list((tmp_path / "run/checkpoints").glob("[0-9]*"))


class At(stop.Stop):
  """Comes true once a checkpoint of this step is there."""

  def __init__(self, folder, step):
    self.place = folder / "checkpoints" / str(step)

  @property
  def number(self):
    return int(signal.SIGTERM) if self.place.exists() else 0


@pytest.mark.slow
def test_skipped_updates_are_counted_told_and_resumed_to_the_bit(
  tmp_path, monkeypatch, capsys
):
  """Rows whose stored values are broken: their steps are left out, here and there."""
  complete = trunk.complete

  def spoiled(*arguments):
    kept = complete(*arguments)
    for row in range(3):
      kept.train._rows[row]["hidden"][:] = np.nan
    return kept

  monkeypatch.setattr(trunk, "complete", spoiled)
  changes = {"method.name": "okd", "adapter.layers": 1, "teacher.trunk": "memory"}
  changes |= {"train.steps": 12, "checkpoint.every": 2, "checkpoint.keep": 9}
  changes |= {"eval.generate": False, "train.log_every": 1}
  own = config(**changes | {"train.on_nonfinite": "skip:11"})
  [whole] = distill.run(own, tmp_path / "whole")
  rows = metrics.read(tmp_path / "whole")
  skipped = [row["step"] for row in rows if row["kind"] == "skipped"]
  trained = {row["step"]: row for row in rows if row["kind"] == "train"}
  assert 0 < len(skipped) < 12
  assert [s for s, row in trained.items() if row["loss"] is None] == skipped
  assert f"update {len(skipped)} of at most 11 skipped" in capsys.readouterr().err
  assert f"{len(skipped)} updates were skipped" in whole.report.read_text()
  for place in (2, 6):
    with pytest.raises(stop.Stopped):
      distill.run(own, tmp_path / "cut", stop=At(tmp_path / "cut", place))
  distill.run(own, tmp_path / "cut")
  for folder in ("student", "adapter"):
    assert same_folder(tmp_path / "whole" / folder, tmp_path / "cut" / folder)
  again = {r["step"]: r for r in metrics.read(tmp_path / "cut") if r["kind"] == "train"}
  assert [r["loss"] for r in again.values()] == [r["loss"] for r in trained.values()]
  with pytest.raises(UserError) as error:
    distill.run(config(**changes), tmp_path / "stops")
  first = f"step {skipped[0]}: not finite of the "
  assert first in str(error.value) and "its rows are" in str(error.value)
