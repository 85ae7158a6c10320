"""The trace of some steps: which ones, where, and that it ends as the loop does."""

import gzip
import json

import jax
import jax.numpy as jnp
import pytest

from okd_jax.run.trace import Trace


def loop(trace, step, steps, fail_at=None):
  """Counts from `step` to `steps` on the device, as a run would."""
  state, add = jnp.float32(step), jax.jit(lambda x: x + 1)
  with trace:
    while step < steps:
      trace.begin(step + 1, state)
      state = add(state)
      step += 1
      if step == fail_at:
        raise RuntimeError("in the middle")
  return float(state)


def traced(folder):
  """The step numbers that the only trace below a folder has marked."""
  [path] = folder.rglob("perfetto_trace.json.gz")
  events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
  marks = [e["args"]["step_num"] for e in events if e.get("name") == "train"]
  return sorted(map(int, marks))


@pytest.mark.parametrize(
  "start, steps, wanted",
  [(0, 20, [3, 4, 5, 6, 7]), (10, 14, [13, 14]), (0, 7, [3, 4, 5, 6, 7]), (4, 5, [5])],
)
def test_some_steps_after_the_start_are_traced(start, steps, wanted, tmp_path):
  assert loop(Trace(tmp_path, start, steps), start, steps) == steps
  assert traced(tmp_path) == wanted
  assert list(tmp_path.rglob("*.xplane.pb"))  # what TensorBoard reads


def test_a_loop_that_fails_leaves_its_trace_behind(tmp_path):
  with pytest.raises(RuntimeError, match="in the middle"):
    loop(Trace(tmp_path / "one", 0, 20), 0, 20, fail_at=4)
  assert traced(tmp_path / "one") == [3, 4]
  loop(Trace(tmp_path / "two", 0, 3), 0, 3)  # so none was going on
  assert traced(tmp_path / "two") == [3]


def test_a_loop_that_fails_before_leaves_nothing(tmp_path):
  with pytest.raises(RuntimeError, match="in the middle"):
    loop(Trace(tmp_path, 0, 20), 0, 20, fail_at=1)
  assert not list(tmp_path.iterdir())


def test_nothing_is_traced_unasked(monkeypatch):
  monkeypatch.setattr(jax.profiler, "start_trace", None)
  assert loop(Trace(None, 0, 9), 0, 9) == 9


def test_it_is_said_how_to_open_it(caplog, tmp_path):
  caplog.set_level("INFO", "okd_jax")
  loop(Trace(tmp_path, 0, 5), 0, 5)
  [path] = tmp_path.rglob("perfetto_trace.json.gz")
  assert f"steps 3 to 5: open {path} at https://ui.perfetto.dev" in caplog.text
  assert f"tensorboard --logdir={tmp_path}" in caplog.text


def test_every_process_has_a_folder_of_its_own(monkeypatch, tmp_path):
  """jax names what it writes by the time alone, and refuses two traces in one place."""
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  loop(Trace(tmp_path, 0, 5), 0, 5)
  assert traced(tmp_path / "process-1") == [3, 4, 5]
