"""What a person sees of a run: a bar on a terminal, plain lines elsewhere."""

import dataclasses
import sys
import time

import jax
import numpy as np
from tqdm import tqdm

from okd_jax.errors import UserError
from okd_jax.evaluation.figures import COLUMNS
from okd_jax.run.build import Run
from okd_jax.runtime.metrics import Writer


class Progress:
  """Reads steps' metrics: checks them, writes them down and shows them.

  A bar on a terminal, plain lines elsewhere.
  """

  def __init__(self, parts: Run, writer: Writer, step: int):
    self._parts, self._writer = parts, writer
    self._every = parts.config.train.log_every
    # Now: a rate computed between two steps would wait for the one that runs then.
    rates = jax.vmap(parts.learning_rate)(np.arange(parts.steps))
    self._rates = jax.device_get(rates)
    self._tokens, self._since, self._total = 0.0, time.monotonic(), 0.0
    self._first, self._begin = step, time.monotonic()
    self._sampled: dict[str, list[float]] = {}
    self._bar = tqdm(
      total=parts.steps,
      initial=step,
      unit="step",
      dynamic_ncols=True,
      disable=not sys.stderr.isatty(),
      desc=parts.config.method.name,
    )

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._bar.close()

  def read(self, step: int, rows: np.ndarray, values, sampled) -> None:
    """Waits for one step's metrics; `sampled` are the sampler's figures of it.

    Raises:
      UserError: if the loss or a gradient is not finite, naming the batch's rows; the
        step left the state as it was.
    """
    values = {name: float(v) for name, v in jax.device_get(values).items()}
    if not values.pop("finite"):
      raise UserError(
        f"step {step}: the loss or a gradient is not finite (loss {values['loss']}); "
        f"its rows are {self._where(rows)}; the last checkpoint is sound: look at "
        "these rows, or lower optim.lr"
      )
    self._tokens += values["tokens"]
    for name, value in sampled.items():
      self._sampled.setdefault(name, []).append(value)
    self._bar.update(1)
    if step % self._every == 0 or step == self._parts.steps or step == self._first + 1:
      now = time.monotonic()
      values["tokens_per_s"] = self._tokens / (now - self._since)
      values |= self._about_sampling(now - self._since)
      values["lr"] = float(str(self._rates[step - 1]))  # 0.0005, not 0.00050000002
      self._tokens, self._since, self._sampled = 0.0, now, {}
      self._writer.write(step, "train", values)
      self._show(step, values)

  def _where(self, rows: np.ndarray) -> str:
    """Where the first rows come from; a packed one says how many texts it holds."""
    named = []
    for row in rows[:8]:
      first, *others = self._parts.packs[row]
      more = f" and {len(others)} texts with it" if others else ""
      named.append(self._parts.train[first].where + more)
    return ", ".join(named) + (", …" if len(rows) > 8 else "")

  def _about_sampling(self, elapsed: float) -> dict[str, float]:
    """Means since the last row of those steps that have them, and the time's share."""
    seconds = sum(self._sampled.pop("sampling_s", []))
    means = {name: sum(v) / len(v) for name, v in self._sampled.items()}
    return means | ({"sampling_time_share": seconds / elapsed} if seconds else {})

  def show_scores(self, scores) -> None:
    shown = {name: scores[name] for name in COLUMNS if name in scores}
    self._print("  ".join(f"{COLUMNS[name]} {v:.4g}" for name, v in shown.items()))

  def paused(self):
    """A context whose time does not count as training time."""
    return _Paused(self)

  def forget(self, seconds: float) -> None:
    self._since += seconds
    self._begin += seconds

  def _show(self, step, values) -> None:
    speed = f"{values['tokens_per_s']:.0f} tokens/s"
    if not self._bar.disable:
      self._bar.set_postfix_str(f"loss {values['loss']:.4f}, {speed}")
      return
    left = self._parts.steps - step
    spent = (time.monotonic() - self._begin) / max(step - self._first, 1)
    eta = tqdm.format_interval(left * spent)
    self._print(
      f"{self._parts.config.method.name} step {step}/{self._parts.steps}  "
      f"loss {values['loss']:.4f}  {speed}  ETA {eta}"
    )

  def _print(self, line: str) -> None:
    tqdm.write(line, file=sys.stderr)


@dataclasses.dataclass
class _Paused:
  progress: Progress
  begin: float = 0.0

  def __enter__(self):
    self.begin = time.monotonic()

  def __exit__(self, *_):
    self.progress.forget(time.monotonic() - self.begin)
