"""Sampled rows kept for later steps, and when to sample new ones."""

from collections.abc import Mapping

import numpy as np

from okd_jax.methods.base.sequences import Replay

_STEPS = 10  # phi grows by a tenth


class Buffer:
  """The newest `capacity` sampled rows, and the step at which each was written.

  Arrays of fixed shapes in host memory: cheap to save, and the same in every process.

  kinds: (length, type) of each array of a row, by name.
  """

  def __init__(self, capacity: int, kinds: Mapping[str, tuple[int, type]]):
    self._rows = {
      name: np.zeros((capacity, length), kind) for name, (length, kind) in kinds.items()
    }
    self._written = np.zeros(capacity, np.int32)
    self._count = 0  # rows pushed so far

  def __len__(self) -> int:
    return min(self._count, len(self._written))

  @property
  def full(self) -> bool:
    return len(self) == len(self._written)

  def push(self, rows: Mapping[str, np.ndarray], step: int) -> None:
    """Stores rows, the oldest making room."""
    count = len(rows["tokens"])
    places = (self._count + np.arange(count)) % len(self._written)
    for name, values in rows.items():
      self._rows[name][places] = values
    self._written[places] = step
    self._count += count

  def draw(self, count: int, chance: np.random.Generator):
    """(rows, steps at which they were written), distinct if there are enough."""
    size = len(self)
    places = chance.choice(size, count, replace=count > size)
    rows = {name: values[places] for name, values in self._rows.items()}
    return rows, self._written[places]

  def state(self) -> dict[str, np.ndarray]:
    state = {name: values.copy() for name, values in self._rows.items()}
    return state | {
      "written": self._written.copy(),
      "count": np.array(self._count, np.int32),
    }

  def restore(self, state: Mapping[str, np.ndarray]) -> None:
    self._rows = {name: np.array(state[name]) for name in self._rows}
    self._written = np.array(state["written"])
    self._count = int(state["count"])


class Share:
  """DistiLLM's phi: the share of steps on sampled text, grown by the held-out loss."""

  def __init__(self, replay: Replay):
    self._replay = replay
    self._grown = 0  # times
    self._reference = np.nan  # before the first measurement

  @property
  def phi(self) -> float:
    return self._grown / _STEPS

  def fresh(self, progress: float) -> float:
    """The share of steps that sample anew, at a share of the run."""
    factor = {
      "decreasing": 1 - progress,
      "constant": 0.5,
      "increasing": progress,
    }[self._replay.ratio]
    return self.phi * factor

  def observe(self, loss: float) -> None:
    """phi grows, and the reference moves, only where the loss has risen by loss_eps."""
    if np.isnan(self._reference):
      self._reference = loss
    elif loss >= self._reference + self._replay.loss_eps:
      self._grown = min(self._grown + 1, _STEPS)
      self._reference = loss

  def state(self) -> dict[str, np.ndarray]:
    # A float64 as two integers: JAX, which restores it, would cut it to 32 bits.
    reference = np.array([self._reference]).view(np.uint32)
    return {"grown": np.array(self._grown, np.int32), "reference": reference}

  def restore(self, state: Mapping[str, np.ndarray]) -> None:
    self._grown = int(state["grown"])
    self._reference = float(np.asarray(state["reference"]).view(np.float64)[0])
