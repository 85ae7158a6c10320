"""A study's results, made up, for tests of its table and its pages."""

from okd_jax.analysis import comparison
from okd_jax.config import read, study


def result(loss, kl, step_s=0.1, steps=100, **more):
  """What `run.study` would measure of one run."""
  curve = [
    {"step": s, "loss": 4 + (loss - 4) * s / steps, "forward_kl": kl}
    for s in range(0, steps + 1, 50)
  ]
  return {
    "final": {"loss": loss, "forward_kl": kl},
    "start": {"loss": 4.0},
    "teacher": {"loss": 3.0},
    "curve": curve,
    "steps": steps,
    "step_s": step_s,
    "tokens": 1000,
    "peak": {"peak_bytes": 2e6, "of": "process"},
    "machine": {"device": "cpu", "devices": 1, "jax": "0"},
    "analysis": None,
    "sets": {"qa": {"rougeL": 10 * loss}},
  } | more


def plan():
  """A study of three arms and three seeds."""
  config = read.defaults()
  config.data.eval = "rows.jsonl"
  arms = {name: {"method.name": name} for name in ("kd", "okd", "sft")}
  return study.Study(
    name="toy",
    about="A toy.",
    config=config,
    arms=arms,
    seeds=3,
    sets={"qa": "q.jsonl"},
  )


def found(plan):
  """Its table: okd has the least loss, at twice the time."""
  kd, okd, sft = (3.5, 3.6, 3.4), (3.2, 3.31, 3.1), (3.6, 3.5, 3.41)
  results = {}
  for name, losses, seconds in (("kd", kd, 0.1), ("okd", okd, 0.2), ("sft", sft, 0.05)):
    for seed, loss in enumerate(losses):
      results[f"{name}:{seed}"] = result(loss, loss / 10, seconds)
  return comparison.compare(plan, results)
