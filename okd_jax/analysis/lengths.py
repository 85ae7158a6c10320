"""How long rows are: a histogram for a terminal, percentiles, and a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int
from matplotlib.figure import Figure

from okd_jax.analysis.plots import LIGHT, styled

BINS = 10
_FINE = 40  # bins of the picture
_EIGHTHS = " ▏▎▍▌▋▊▉"
_PERCENTILES = (0, 25, 50, 75, 90, 99, 100)

Lengths = Mapping[str, Int[np.ndarray, " N"]]  # by what they are the lengths of


def edges(longest: int, bins: int = BINS) -> list[int]:
  """Where bins begin, and the last ends: whole numbers, evenly from 0 to `longest`.

  >>> edges(20, 4)
  [0, 5, 10, 15, 20]
  """
  found = np.linspace(0, longest, min(bins, longest) + 1).round()
  return found.astype(int).tolist()


def counts(lengths: Int[np.ndarray, " N"], bounds: Sequence[int]) -> list[int]:
  """How many lie in each bin, above its beginning and up to its end.

  >>> counts(np.array([0, 5, 6, 20]), [0, 5, 10, 20])
  [2, 1, 1]
  """
  place = np.searchsorted(bounds[1:-1], lengths, side="left")
  return np.bincount(place, minlength=len(bounds) - 1).tolist()


def percentiles(lengths: Int[np.ndarray, " N"]) -> dict[str, int]:
  """Some percentiles, by what people call them; each is the length of a row."""
  found = np.percentile(lengths, _PERCENTILES, method="lower")
  names = ["shortest", *(f"{p} %" for p in _PERCENTILES[1:-1]), "longest"]
  return dict(zip(names, found.astype(int).tolist(), strict=True))


def bar(share: float, width: int) -> str:
  """A bar of so many characters at most; what is not nothing is seen.

  >>> bar(0.5, 4), bar(0.001, 4), bar(0, 4)
  ('██', '▏', '')
  """
  eighths = max(round(share * width * 8), 1) if share > 0 else 0
  whole, rest = divmod(eighths, 8)
  return "█" * whole + _EIGHTHS[rest].strip()


def histogram(lengths: Lengths, longest: int, width: int = 22) -> list[str]:
  """Rows of text: a bin and, of each kind of length, a bar with its number."""
  bounds = edges(longest)
  columns = {name: counts(values, bounds) for name, values in lengths.items()}
  bins = [
    f"{first + 1 if first else 0:,} – {last:,}"
    for first, last in zip(bounds, bounds[1:], strict=False)
  ]
  left, room = max(map(len, [*bins, "tokens"])), width + 10
  lines = ["tokens".rjust(left) + "  " + "".join(n.ljust(room) for n in columns)]
  for i, name in enumerate(bins):
    cells = [
      f"{bar(own[i] / max(own), width)} {own[i]:,}".strip().ljust(room)
      if own[i]
      else "·".ljust(room)
      for own in columns.values()
    ]
    lines.append(name.rjust(left) + "  " + "".join(cells))
  return [line.rstrip() for line in lines]


def save_picture(lengths: Lengths, longest: int, path: Path) -> None:
  """The histogram as a PNG that can be read on a phone; each kind has its own axes."""
  colours = ("student", "adapted", "drift")
  with styled():
    size = (4.2, 0.7 + 1.45 * len(lengths))
    figure = Figure(figsize=size, layout="constrained", dpi=220)
    every = np.atleast_1d(figure.subplots(len(lengths), sharex=True))
    for axes, (name, values), colour in zip(
      every, lengths.items(), colours, strict=False
    ):
      bounds = edges(longest, _FINE)
      axes.stairs(counts(values, bounds), bounds, fill=True, color=LIGHT[colour])
      middle = percentiles(values)["50 %"]
      axes.axvline(middle, color=LIGHT["strong"], linewidth=1, linestyle=(0, (4, 2.5)))
      axes.set_title(
        f"{name}: median {middle:,}, longest {int(values.max()):,}",
        loc="left",
        fontsize=9,
        color=LIGHT["strong"],
      )
      axes.set_ylabel("rows")
      axes.grid(visible=False, axis="x")
      axes.tick_params(length=0)
      for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:,.10g}")
      axes.yaxis.get_major_locator().set_params(nbins=4, integer=True)
    every[-1].set_xlim(0, longest)
    every[-1].set_xlabel("tokens", loc="right")
    figure.savefig(path, metadata={"Software": None})
