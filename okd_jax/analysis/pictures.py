"""What `analysis.pair` found, as pictures (PNG) and as a table of plain text."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from okd_jax.analysis.agreement import GROUPS
from okd_jax.analysis.plots import LIGHT, styled

Found = Mapping[str, Any]

_TITLES = {"teacher": "frozen teacher", "adapted": "adapted teacher"}
_COLOUR = {"teacher": "student", "adapted": "adapted"}  # of bars and lines against it
_WHO = {"teacher": "teacher", "student": "student", "adapted": "adapted"}
# (figure, title, factor, digits), in the order of the table
_ROWS = (
  ("forward_kl", "KL(teacher‖student)", 1, 3),
  ("reverse_kl", "KL(student‖teacher)", 1, 3),
  ("top1_agreement", "top-1 agreement %", 100, 1),
  ("acceptance", "acceptance %", 100, 1),
  ("loss", "student's loss", 1, 3),
  ("teacher_loss", "teacher's loss", 1, 3),
  ("student_std", "std of student's logits", 1, 2),
  ("teacher_std", "std of teacher's logits", 1, 2),
  ("student_std_top", "… over teacher's top 50", 1, 2),
  ("teacher_std_top", "… teacher's own", 1, 2),
  ("head_gap", "|p - q| in teacher's head", 1, 3),
  ("tail_gap", "|p - q| in its tail", 1, 3),
  ("head_mass", "student's mass on the head", 1, 3),
)


def table(found: Found) -> str:
  """The figures by group, a column a group; and what is measured over whole texts."""
  lines = []
  for name in ("teacher", "adapted"):
    if name not in found:
      continue
    groups = [group for group in GROUPS if group in found[name]]
    lines.append(
      f"against the {_TITLES[name]:24}" + "".join(f"{g:>10}" for g in groups)
    )
    for figure, title, factor, digits in _ROWS:
      values = (factor * found[name][group][figure] for group in groups)
      cells = "".join(f"{value:10.{digits}f}" for value in values)
      lines.append(f"  {title:34}{cells}")
  for name, own in found.get("exposure_bias", {}).items():
    lines.append(
      f"exposure bias against the {_TITLES[name]}, {own['length']} tokens: "
      f"{own['excess']:.1f} % (95 %: {own['low']:.1f} to {own['high']:.1f})"
    )
  errors = ", ".join(f"{k} {v['error']:.3f}" for k, v in found["calibration"].items())
  return "\n".join([*lines, f"calibration error: {errors}"])


def draw(found: Found, folder: Path) -> None:
  """Writes the pictures that there are figures for."""
  folder.mkdir(parents=True, exist_ok=True)
  with styled():
    _save(_by_difficulty(found), folder / "difficulty.png")
    _save(_calibration(found), folder / "calibration.png")
    _save(_top_tokens(found), folder / "top_tokens.png")
    if "exposure_bias" in found:
      _save(_exposure_bias(found), folder / "exposure_bias.png")


def _save(figure: Figure, path: Path) -> None:
  figure.savefig(path, dpi=150, facecolor="white", metadata={"Software": None})


def _by_difficulty(found: Found) -> Figure:
  figure = Figure(figsize=(8, 3.2), layout="constrained")
  left, middle, right = figure.subplots(1, 3)
  panels = (
    (left, "forward_kl", "KL(teacher‖student)", "nats per token", 1),
    (middle, "top1_agreement", "Top-1 agreement", "% of tokens", 100),
    (right, "student_std_top", "Spread of the student's logits", "std, top 50", 1),
  )
  names = [name for name in ("teacher", "adapted") if name in found]
  for axes, key, title, unit, factor in panels:
    for i, name in enumerate(names):
      groups = [group for group in GROUPS if group in found[name]]
      values = [factor * found[name][group][key] for group in groups]
      width = 0.8 / len(names)
      places = [j + (i - (len(names) - 1) / 2) * width for j in range(len(groups))]
      bars = axes.bar(
        places,
        values,
        width * 0.94,
        color=LIGHT[_COLOUR[name]],
        label=f"against the {_TITLES[name]}",
      )
      axes.bar_label(bars, fmt="{:.3g}", fontsize=7, padding=1, color=LIGHT["ink"])
    axes.set_xticks(range(len(GROUPS)), GROUPS)
    axes.set_title(title, fontsize=9, loc="left", color=LIGHT["strong"])
    axes.set_ylabel(unit)
    axes.grid(visible=False, axis="x")
  if len(names) > 1:
    handles = left.get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=2, frameon=False)
  return figure


def _exposure_bias(found: Found) -> Figure:
  figure = Figure(figsize=(5.4, 3.2), layout="constrained")
  axes = figure.subplots()
  for name, own in found["exposure_bias"].items():
    curve, steps = own["curve"], range(1, own["length"] + 1)
    colour = LIGHT[_COLOUR[name]]
    axes.fill_between(
      steps, curve["low"], curve["high"], color=colour, alpha=0.15, lw=0
    )
    axes.plot(steps, curve["excess"], color=colour, label=_TITLES[name])
  axes.axhline(0, color=LIGHT["ink"], linewidth=0.8)
  axes.set_xlabel("new tokens", loc="right")
  axes.xaxis.set_major_locator(ticker.MaxNLocator(8, integer=True))
  axes.set_title("Excess accumulated error, % (0: none)", fontsize=9, loc="left")
  axes.legend(frameon=False, fontsize=8)
  return figure


def _calibration(found: Found) -> Figure:
  figure = Figure(figsize=(4, 3.6), layout="constrained")
  axes = figure.subplots()
  axes.plot([0, 1], [0, 1], color=LIGHT["grid"], linewidth=1)
  for name, own in found["calibration"].items():
    bins = own["bins"]
    axes.plot(
      [b["confidence"] for b in bins],
      [b["accuracy"] for b in bins],
      color=LIGHT[_WHO[name]],
      marker="o",
      markersize=3.5,
      label=f"{name}, error {own['error']:.3f}",
    )
  axes.set(xlim=(0, 1), ylim=(0, 1))
  axes.set_xlabel("probability of the first choice", loc="right")
  axes.set_title("Share of first choices that are right", fontsize=9, loc="left")
  axes.legend(frameon=False, fontsize=8)
  return figure


def _top_tokens(found: Found) -> Figure:
  places = found["top_tokens"]
  figure = Figure(figsize=(8, 2.6 * len(places)), layout="constrained")
  column = figure.subplots(len(places), squeeze=False)[:, 0]
  for axes, place in zip(column, places, strict=True):
    _plot_place(axes, place)
  return figure


def _plot_place(axes: Axes, place: Found) -> None:
  rows = place["tokens"]
  across = range(len(rows))
  axes.bar(
    across, [row["teacher"] for row in rows], color=LIGHT["grid"], label="teacher"
  )
  for name in [n for n in ("student", "adapted") if n in rows[0]]:
    axes.plot(
      across,
      [row[name] for row in rows],
      color=LIGHT[_WHO[name]],
      marker="o",
      markersize=2.5,
      linewidth=0.8,
      label=name,
    )
  labels = [row["token"].replace("$", r"\$") for row in rows]
  axes.set_xticks(across, labels, rotation=90, fontsize=6)
  axes.set_yscale("log")
  before = " ".join(place["before"].split())[-60:].replace("$", r"\$")
  gold = place["gold"].replace("$", r"\$")
  axes.set_title(f"after “…{before}”, gold “{gold}”", fontsize=8, loc="left")
  axes.grid(visible=False, axis="x")
  axes.legend(frameon=False, fontsize=7)
