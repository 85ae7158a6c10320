"""What a run says of a step: where its rows come from, and what it writes down."""

import contextlib
import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from small import built, config

from okd_jax.run.nonfinite import NotFinite
from okd_jax.run.progress import Progress
from okd_jax.runtime.metrics import Writer


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A run of eight steps on twenty texts."""
  changes = {"method.name": "sft", "train.steps": 8, "train.log_every": 100}
  run = built(config(**changes), tmp_path_factory.mktemp("run"))
  first = run.data.train[0]
  texts = [dataclasses.replace(first, where=f"a.jsonl:{line}") for line in range(1, 21)]
  return dataclasses.replace(
    run,
    data=dataclasses.replace(run.data, train=texts),
    plan=dataclasses.replace(run.plan, learning_rate=lambda step: 5e-4 * (step + 1)),
  )


def with_policy(run, on_nonfinite):
  train = dataclasses.replace(run.settings.train, on_nonfinite=on_nonfinite)
  settings = dataclasses.replace(run.settings, train=train)
  return dataclasses.replace(run, job=dataclasses.replace(run.job, settings=settings))


def follow(run, workdir, packs, values, rows):
  """What metrics.jsonl holds after one step, the seventh of eight."""
  run = dataclasses.replace(
    run, data=dataclasses.replace(run.data, packs=[*map(tuple, packs)])
  )
  with (
    contextlib.closing(
      Writer(workdir, 0, tensorboard=False, wandb="", config={})
    ) as writer,
    Progress(run, writer, step=6) as progress,
  ):
    values = {name: jnp.float32(value) for name, value in values.items()}
    progress.read(7, np.asarray(rows), values, {"sampled_length": 3.0})
  return json.loads((workdir / "metrics.jsonl").read_text().splitlines()[0])


@pytest.mark.parametrize(
  "packs, rows, named",
  [
    ([[i] for i in range(20)], [4, 0], "4 (a.jsonl:5), 0 (a.jsonl:1)"),
    ([[3], [7, 2, 5]], [1, 0], "1 (a.jsonl:8 and 2 texts with it), 0 (a.jsonl:4)"),
    ([[i] for i in range(20)], range(9), "6 (a.jsonl:7), 7 (a.jsonl:8), …"),
  ],
)
def test_a_step_that_is_not_finite_names_its_rows(
  run, packs, rows, named, tmp_path, capsys
):
  """By number and by line; here it is skipped, the first of two."""
  values = {"loss": np.nan, "finite": 0.0, "skipped": 1.0, "tokens": 5.0}
  row = follow(with_policy(run, "skip:2"), tmp_path, packs, values, rows)
  assert row == {"step": 7, "kind": "skipped", "skipped": 1.0}
  said = capsys.readouterr().err
  assert "step 7: update 1 of at most 2 skipped" in said
  assert "of the student: loss nan" in said and named in said


@pytest.mark.parametrize(
  "policy, skipped", [("stop", 0.0), ("skip:2", -1.0), ("skip:2", 3.0)]
)
def test_a_step_that_is_not_finite_ends_the_run(policy, skipped, run, tmp_path):
  """Where none may be skipped, where it was not left out as a whole, after too many."""
  run = with_policy(run, policy)
  values = {"loss": np.nan, "finite": 0.0, "tokens": 5.0}
  values |= {"skipped": skipped} if skipped else {}
  with pytest.raises(NotFinite):
    follow(run, tmp_path, [[0]], values, [0])
  assert not (tmp_path / "metrics.jsonl").read_text()


def test_a_step_is_written_down(run, tmp_path):
  values = {"loss": np.float32(1.5), "finite": 1.0, "tokens": 5.0}
  row = follow(run, tmp_path, [[0]], values, [0])
  assert row.pop("tokens_per_s") > 0 and row.pop("step_s") > 0
  assert row == {
    "step": 7,
    "kind": "train",
    "loss": 1.5,
    "tokens": 5.0,
    "lr": 0.0035,
    "sampled_length": 3.0,
  }
