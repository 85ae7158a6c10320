"""The loop keeps the devices busy: a step is dispatched before the last one is read."""

import traceback

import jax
import jax.numpy as jnp
import pytest
from small import config

from okd_jax.run import distill, loop

WAITS = ("__array__", "__float__", "__int__", "__bool__", "__index__", "item", "tolist")


class Spy:
  """Writes down, in order, each dispatch of a step and each wait for an array.

  The step is a stand-in that computes nothing, and nothing is evaluated.

  events: ('dispatch', n), or ('wait', n, where) for a metric of step n, for any other
    array with n = None.
  """

  def __init__(self, monkeypatch):
    self.events, self._metrics, self._steps = [], {}, 0
    monkeypatch.setattr(loop, "compile_step", lambda *_: self._dispatch)
    monkeypatch.setattr(loop, "Evaluator", _NoEvaluator)
    array = type(jnp.zeros(()))
    for name in (*WAITS, "block_until_ready"):
      monkeypatch.setattr(array, name, self._noted(getattr(array, name)))
    monkeypatch.setattr(jax, "block_until_ready", self._noted(jax.block_until_ready))

  def _dispatch(self, state, frozen, batch):
    self._steps += 1
    self.events.append(("dispatch", self._steps))
    values = {name: jnp.ones(()) for name in ("loss", "finite", "tokens")}
    # The arrays are kept, so that no other one gets the id of one of them.
    self._metrics |= {id(v): (self._steps, v) for v in values.values()}
    return state, values

  def _noted(self, method):
    def noting(array, *args, **kwargs):
      step, _ = self._metrics.get(id(array), (None, None))
      self.events.append(("wait", step, "".join(traceback.format_stack(limit=6))))
      return method(array, *args, **kwargs)

    return noting

  def between(self, step):
    """What was waited for after the dispatch of `step` and before the next one."""
    start = self.events.index(("dispatch", step)) + 1
    return self.events[start : self.events.index(("dispatch", step + 1))]


class _NoEvaluator:
  def __init__(self, run):
    self.said = {}

  def teachers(self, params=None):
    return {}

  def __call__(self, params):
    return {"loss": 1.0}


@pytest.mark.parametrize("name", ["kd", "ensemble"])
def test_between_two_steps_only_the_metrics_of_the_step_before_are_read(
  name, monkeypatch, tmp_path
):
  """Whatever else is waited for leaves the devices idle until the next dispatch."""
  spy = Spy(monkeypatch)
  changes = {"train.log_every": 1, "train.steps": 5, "eval.every": 0}
  # A reinforced ensemble's batch is prepared on the devices, from the parameters.
  changes["method.name"] = name
  if name == "ensemble":
    changes["method.weighting"] = "reinforced"
  distill.run(config(**changes), tmp_path / "run")
  assert not spy.between(1)
  for step in range(2, 5):
    waits = spy.between(step)
    assert waits, "the spy saw nothing"
    for _, read, where in waits:
      assert read == step - 1, f"step {step} runs, and this waits: {where}"
