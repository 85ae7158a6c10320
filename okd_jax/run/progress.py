"""What a person sees of a run: a bar on a terminal, plain lines elsewhere."""

import dataclasses
import sys
import time
from collections.abc import Mapping

import jax
import numpy as np
from jaxtyping import Array, Float
from tqdm import tqdm

from okd_jax.evaluation import figures
from okd_jax.run.build import Run
from okd_jax.run.nonfinite import NotFinite, terms
from okd_jax.runtime.metrics import Writer
from okd_jax.runtime.workdir import writes


class Progress:
  """Reads steps' metrics: checks them, writes them down and shows them.

  A bar on a terminal, plain lines elsewhere.
  """

  def __init__(self, run: Run, writer: Writer, step: int):
    self._run, self._writer = run, writer
    self._every = run.settings.train.log_every
    # Now: a rate computed between two steps would wait for the one that runs then.
    rates = jax.vmap(run.plan.learning_rate)(np.arange(run.plan.steps))
    self._rates = jax.device_get(rates)
    self._tokens, self._since, self._total = 0.0, time.monotonic(), 0.0
    self._first, self._last, self._begin = step, step, time.monotonic()
    self._sampled: dict[str, list[float]] = {}
    self._bar = tqdm(
      total=run.plan.steps,
      initial=step,
      unit="step",
      dynamic_ncols=True,
      disable=not (sys.stderr.isatty() and writes()),
      desc=run.settings.method.name,
    )

  def __enter__(self):
    return self

  def __exit__(self, *_: object) -> None:
    self._bar.close()

  def read(
    self,
    step: int,
    rows: np.ndarray,
    values: Mapping[str, Float[Array, ""]],
    sampled: Mapping[str, float],
    compiled: bool = False,
  ) -> None:
    """Waits for one step's metrics; `sampled` are the figures of its sampling.

    compiled: whether the step waited for its program; it then has a row of its own.

    Raises:
      NotFinite: if a figure, a gradient or an update is not finite, and the step may
        not be skipped; nothing of it is ever saved.
    """
    values = {name: float(v) for name, v in jax.device_get(values).items()}
    finite, skipped = bool(values.pop("finite")), int(values.pop("skipped", 0))
    updates = step - skipped - (1 if finite else 0)  # before this one
    if not finite:
      self._skip(NotFinite(step, rows, values, skipped))
    self._tokens += values["tokens"]
    for name, value in sampled.items():
      self._sampled.setdefault(name, []).append(value)
    self._bar.update(1)
    alone = compiled or step == self._first + 1
    if alone or step % self._every == 0 or step == self._run.plan.steps:
      now = time.monotonic()
      elapsed = now - self._since
      values["tokens_per_s"] = self._tokens / elapsed
      values["step_s"] = elapsed / (step - self._last)
      values |= self._about_sampling(elapsed)
      values["lr"] = float(str(self._rates[updates]))  # 0.0005, not 0.00050000002
      self._tokens, self._since, self._sampled, self._last = 0.0, now, {}, step
      self._writer.write(step, "train", values)
      self._show(step, values)

  def _skip(self, found: NotFinite) -> None:
    """Tells of a step whose update was left out; raises it if it was one too many."""
    allowed = self._run.settings.train.skips
    if not 0 < found.skipped <= allowed:  # -1: it was not left out as a whole
      raise found
    self._writer.write(found.step, "skipped", {"skipped": found.skipped})
    self._print(
      f"step {found.step}: update {found.skipped} of at most {allowed} skipped, since "
      f"not finite {terms(found.values)}; its rows are "
      f"{self._run.data.where(found.rows)}"
    )

  def _about_sampling(self, elapsed: float) -> dict[str, float]:
    """Means since the last row of those steps that have them, and the time's share."""
    seconds = sum(self._sampled.pop("sampling_s", []))
    means = {name: sum(v) / len(v) for name, v in self._sampled.items()}
    return means | ({"sampling_time_share": seconds / elapsed} if seconds else {})

  def show_scores(self, scores: Mapping[str, float]) -> None:
    shown = [
      (f.title, scores[f.name]) for f in figures.columns().values() if f.name in scores
    ]
    self._print("  ".join(f"{title} {value:.4g}" for title, value in shown))

  def paused(self) -> "_Paused":
    """A context whose time does not count as training time."""
    return _Paused(self)

  def forget(self, seconds: float) -> None:
    self._since += seconds
    self._begin += seconds

  def _show(self, step: int, values: Mapping[str, float]) -> None:
    speed = f"{values['tokens_per_s']:.0f} tokens/s"
    if not self._bar.disable:
      self._bar.set_postfix_str(f"loss {values['loss']:.4f}, {speed}")
      return
    left = self._run.plan.steps - step
    spent = (time.monotonic() - self._begin) / max(step - self._first, 1)
    eta = tqdm.format_interval(left * spent)
    self._print(
      f"{self._run.settings.method.name} step {step}/{self._run.plan.steps}  "
      f"loss {values['loss']:.4f}  {speed}  ETA {eta}"
    )

  def _print(self, line: str) -> None:
    if writes():
      tqdm.write(line, file=sys.stderr)


@dataclasses.dataclass
class _Paused:
  progress: Progress
  begin: float = 0.0

  def __enter__(self):
    self.begin = time.monotonic()

  def __exit__(self, *_: object) -> None:
    self.progress.forget(time.monotonic() - self.begin)
