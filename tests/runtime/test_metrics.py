"""metrics.jsonl and the closing table."""

import json

import pytest

from okd_jax.runtime import metrics


def rows(workdir):
  return [
    json.loads(line)
    for line in (workdir / "metrics.jsonl").read_text().split("\n")[:-1]
  ]


def test_rows_and_what_a_resumed_run_drops(tmp_path):
  writer = metrics.Writer(tmp_path, 0, tensorboard=False, wandb="")
  for step in (1, 2, 3):
    writer.write(step, "train", {"loss": step / 2})
  writer.write(3, "train", {"loss": float("nan")})
  writer.close()
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"step": 4, "ki')  # a kill in the middle of a line
  metrics.Writer(tmp_path, 2, tensorboard=False, wandb="").close()
  assert rows(tmp_path) == [
    {"step": 1, "kind": "train", "loss": 0.5},
    {"step": 2, "kind": "train", "loss": 1.0},
  ]


def test_not_finite_is_null(tmp_path):
  writer = metrics.Writer(tmp_path, 0, tensorboard=False, wandb="")
  writer.write(1, "train", {"loss": float("inf"), "lr": 0.0})
  writer.close()
  assert rows(tmp_path) == [{"step": 1, "kind": "train", "loss": None, "lr": 0.0}]


def test_table():
  text = metrics.table(
    {"teacher": {"loss": 1.23456}, "student": {"loss": 22.5, "rougeL": 101.26}},
    {"loss": "loss", "rougeL": "ROUGE-L", "absent": "absent"},
  )
  assert text.splitlines() == [
    "          loss  ROUGE-L",
    "-----------------------",
    "teacher  1.235        –",
    "student  22.50    101.3",
  ]


@pytest.mark.parametrize(
  "values, patience, stops",
  [
    ([3.0, 2.0, 1.0], 2, False),
    ([3.0, 2.0, 2.5], 2, False),
    ([3.0, 2.0, 2.5, 2.0], 2, True),  # as good is no better
    ([3.0, 2.0, 2.5, 1.9], 2, False),
    ([2.0, 2.5], 1, True),
    ([2.0, 2.5], 0, False),
    ([2.0], 1, False),
  ],
)
def test_a_run_stalls_when_nothing_gets_better(values, patience, stops):
  """METHODS 5.6: early stopping by a distillation loss; the start does not count."""
  evals = {10 * (i + 1): {"forward_kl": v} for i, v in enumerate(values)}
  evals[0] = {"forward_kl": 0.0}
  assert metrics.stalled(evals, "forward_kl", patience) == stops
  larger = {step: {"rougeL": -row["forward_kl"]} for step, row in evals.items()}
  assert metrics.stalled(larger, "rougeL", patience) == stops
  assert not metrics.stalled(evals, "", 1)
