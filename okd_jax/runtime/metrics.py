"""Figures on their way out: metrics.jsonl always, TensorBoard and W&B as extras.

Every process of a run has a `Writer`; that of process 0 alone writes.
"""

import hashlib
import importlib
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from okd_jax.errors import UserError
from okd_jax.runtime.files import write_text
from okd_jax.runtime.workdir import barrier, writes


class Writer:
  """Appends one JSON object a line: {"step": n, "kind": "train" | "eval", …}.

  Opening it for a run that resumes at `step` drops what the killed run had written but
  the resumed one will write again: rows beyond that step, and of an export. A run that
  starts anew gives -1. Close it: the extras lose their last rows otherwise.

  config: the run's, for W&B to show beside the curves.

  Attributes:
    kept: the rows that stay, of the run's earlier parts.
  """

  def __init__(
    self, workdir: Path, step: int, *, tensorboard: bool, wandb: str, config: Mapping
  ):
    rows = read(workdir) if step >= 0 else []
    self.kept = [row for row in rows if row["step"] <= step and row["kind"] != "export"]
    self._sinks, self._file = [], None
    barrier("metrics read")  # before the first of them is written
    if not writes():
      return
    if tensorboard:
      self._sinks.append(_TensorBoard(workdir))
    if wandb:
      self._sinks.append(_Wandb(workdir, wandb, config))
    path = workdir / "metrics.jsonl"
    write_text(path, "".join(json.dumps(row) + "\n" for row in self.kept))
    self._file = open(path, "a", encoding="utf8")

  def write(
    self, step: int, kind: str, values: Mapping[str, float], *, name: str = ""
  ) -> None:
    """Writes one row; a figure that is not finite is written as null.

    name: who was measured, where there are several of this kind.
    """
    if self._file is None:
      return
    row = {figure: _number(value) for figure, value in values.items()}
    head = {"step": step, "kind": kind} | ({"name": name} if name else {})
    self._file.write(json.dumps(head | row) + "\n")
    self._file.flush()
    group = f"{kind}/{name}" if name else kind
    shown = {f"{group}/{figure}": v for figure, v in row.items() if v is not None}
    for sink in self._sinks:
      sink.write(step, shown)

  def close(self) -> None:
    if self._file is not None:
      self._file.close()
    for sink in self._sinks:
      sink.close()


class _TensorBoard:
  def __init__(self, workdir: Path):
    module = _extra("tensorboardX", "train.tensorboard", "tensorboard")
    self._writer = module.SummaryWriter(str(workdir / "tensorboard"))

  def write(self, step: int, values: Mapping[str, float]) -> None:
    for name, value in values.items():
      self._writer.add_scalar(name, value, step)

  def close(self) -> None:
    self._writer.close()


class _Wandb:
  """A run on W&B, which a resumed run goes on with: a workdir has one id."""

  def __init__(self, workdir: Path, project: str, config: Mapping):
    path = workdir.resolve()
    stage = path.parent.name == "stages"
    self._run = _extra("wandb", "train.wandb", "wandb").init(
      project=project,
      dir=str(workdir),
      resume="allow",
      id=_run_id(path),
      name=f"{path.parent.parent.name}/{path.name}" if stage else path.name,
      config=dict(config),
    )

  def write(self, step: int, values: Mapping[str, float]) -> None:
    self._run.log(values, step=step)

  def close(self) -> None:
    self._run.finish()


def _run_id(path: Path) -> str:
  """The folder's name, and a digest: every recipe's stages have the same names."""
  readable = re.sub(r"[^A-Za-z0-9_.-]", "-", path.name)[:40]  # W&B refuses others
  return f"{readable}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:8]}"


def read(workdir: Path) -> list[dict]:
  """The rows of a run's metrics.jsonl; a last line cut short by a kill is left out.

  Raises:
    UserError: for any other line that is no row.
  """
  path = workdir / "metrics.jsonl"
  if not path.exists():
    return []
  *lines, torn = path.read_bytes().split(b"\n")
  rows = [_row(line) for line in lines]
  if None in rows:
    raise UserError(
      f"{path}, line {rows.index(None) + 1}: no row of figures; the file is damaged: "
      "delete it, and a run that goes on has the rows from its last checkpoint"
    )
  last = _row(torn)
  return rows if last is None else [*rows, last]


def _row(line: bytes) -> dict | None:
  try:
    row = json.loads(line)
  except ValueError:
    return None
  sound = isinstance(row, dict) and isinstance(row.get("step"), int)
  return row if sound and isinstance(row.get("kind"), str) else None


def finite_or_null(values: Mapping[str, Any]) -> dict[str, Any]:
  """Figures that are not finite become None: JSON has no NaN."""
  bad = {k for k, v in values.items() if isinstance(v, float) and not math.isfinite(v)}
  return {k: None if k in bad else v for k, v in values.items()}


def _number(value: float) -> float | None:
  value = float(value)
  return value if math.isfinite(value) else None


def _extra(module: str, key: str, extra: str) -> Any:
  try:
    return importlib.import_module(module)
  except ImportError as error:
    raise UserError(
      f"{key} needs the package {module}; run pip install 'okd-jax[{extra}]'"
    ) from error
