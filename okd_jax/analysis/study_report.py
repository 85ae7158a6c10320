"""A study's results in its folder: report.html, table.md, table.csv and study.json."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from okd_jax.analysis import comparison, page, tables
from okd_jax.analysis.agreement import GROUPS
from okd_jax.analysis.comparison import Comparison, Spread
from okd_jax.analysis.plots import LIGHT, css, drawn, styled
from okd_jax.config.study import Study
from okd_jax.runtime.workdir import Workdir

_DOTS = ("loss", "forward_kl", "loss_at_time", "relative_time")


@dataclasses.dataclass(frozen=True)
class Picture:
  """One chart of the page, as inline SVG."""

  title: str
  note: str
  svg: str


def write(study: Study, found: Comparison, folder: Path) -> None:
  """Writes the four files; the same results give the same bytes."""
  workdir = Workdir(folder)
  workdir.write_text("table.md", tables.markdown(found))
  workdir.write_text("table.csv", tables.csv_text(found))
  workdir.write_json("study.json", _plain(study, found))
  text = page.template(_PAGE).render(
    style=css() + page.STYLE,
    title=f"Study {study.name}",
    about=study.about,
    found=found,
    tables=[
      (title, tables.cells(found, table), tables.verdicts(found, table))
      for table, title in comparison.TABLES.items()
    ],
    over_seeds=tables.over_seeds(found),
    pictures=pictures(found),
    arms=study.arms,
    machine=found.machine,
  )
  workdir.write_text("report.html", text + "\n")


def _plain(study: Study, found: Comparison) -> dict:
  return {
    "study": study.name,
    "seeds": found.seeds,
    "baseline": found.baseline,
    "machine": found.machine,
    "arms": {arm: dict(keys) for arm, keys in study.arms.items()},
    "runs": {arm: [dict(run) for run in runs] for arm, runs in found.runs.items()},
    "rows": {
      arm: {k: s._asdict() for k, s in row.items()} for arm, row in found.rows.items()
    },
    "differences": {
      arm: {k: d._asdict() | {"differs": d.differs} for k, d in row.items()}
      for arm, row in found.differences.items()
    },
    "groups": found.groups,
    "excess": found.excess,
    "curves": found.curves,
  }


def pictures(found: Comparison) -> list[Picture]:
  """The charts for which there are figures."""
  with styled():
    return list(_pictures(found))


def _pictures(found: Comparison) -> Iterator[Picture]:
  titles = {column.name: column for column in found.columns}
  for name in _DOTS:
    if name in titles:
      yield Picture(titles[name].title, titles[name].meaning, _dots(found, name))
  yield Picture("Loss by step", "held-out, means over seeds", _curves(found, 0))
  yield Picture("Loss by time", "held-out, seconds of training", _curves(found, 1))
  if found.groups:
    note = "frozen teacher to student, nats per token, by difficulty of the token"
    yield Picture("KL by difficulty", note, _by_group(found, "forward_kl", 1))
    note = "% of tokens, by difficulty of the token"
    drawing = _by_group(found, "top1_agreement", 100)
    yield Picture("Agreement by difficulty", note, drawing)
  if found.excess:
    note = (
      "excess accumulated error, %, by new tokens; the bands are one std over seeds"
    )
    yield Picture("Exposure bias", note, _excess(found))


def _colour(found: Comparison, arm: str) -> str:
  """The arms of the unit's family and the baseline stand out from the others."""
  if arm == found.baseline:
    return LIGHT["student"]
  if arm.partition(",")[0] == found.unit.partition(",")[0]:
    return LIGHT["adapted"]
  return LIGHT["teacher"]


def _dots(found: Comparison, name: str) -> str:
  """One row an arm: the mean, one standard deviation, the start as a line."""
  rows = {arm: found.rows[arm][name] for arm in found.runs if name in found.rows[arm]}
  figure = Figure(figsize=(5.4, 0.7 + 0.24 * len(rows)), layout="constrained")
  axes = figure.subplots()
  for place, (arm, spread) in enumerate(rows.items()):
    _dot(axes, place, spread, _colour(found, arm))
  axes.set_yticks(range(len(rows)), list(rows))
  axes.tick_params(axis="y", labelcolor=LIGHT["ink"], labelsize=8)
  axes.invert_yaxis()
  axes.grid(visible=False, axis="y")
  if found.baseline in rows:
    axes.axvline(rows[found.baseline].mean, color=LIGHT["student"], lw=0.8, ls=":")
  return drawn(figure, name)


def _dot(axes: Axes, place: int, spread: Spread, colour: str) -> None:
  axes.errorbar(
    spread.mean,
    place,
    xerr=spread.std or 0,
    color=colour,
    marker="o",
    markersize=4.5,
    elinewidth=1.4,
    capsize=0,
    ls="",
  )


def _curves(found: Comparison, across: int) -> str:
  """The held-out loss by step (0) or by seconds (1)."""
  figure = Figure(figsize=(5.4, 3.1), layout="constrained")
  axes = figure.subplots()
  for arm, curve in found.curves.items():
    points = [(row[across], row[2]) for row in curve if row[2] is not None]
    strong = arm in (found.baseline, found.unit)
    axes.plot(
      [x for x, _ in points],
      [y for _, y in points],
      color=_colour(found, arm),
      linewidth=1.8 if strong else 0.8,
      alpha=1 if strong else 0.5,
      label=arm if strong else None,
      zorder=3 if strong else 2,
    )
  axes.set_xlabel("seconds" if across else "step", loc="right")
  axes.legend(frameon=False, fontsize=8, labelcolor=LIGHT["ink"])
  return drawn(figure, f"curves{across}")


def _by_group(found: Comparison, figure_name: str, factor: float) -> str:
  """Hard and easy tokens of every arm (the paper's Figure 5)."""
  arms = list(found.groups)
  figure = Figure(figsize=(5.4, 0.9 + 0.24 * len(arms)), layout="constrained")
  axes = figure.subplots()
  looks = {"easy": "o", "all": "|", "hard": "s"}
  for place, arm in enumerate(arms):
    own = {g: factor * found.groups[arm][g][figure_name] for g in GROUPS}
    colour = _colour(found, arm)
    axes.plot([own["easy"], own["hard"]], [place] * 2, color=colour, lw=0.9, alpha=0.6)
    for group, marker in looks.items():
      axes.plot(own[group], place, color=colour, marker=marker, markersize=5, ls="")
  for group, marker in looks.items():
    axes.plot(
      [], [], color=LIGHT["ink"], marker=marker, ls="", label=group, markersize=5
    )
  axes.set_yticks(range(len(arms)), arms)
  axes.tick_params(axis="y", labelcolor=LIGHT["ink"], labelsize=8)
  axes.invert_yaxis()
  axes.grid(visible=False, axis="y")
  figure.legend(
    loc="outside lower right",
    ncols=3,
    frameon=False,
    labelcolor=LIGHT["ink"],
    fontsize=8,
  )
  return drawn(figure, figure_name)


def _excess(found: Comparison) -> str:
  figure = Figure(figsize=(5.4, 3.1), layout="constrained")
  axes = figure.subplots()
  for arm, own in found.excess.items():
    _band(axes, own, _colour(found, arm), arm, arm in (found.baseline, found.unit))
  axes.axhline(0, color=LIGHT["ink"], linewidth=0.8)
  axes.set_xlabel("new tokens", loc="right")
  axes.legend(frameon=False, fontsize=8, labelcolor=LIGHT["ink"])
  return drawn(figure, "excess")


def _band(
  axes: Axes,
  own: Mapping[str, Sequence[float]],
  colour: str,
  arm: str,
  strong: bool,
) -> None:
  steps = range(1, len(own["mean"]) + 1)
  if strong:
    low, high = (
      [m + sign * s for m, s in zip(own["mean"], own["std"], strict=True)]
      for sign in (-1, 1)
    )
    axes.fill_between(steps, low, high, color=colour, alpha=0.15, lw=0)
  axes.plot(
    steps,
    own["mean"],
    color=colour,
    linewidth=1.8 if strong else 0.8,
    alpha=1 if strong else 0.5,
    label=arm if strong else None,
  )


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>{{ style | safe }}</style>
</head>
<body>
<h1>{{ title }}</h1>
<pre class="about">{{ about }}</pre>
{% macro table(rows) %}
<div class="scroll"><table class="summary wide">
<thead><tr>
{% for cell in rows[0] %}<th scope="col">{{ cell }}</th>{% endfor %}
</tr></thead>
<tbody>
{% for row in rows[1:] %}
<tr><th scope="row">{{ row[0] }}</th>
{% for cell in row[1:] %}
<td data-title="{{ rows[0][loop.index] }}">{{
cell | replace("no difference", "no\u00a0difference") }}</td>
{% endfor %}
</tr>
{% endfor %}
</tbody></table></div>
{% endmacro %}

<p>{{ over_seeds }} The unit of time is {{ found.unit }}.</p>
{% for title, cells, verdicts in tables %}
<h2>{{ title }}</h2>
{{ table(cells) }}
{% if found.seeds > 1 %}
<h3>Differences from {{ found.baseline }}</h3>
<p>Seed by seed: the mean and its 95 % interval by Student's t. An interval that holds 0
shows no difference.</p>
{{ table(verdicts) }}
{% endif %}
{% endfor %}
<h2>What the columns mean</h2>
<dl>
{% for column in found.columns %}
<dt>{{ column.title }}</dt><dd>{{ column.meaning }}</dd>
{% endfor %}
</dl>

<h2>Charts</h2>
<p>The baseline {{ found.baseline }} is blue, the arms of
{{ found.unit.partition(",")[0] }} are orange. Bars are one standard
deviation over seeds.</p>
<div class="charts">
{% for picture in pictures %}
<figure>
<figcaption><b>{{ picture.title }}</b> {{ picture.note }}</figcaption>
{{ picture.svg | safe }}
</figure>
{% endfor %}
</div>

<h2>What ran</h2>
<p>Each run is a folder of its own, runs/ARM/SEED, with its own report.html. On
{{ found.machine.devices }} × {{ found.machine.device }}, jax
{{ found.machine.jax }}.</p>
<dl>
{% for arm, keys in arms.items() %}
<dt><a href="runs/{{ arm | urlencode }}/0/report.html">{{ arm }}</a></dt>
<dd>{% for key, value in keys.items() %}{{ key }}={{ value | json }} {% endfor %}</dd>
{% endfor %}
</dl>
</body></html>"""
