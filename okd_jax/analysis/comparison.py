"""A study's results as one table: means over seeds, and differences seed by seed."""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from scipy import stats

from okd_jax.config.study import Study

Result = Mapping[str, Any]  # what `run.study` measured of one run


class Column(NamedTuple):
  """A figure of the table.

  name: in CSV and JSON; title: for people; larger: whether more is better, None where
  there is no better; digits: after the point; meaning: in a few words; table: which of
  TABLES it stands in.
  """

  name: str
  title: str
  larger: bool | None
  digits: int
  meaning: str
  table: str = "quality"


class Spread(NamedTuple):
  """Mean and standard deviation over seeds; None of one seed."""

  mean: float
  std: float | None


class Difference(NamedTuple):
  """Of an arm and the baseline with the same seed: mean and 95 % interval (t)."""

  mean: float
  low: float
  high: float

  @property
  def differs(self) -> bool:
    """Whether the interval leaves out 0."""
    return self.low > 0 or self.high < 0


# One table of all would be wider than a page.
TABLES = {"quality": "At equal steps", "cost": "At equal time, and what it costs"}
COLUMNS = (
  Column("loss", "loss", False, 3, "held-out cross-entropy, nats per token"),
  Column("forward_kl", "KL(T‖S)", False, 3, "from the frozen teacher, nats per token"),
  Column("reverse_kl", "KL(S‖T)", False, 3, "the other way"),
  Column("top1_agreement", "top-1 %", True, 1, "first choice is the teacher's"),
  Column(
    "acceptance",
    "acceptance %",
    True,
    1,
    "of its tokens that speculative decoding with the teacher would keep",
  ),
  Column(
    "excess",
    "ExAccErr %",
    None,
    1,
    "exposure bias: by how much errors on its own text exceed those on the teacher's; "
    "nearer to 0 is better",
  ),
  Column(
    "judge_kl",
    "KL(S‖judge)",
    False,
    3,
    "on its own text, drawn at temperature 1: from the student to a model that learned "
    "from other text",
  ),
  Column("drift", "drift", None, 3, "KL from the frozen to the adapted teacher"),
  Column(
    "loss_at_time",
    "loss, equal time",
    False,
    3,
    "after the seconds that the baseline trained",
    "cost",
  ),
  Column("kl_at_time", "KL(T‖S), equal time", False, 3, "likewise", "cost"),
  Column("ms_a_step", "ms a step", False, 1, "without compiling or evaluating", "cost"),
  Column("relative_time", "time", False, 2, "a step's, relative to the unit's", "cost"),
  Column("peak_mb", "peak MB", False, 0, "of the device; on CPU, the process", "cost"),
  Column("tokens", "tokens", None, 0, "in all training rows", "cost"),
)


@dataclasses.dataclass(frozen=True)
class Comparison:
  """A study's table.

  columns: those that any arm has, ROUGE-L of every set among them.
  runs: {arm: [{column: value} of each seed]}.
  rows: {arm: {column: Spread}}; 'start' and 'teacher' have what there is of them.
  differences: {arm: {column: Difference}} from the baseline.
  curves: {arm: [(step, seconds, loss, forward KL)]}, means over seeds.
  """

  baseline: str
  unit: str
  seeds: int
  columns: tuple[Column, ...]
  runs: Mapping[str, Sequence[Mapping[str, float]]]
  rows: Mapping[str, Mapping[str, Spread]]
  differences: Mapping[str, Mapping[str, Difference]]
  curves: Mapping[str, Sequence[tuple[float, ...]]]
  groups: Mapping[str, Mapping[str, Mapping[str, float]]]
  excess: Mapping[str, Mapping[str, Sequence[float]]]
  machine: Mapping[str, Any]


def compare(study: Study, results: Mapping[str, Result]) -> Comparison:
  """The table of the runs by name, 'ARM:SEED'."""
  seeds = range(study.seeds)
  runs = {arm: [results[f"{arm}:{seed}"] for seed in seeds] for arm in study.arms}
  budget = _budget(runs[study.baseline])
  unit = _mean([run["step_s"] for run in runs[study.unit]])
  figures = {
    arm: [_figures(run, budget, unit) for run in own] for arm, own in runs.items()
  }
  columns = (*COLUMNS, *_sets(study))
  first = runs[study.baseline][0]
  rows = {"teacher": _fixed(first["teacher"]), "start": _fixed(first["start"])}
  rows |= {arm: _spreads(own, columns) for arm, own in figures.items()}
  shown = tuple(c for c in columns if any(c.name in row for row in rows.values()))
  return Comparison(
    baseline=study.baseline,
    unit=study.unit,
    seeds=study.seeds,
    columns=shown,
    runs=figures,
    rows=rows,
    differences={
      arm: _differences(own, figures[study.baseline], shown)
      for arm, own in figures.items()
      if arm != study.baseline
    },
    curves={arm: _curve(own) for arm, own in runs.items()},
    groups={arm: _groups(own) for arm, own in runs.items() if own[0]["analysis"]},
    excess={arm: _excess(own) for arm, own in runs.items() if _excess(own)},
    machine=first["machine"],
  )


def _sets(study: Study) -> list[Column]:
  found = []
  for name in study.sets:
    title = f"ROUGE-L {name}"
    drawn = "of answers drawn at temperature 1, mean over the draws"
    found.append(Column(f"rougeL/{name}", title, True, 1, drawn))
    found.append(
      Column(f"rougeL_greedy/{name}", f"{title}, greedy", True, 1, "of greedy answers")
    )
  return found


def _fixed(row: Mapping[str, float]) -> dict[str, Spread]:
  """Of what does not depend on a seed."""
  names = {column.name for column in COLUMNS}
  return {k: Spread(v, None) for k, v in row.items() if k in names}


def _figures(run: Result, budget: float | None, unit: float | None) -> dict[str, float]:
  final, found = run["final"], {}
  for name in ("loss", "forward_kl", "reverse_kl", "top1_agreement"):
    found[name] = final.get(name)
  found["drift"] = final.get("adapted_drift")
  if analysis := run["analysis"]:
    found["acceptance"] = 100 * analysis["teacher"]["all"]["acceptance"]
    if "exposure_bias" in analysis:
      found["excess"] = analysis["exposure_bias"]["teacher"]["excess"]
    if "judge" in analysis:
      found["judge_kl"] = analysis["judge"]["kl"]
  if run["step_s"]:
    found["ms_a_step"] = 1000 * run["step_s"]
    found["relative_time"] = run["step_s"] / unit if unit else None
    for name, key in (("loss_at_time", "loss"), ("kl_at_time", "forward_kl")):
      found[name] = at_time(run["curve"], run["step_s"], budget, key)
  if run["peak"]:
    found["peak_mb"] = run["peak"]["peak_bytes"] / 1e6
  found["tokens"] = run["tokens"]
  for name, scores in run["sets"].items():
    found[f"rougeL/{name}"] = scores.get("rougeL")
    found[f"rougeL_greedy/{name}"] = scores.get("rougeL_greedy")
  return {k: v for k, v in found.items() if v is not None and math.isfinite(v)}


def _budget(runs: Sequence[Result]) -> float | None:
  """Seconds that a run of the baseline trains, the mean over seeds."""
  return _mean([r["step_s"] * r["steps"] if r["step_s"] else None for r in runs])


def _mean(values: Sequence[float | None]) -> float | None:
  known = [value for value in values if value is not None]
  return statistics.fmean(known) if known else None


def at_time(
  curve: Sequence[Mapping[str, float]],
  step_s: float,
  budget: float | None,
  key: str,
) -> float | None:
  """A figure after so many seconds of training, linear between evaluations.

  A run that has ended before keeps what it ended with.

  >>> curve = [{"step": 0, "loss": 4.0}, {"step": 10, "loss": 2.0}]
  >>> at_time(curve, 1.0, 5.0, "loss"), at_time(curve, 1.0, 99.0, "loss")
  (3.0, 2.0)
  """
  points = [(row["step"] * step_s, row[key]) for row in curve if key in row]
  if not points or budget is None:
    return None
  for (t0, y0), (t1, y1) in zip(points, points[1:], strict=False):
    if t0 <= budget <= t1:
      return y0 + (y1 - y0) * (budget - t0) / (t1 - t0)
  return points[-1][1]


def _spreads(
  runs: Sequence[Mapping[str, float]], columns: Sequence[Column]
) -> dict[str, Spread]:
  found = {}
  for column in columns:
    values = [run[column.name] for run in runs if column.name in run]
    if values:
      std = statistics.stdev(values) if len(values) > 1 else None
      found[column.name] = Spread(statistics.fmean(values), std)
  return found


def _differences(
  runs: Sequence[Mapping[str, float]],
  others: Sequence[Mapping[str, float]],
  columns: Sequence[Column],
) -> dict[str, Difference]:
  found = {}
  for column in columns:
    pairs = [
      run[column.name] - other[column.name]
      for run, other in zip(runs, others, strict=True)
      if column.name in run and column.name in other
    ]
    if column.larger is not None and len(pairs) > 1:
      found[column.name] = difference(pairs)
  return found


def difference(values: Sequence[float]) -> Difference:
  """Mean and 95 % interval by Student's t.

  >>> found = difference([1.0, 2.0, 3.0])
  >>> print(f"{found.mean:.2f} {found.low:.2f} {found.high:.2f} {found.differs}")
  2.00 -0.48 4.48 False
  """
  mean = statistics.fmean(values)
  error = statistics.stdev(values) / math.sqrt(len(values))
  width = float(stats.t.ppf(0.975, len(values) - 1)) * error
  return Difference(mean, mean - width, mean + width)


def _curve(runs: Sequence[Result]) -> list[tuple[float, ...]]:
  """(step, seconds, loss, forward KL), means over the seeds that got there."""
  seconds = _mean([run["step_s"] for run in runs]) or math.nan
  by_step: dict[int, list[Mapping[str, float]]] = {}
  for run in runs:
    for row in run["curve"]:
      by_step.setdefault(row["step"], []).append(row)
  return [
    (
      step,
      step * seconds,
      *(_mean([row.get(k) for row in rows]) for k in ("loss", "forward_kl")),
    )
    for step, rows in sorted(by_step.items())
  ]


def _groups(runs: Sequence[Result]) -> dict[str, dict[str, float]]:
  """{group of difficulty: {figure: mean over seeds}}, against the frozen teacher."""
  tables = [run["analysis"]["teacher"] for run in runs]
  return {
    group: {
      figure: statistics.fmean(table[group][figure] for table in tables)
      for figure in tables[0][group]
    }
    for group in tables[0]
  }


def _excess(runs: Sequence[Result]) -> dict[str, list[float]]:
  """The curve of exposure bias against the frozen teacher: mean and std over seeds."""
  curves = [
    run["analysis"]["exposure_bias"]["teacher"]["curve"]["excess"]
    for run in runs
    if run["analysis"] and "exposure_bias" in run["analysis"]
  ]
  if not curves:
    return {}
  steps = list(zip(*curves, strict=True))
  several = len(curves) > 1
  return {
    "mean": [statistics.fmean(step) for step in steps],
    "std": [statistics.stdev(step) if several else 0.0 for step in steps],
  }
