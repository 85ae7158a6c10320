"""A study's comparison as text: for a terminal, Markdown, CSV and the report."""

import csv
import io
import textwrap
from collections.abc import Sequence

from okd_jax.analysis.comparison import (
  TABLES,
  Column,
  Comparison,
  Difference,
  Spread,
)


def _cell(spread: Spread | None, digits: int) -> str:
  if spread is None:
    return "–"
  mean = f"{spread.mean:,.{digits}f}"
  if spread.std is None or not spread.std:
    return mean
  return f"{mean} ± {spread.std:,.{digits}f}"


def cells(found: Comparison, table: str) -> list[list[str]]:
  """One of TABLES as text, titles first; of rows those that have anything in it."""
  columns = [c for c in found.columns if c.table == table]
  head = ["", *(column.title for column in columns)]
  body = [
    [arm, *(_cell(row.get(c.name), c.digits) for c in columns)]
    for arm, row in found.rows.items()
    if any(c.name in row for c in columns)
  ]
  return [head, *body]


def verdicts(found: Comparison, table: str) -> list[list[str]]:
  """The differences from the baseline in one of TABLES as text, titles first."""
  columns = [
    c
    for c in found.columns
    if c.table == table and any(c.name in own for own in found.differences.values())
  ]
  head = ["", *(column.title for column in columns)]
  body = [
    [arm, *(_verdict(own.get(c.name), c) for c in columns)]
    for arm, own in found.differences.items()
  ]
  return [head, *body]


def _verdict(value: Difference | None, column: Column) -> str:
  """'-0.061 [-0.070, -0.052] better', or that there is no difference."""
  if value is None:
    return "–"
  d = column.digits
  text = f"{value.mean:+,.{d}f} [{value.low:+,.{d}f}, {value.high:+,.{d}f}]"
  if not value.differs:
    return f"{text} no difference"
  return f"{text} {'better' if (value.mean > 0) == column.larger else 'worse'}"


def text(found: Comparison) -> str:
  """Both tables, and in words how their arms differ from the baseline.

  For a terminal, on which a table of all differences would be far too wide.
  """
  parts = [f"{title}\n{_aligned(cells(found, t))}" for t, title in TABLES.items()]
  if found.seeds > 1:
    parts.append(
      f"Beside {found.baseline}, seed by seed: mean, 95 % interval; one that holds 0 "
      "shows no difference"
    )
    parts += [_in_words(found, arm) for arm in found.differences]
  return "\n\n".join(parts)


def _in_words(found: Comparison, arm: str) -> str:
  """What of an arm is better, what worse, and what no different."""
  groups: dict[str, list[str]] = {"better": [], "worse": [], "no difference": []}
  for column in found.columns:
    if value := found.differences[arm].get(column.name):
      said = _verdict(value, column)
      verdict = next(name for name in groups if said.endswith(name))
      figures = said.removesuffix(f" {verdict}") if value.differs else ""
      groups[verdict].append(f"{column.title} {figures}".strip())
  lines = [arm]
  for verdict, said in groups.items():
    if said:
      indent = " " * 4
      lines += textwrap.wrap(
        f"{verdict}: {'; '.join(said)}",
        88,
        initial_indent="  ",
        subsequent_indent=indent,
      )
  return "\n".join(lines)


def _aligned(table: Sequence[Sequence[str]]) -> str:
  widths = [max(map(len, column)) for column in zip(*table, strict=True)]
  lines = []
  for name, *row in table:
    cells = (c.rjust(w) for c, w in zip(row, widths[1:], strict=True))
    lines.append("  ".join([name.ljust(widths[0]), *cells]))
  return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def markdown(found: Comparison) -> str:
  """Both tables, the differences from the baseline, and what the columns mean."""
  parts = [over_seeds(found)]
  for table, title in TABLES.items():
    parts += [f"**{title}**", _pipes(cells(found, table))]
    if found.seeds > 1:
      parts.append(
        f"Differences from {found.baseline}, seed by seed: means and 95 % intervals "
        "(Student's t):"
      )
      parts.append(_pipes(verdicts(found, table)))
  about = "\n".join(f"- **{c.title}**: {c.meaning}" for c in found.columns)
  return "\n\n".join([*parts, about]) + "\n"


def over_seeds(found: Comparison) -> str:
  """What the cells are."""
  if found.seeds == 1:
    return "One seed: nothing here tells a difference from chance."
  return f"Means ± standard deviation over {found.seeds} seeds."


def _pipes(table: Sequence[Sequence[str]]) -> str:
  rows = ["| " + " | ".join(row) + " |" for row in table]
  line = "| --- |" + " ---: |" * (len(table[0]) - 1)
  return "\n".join([rows[0], line, *rows[1:]])


def csv_text(found: Comparison) -> str:
  """One row a run: its arm, its seed and every figure."""
  buffer = io.StringIO()
  writer = csv.writer(buffer, lineterminator="\n")
  writer.writerow(["arm", "seed", *(column.name for column in found.columns)])
  for arm, runs in found.runs.items():
    for seed, run in enumerate(runs):
      writer.writerow([arm, seed, *(run.get(c.name, "") for c in found.columns)])
  return buffer.getvalue()
