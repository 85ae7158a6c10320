"""A study's table: means, intervals, equal time, and what it says of differences."""

import csv
import io
import math

import comparing
import numpy as np
import pytest
from comparing import result
from scipy import stats

from okd_jax.analysis import comparison, study_report, tables
from okd_jax.config import study


@pytest.fixture(scope="module")
def plan():
  return comparing.plan()


@pytest.fixture(scope="module")
def found(plan):
  return comparing.found(plan)


def test_means_and_deviations(found):
  row = found.rows["okd"]["loss"]
  assert row.mean == pytest.approx(np.mean([3.2, 3.31, 3.1]))
  assert row.std == pytest.approx(np.std([3.2, 3.31, 3.1], ddof=1))
  assert found.rows["start"]["loss"] == (4.0, None)
  assert found.rows["okd"]["rougeL/qa"].mean == pytest.approx(32.033, abs=1e-3)
  assert found.rows["okd"]["relative_time"].mean == pytest.approx(1.0)
  assert found.rows["kd"]["relative_time"].mean == pytest.approx(0.5)


def test_differences_are_paired(found):
  """The interval is that of the differences, as scipy has it."""
  pairs = np.array([3.2 - 3.5, 3.31 - 3.6, 3.1 - 3.4])
  got = found.differences["okd"]["loss"]
  low, high = stats.ttest_1samp(pairs, 0).confidence_interval()
  assert got.mean == pytest.approx(pairs.mean())
  assert (got.low, got.high) == pytest.approx((low, high))
  assert got.differs and not found.differences["sft"]["loss"].differs
  assert "kd" not in found.differences


def test_no_difference_is_said(found):
  rows = {row[0]: row[1:] for row in tables.verdicts(found, "quality")}
  columns = rows[""]
  at = columns.index("loss")
  assert rows["okd"][at].endswith("] better") and rows["sft"][at].endswith(
    "no difference"
  )
  at = columns.index("ROUGE-L qa")  # of which more is better
  assert rows["okd"][at].endswith("] worse")


def test_equal_time_is_the_baselines_end(found):
  """okd is half way by then, sft has long ended."""
  losses = [found.runs[arm][0]["loss_at_time"] for arm in ("kd", "okd", "sft")]
  assert losses == pytest.approx([3.5, 4 - 0.8 / 2, 3.6])


def test_a_run_of_another_arm_cannot_move_a_row(plan, found):
  """What is missing stays missing, in its own column and row."""
  results = {
    f"{arm}:{seed}": result(
      3.0,
      0.3,
      peak=None if (arm, seed) == ("okd", 1) else {"peak_bytes": 1e6 * (seed + 1)},
    )
    for arm in plan.arms
    for seed in range(3)
  }
  table = list(
    csv.DictReader(io.StringIO(tables.csv_text(comparison.compare(plan, results))))
  )
  peaks = {(row["arm"], row["seed"]): row["peak_mb"] for row in table}
  assert peaks["okd", "1"] == "" and peaks["okd", "2"] == "3.0" and len(table) == 9


def test_one_seed_has_no_intervals(plan):
  one = study.select(plan, "okd", 1)
  assert (one.baseline, one.unit, one.seeds) == ("okd", "okd", 1)
  found = comparison.compare(one, {"okd:0": result(3.0, 0.3)})
  assert "±" not in tables.text(found) and "Differences" not in tables.markdown(found)
  assert math.isclose(found.rows["okd"]["loss"].mean, 3.0)


def test_a_terminal_reads_differences_in_words(found):
  text = tables.text(found)
  assert max(map(len, text.splitlines())) <= 160
  okd = text.partition("\nokd\n")[2].partition("\n\n")[0].replace("\n    ", " ")
  better, worse, same = (line.strip() for line in okd.splitlines())
  assert better.startswith("better: loss -0.297 [-0.311, -0.282]; KL(T‖S) -0.030")
  assert worse.startswith("worse: ms a step +100.0 [+100.0, +100.0]; time +0.50")
  assert same.startswith("no difference: loss, equal time")


def test_the_files_are_written(plan, found, tmp_path):
  study_report.write(plan, found, tmp_path)
  first = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
  assert set(first) == {"report.html", "table.md", "table.csv", "study.json"}
  study_report.write(plan, found, tmp_path)
  assert first == {p.name: p.read_bytes() for p in tmp_path.iterdir()}
  page = first["report.html"].decode()
  for words in (
    "Study toy",
    "A toy.",
    "no difference",
    "runs/okd/0/report.html",
    "<svg",
  ):
    assert words in page
