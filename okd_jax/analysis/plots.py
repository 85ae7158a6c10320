"""A run's history, and its curves as inline SVG in the colours of the page."""

import collections
import dataclasses
import io
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from matplotlib import style, ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from okd_jax.evaluation.figures import FIGURES
from okd_jax.runtime import metrics

Figures = Mapping[str, float]
Rows = Mapping[int, Figures]

# In the light and in the dark. Charts are drawn in the light colours, which then give
# way to CSS variables: only the page knows whether it is light or dark. Blue, orange
# and green stay apart for the colour-blind.
_COLOURS = {
  "student": ("#0072b2", "#56b4e9"),
  "adapted": ("#d55e00", "#f0883e"),
  "drift": ("#009e73", "#3fc79a"),
  "teacher": ("#5c5f66", "#a3a8b0"),
  "ink": ("#3b3d41", "#c3c7cd"),
  "grid": ("#dcdee2", "#363a40"),
  "strong": ("#17181a", "#f1f2f4"),
  "soft": ("#f5f6f7", "#1f2226"),
  "page": ("#ffffff", "#16181b"),
}
LIGHT = {name: light for name, (light, _) in _COLOURS.items()}
_MAX_POINTS = 2000
_NICE = (1, 2, 5, 10)  # times a power of ten: the distances of ticks

_STYLE = {
  "svg.hashsalt": "okd_jax",  # the same run gives the same bytes
  "svg.fonttype": "none",  # text stays text, in the page's own font
  "font.size": 9,
  "axes.edgecolor": LIGHT["grid"],
  "axes.labelcolor": LIGHT["ink"],
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.grid": True,
  "axes.axisbelow": True,
  "axes.xmargin": 0.02,
  "grid.color": LIGHT["grid"],
  "grid.linewidth": 0.6,
  "xtick.color": LIGHT["grid"],
  "ytick.color": LIGHT["grid"],
  "xtick.labelcolor": LIGHT["ink"],
  "ytick.labelcolor": LIGHT["ink"],
  "lines.solid_capstyle": "round",
}


@dataclasses.dataclass(frozen=True)
class History:
  """The figures of metrics.jsonl by kind and, ascending, by step; all are finite.

  teachers: the frozen teachers', which never change, by name; the only one's is ''.
  exported: the step of the exported student, or None.
  lost: how often each figure was not finite and is therefore missing.
  skipped: the steps whose update was left out (train.on_nonfinite).
  """

  teachers: Mapping[str, Figures]
  evals: Rows
  train: Rows
  exported: int | None
  lost: Mapping[str, int]
  skipped: Sequence[int] = ()

  @property
  def teacher(self) -> Figures:
    """The only teacher's figures; empty if there is none, or several."""
    return self.teachers.get("", {})

  @property
  def final(self) -> int | None:
    """The last evaluated step up to the exported one, if any."""
    limit = math.inf if self.exported is None else self.exported
    return max((step for step in self.evals if step <= limit), default=None)


def read_history(workdir: Path) -> History:
  """The history that a run's folder holds, however far the run has come."""
  kinds = collections.defaultdict(dict)
  teachers, lost = {}, collections.Counter()
  for row in metrics.read(workdir):
    values = {k: v for k, v in row.items() if k not in ("step", "kind", "name")}
    finite = {n: v for n, v in values.items() if v is not None and math.isfinite(v)}
    lost.update(values.keys() - finite.keys())
    # A run that was killed before its first checkpoint has its first rows twice.
    if row["kind"] == "teacher":
      teachers[row.get("name", "")] = finite
    else:
      kinds[row["kind"]][row["step"]] = finite
  exported = [int(row["exported_step"]) for row in kinds["export"].values()]
  return History(
    teachers=teachers,
    evals=dict(sorted(kinds["eval"].items())),
    train=dict(sorted(kinds["train"].items())),
    exported=exported[-1] if exported else None,
    lost=dict(sorted(lost.items())),
    skipped=sorted(kinds["skipped"]),
  )


@dataclasses.dataclass(frozen=True)
class Line:
  """One curve; `look` is 'strong' (with its points), 'plain', 'faint' or 'dashed'."""

  label: str
  colour: str
  look: str
  steps: Sequence[int]
  values: Sequence[float]


@dataclasses.dataclass(frozen=True)
class Chart:
  """Lines over training steps; `zero`: from 0 up, `small`: one of three in a row."""

  title: str
  unit: str
  lines: Sequence[Line]
  zero: bool = True
  small: bool = False

  def svg(self) -> str:
    return _draw(self)


def css() -> str:
  """The colours as CSS variables, such as var(--student); on paper always light."""
  light, dark = (
    " ".join(f"--{name}: {pair[i]};" for name, pair in _COLOURS.items()) for i in (0, 1)
  )
  return (
    f":root {{ color-scheme: light dark; {light} }}\n"
    f"@media screen and (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n"
  )


def charts(history: History) -> list[Chart]:
  """The charts for which there are data; very many training steps are thinned."""
  every = [*_quality(history), *_training(history)]
  shown = [
    dataclasses.replace(chart, lines=[line for line in chart.lines if _finite(line)])
    for chart in every
  ]
  return [chart for chart in shown if chart.lines]


def _quality(history: History) -> list[Chart]:
  train, evals = _thin(history.train), history.evals
  teacher = dict.fromkeys(evals, history.teacher)
  loss = [
    _line("student", "student", "strong", evals, "loss"),
    _line("on training rows", "student", "faint", train, "student_nll"),
    _line("teacher", "teacher", "dashed", teacher, "loss"),
    _line("adapted teacher", "adapted", "dashed", evals, "adapted_loss"),
  ]
  distance = [
    _line("teacher ‖ student", "student", "strong", evals, "forward_kl"),
    _line("in training", "student", "faint", train, "forward_kl"),
    _line("adapted ‖ student", "adapted", "strong", evals, "adapted_forward_kl"),
    _line("teacher ‖ adapted", "drift", "dashed", evals, "adapted_drift"),
    _line("in training", "drift", "faint", train, "drift"),
  ]
  rouge = [
    _line("student", "student", "strong", evals, "rougeL"),
    _line("teacher", "teacher", "dashed", teacher, "rougeL"),
  ]
  return [
    Chart("Loss", "held-out cross-entropy, nats per token", loss, zero=False),
    Chart("Distance to the teacher", "KL, nats per token", distance),
    Chart(FIGURES["rougeL"].title, "of the answers to held-out prompts", rouge),
  ]


def _training(history: History) -> list[Chart]:
  train = _thin(history.train)
  objective = [
    _line("student", "student", "faint", train, "student_loss"),
    _line("module", "adapted", "faint", train, "module_loss"),
    _line("total", "teacher", "faint", train, "loss"),
  ]
  gradient = [
    _line("student", "student", "faint", train, "student_grad_norm"),
    _line("module", "adapted", "faint", train, "adapter_grad_norm"),
  ]
  entropy = [
    _line("student", "student", "faint", train, "student_entropy"),
    _line("its teacher", "teacher", "faint", train, "teacher_entropy"),
  ]
  rate = [_line("student", "student", "plain", train, "lr")]
  later = dict(list(train.items())[1:]) or train  # the first row waits for compilation
  speed = [_line("training", "student", "faint", later, "tokens_per_s")]
  return [
    Chart("Training objective", "what the optimiser minimises", objective, zero=False),
    Chart("Gradient norm", "before clipping", gradient, small=True),
    Chart("Entropy", "on training rows, nats per token", entropy, small=True),
    Chart("Learning rate", "", rate, small=True),
    Chart("Speed", "tokens per second", speed, small=True),
  ]


def _thin(rows: Rows) -> Rows:
  """Every k-th row, the last one among them."""
  stride = max(-(-len(rows) // _MAX_POINTS), 1)
  kept = list(rows)[::-stride]
  return {step: rows[step] for step in reversed(kept)}


def _line(label: str, colour: str, look: str, rows: Rows, name: str) -> Line:
  """The figure `name` over steps; a gap where it is missing.

  Raises:
    KeyError: if it is undeclared, since a misspelt name would draw nothing.
  """
  name = FIGURES[name].name
  values = [row.get(name, math.nan) for row in rows.values()]
  return Line(label, colour, look, list(rows), values)


def _finite(line: Line) -> int:
  return sum(map(math.isfinite, line.values))


def styled() -> AbstractContextManager:
  """While charts are made: the user's own matplotlibrc must not change the report."""
  return style.context(["default", _STYLE])


def drawn(figure: Figure, title: str) -> str:
  """A figure as inline SVG, without marks at its ticks; to be called while `styled`."""
  for axes in figure.axes:
    axes.tick_params(length=0)
  return _inline(_svg(figure), title)


def _svg(figure: Figure) -> str:
  buffer = io.StringIO()
  metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
  figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
  return buffer.getvalue()


def _draw(chart: Chart) -> str:
  with styled():
    size = (3.5, 2.3) if chart.small else (5.4, 2.9)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    for line in reversed(chart.lines):  # the first on top
      _plot(axes, line)
    if chart.zero:
      axes.set_ylim(bottom=0)
    axes.set_xlabel("step", loc="right")
    axes.xaxis.set_major_locator(ticker.MaxNLocator(5, integer=True, steps=_NICE))
    axes.yaxis.set_major_locator(ticker.MaxNLocator(5, min_n_ticks=4, steps=_NICE))
    for axis in (axes.xaxis, axes.yaxis):
      axis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    return drawn(figure, chart.title)


def _plot(axes: Axes, line: Line) -> None:
  few = _finite(line) <= 30
  looks = {
    "strong": {"linewidth": 1.8, "marker": "o" if few else "", "markersize": 3.5},
    "faint": {"linewidth": 0.9, "alpha": 0.6},
    "plain": {"linewidth": 1.4},
    "dashed": {"linewidth": 1.4, "linestyle": (0, (4, 2.5))},
  }
  look = looks[line.look]
  if _finite(line) == 1:  # no line goes through a single point
    look = {"marker": "o", "markersize": 3.5}
  # Not clipped: half of a point that lies on an axis would be.
  axes.plot(line.steps, line.values, color=LIGHT[line.colour], clip_on=False, **look)


def _inline(svg: str, title: str) -> str:
  """A stand-alone SVG document as a part of a page."""
  svg = svg[svg.index("<svg") :].strip()
  svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
  # Its rule for every element and its fonts would be those of the whole page.
  svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
  svg = re.sub(r" font-family: [^;]*;", "", svg)
  # A browser scales it by its viewBox, whatever the width of the page.
  svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
  # Ids are those of the whole page.
  prefix = re.sub(r"\W", "", title)
  svg = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{prefix}-", svg)
  for name, colour in LIGHT.items():
    svg = svg.replace(colour, f"var(--{name})")
  return svg.replace("<svg", f'<svg role="img" aria-label="{title} by step"', 1)
