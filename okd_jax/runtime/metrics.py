"""Figures on their way out: metrics.jsonl always, TensorBoard and W&B as extras."""

import importlib
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from okd_jax.errors import UserError

# A larger value of these is better; of every other metric a smaller one is.
LARGER_IS_BETTER = ("rougeL", "exact_match", "top1_agreement")


class Writer:
  """Appends one JSON object a line: {"step": n, "kind": "train" | "eval", …}.

  Opening it for a run that resumes at `step` drops what the killed run had written but
  the resumed one will write again: rows beyond that step, and of an export. A run that
  starts anew gives -1.
  """

  def __init__(self, workdir: Path, step: int, tensorboard: bool, wandb: str):
    self._path = workdir / "metrics.jsonl"
    kept = [
      row for row in read(workdir) if row["step"] <= step and row["kind"] != "export"
    ]
    temporary = self._path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
    os.replace(temporary, self._path)
    self._file = open(self._path, "a", encoding="utf8")
    self._sinks = []
    if tensorboard:
      module = _extra("tensorboardX", "train.tensorboard", "tensorboard")
      self._tensorboard = module.SummaryWriter(str(workdir / "tensorboard"))
      self._sinks.append(self._to_tensorboard)
    if wandb:
      run = _extra("wandb", "train.wandb", "wandb").init(
        project=wandb, dir=str(workdir), resume="allow", id=workdir.name
      )
      self._sinks.append(lambda step, values: run.log(values, step=step))

  def write(self, step: int, kind: str, values: Mapping[str, float]) -> None:
    """Writes one row; a figure that is not finite is written as null."""
    row = {name: _number(value) for name, value in values.items()}
    self._file.write(json.dumps({"step": step, "kind": kind} | row) + "\n")
    self._file.flush()
    for sink in self._sinks:
      sink(
        step,
        {f"{kind}/{name}": value for name, value in row.items() if value is not None},
      )

  def _to_tensorboard(self, step, values):
    for name, value in values.items():
      self._tensorboard.add_scalar(name, value, step)

  def close(self) -> None:
    self._file.close()


def score_by(name: str) -> Callable[[Mapping[str, float]], float] | None:
  """What ranks checkpoints by metric `name`, larger being better; None for ''."""
  if not name:
    return None
  sign = 1 if name in LARGER_IS_BETTER else -1
  return lambda values: sign * values[name]


def stalled(evals: Mapping[int, Mapping[str, float]], best: str, patience: int) -> bool:
  """Whether the last `patience` evaluations brought nothing better than one before.

  evals: figures by step; step 0, of which there is no checkpoint, does not count. With
    patience 0, or no metric to go by, a run never stalls.
  """
  score = score_by(best)
  if not (score and patience):
    return False
  scores = [score(evals[step]) for step in sorted(evals) if step]
  if len(scores) <= patience:
    return False
  return not max(scores[-patience:]) > max(scores[:-patience])


def read(workdir: Path) -> list[dict]:
  """The rows of a run's metrics.jsonl; a last line cut short by a kill is left out."""
  path = workdir / "metrics.jsonl"
  if not path.exists():
    return []
  rows = []
  for line in path.read_text(encoding="utf8").splitlines():
    try:
      rows.append(json.loads(line))
    except json.JSONDecodeError:
      break
  return rows


def table(rows: Mapping[str, Mapping[str, float]], columns: Mapping[str, str]) -> str:
  """A plain-text table: a row a name, a column a metric; `columns` has their titles."""
  shown = {m: t for m, t in columns.items() if any(m in row for row in rows.values())}
  cells = [["", *shown.values()]]
  for name, row in rows.items():
    cells.append([name, *(_cell(row.get(metric)) for metric in shown)])
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  lines = [
    "  ".join(
      [line[0].ljust(widths[0])]
      + [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
    ).rstrip()
    for line in cells
  ]
  return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def finite_or_null(values: Mapping[str, Any]) -> dict[str, Any]:
  """Figures that are not finite become None: JSON has no NaN."""
  bad = {k for k, v in values.items() if isinstance(v, float) and not math.isfinite(v)}
  return {k: None if k in bad else v for k, v in values.items()}


def _cell(value) -> str:
  if value is None or not math.isfinite(value):
    return "–"
  digits = 3 if abs(value) < 10 else 2 if abs(value) < 100 else 1
  return f"{value:.{digits}f}"


def _number(value) -> float | None:
  value = float(value)
  return value if math.isfinite(value) else None


def _extra(module: str, key: str, extra: str):
  try:
    return importlib.import_module(module)
  except ImportError as error:
    raise UserError(
      f"{key} needs the package {module}; run pip install 'okd-jax[{extra}]'"
    ) from error
