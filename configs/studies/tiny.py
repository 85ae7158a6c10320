"""The smallest study that is a real one: minutes on two cores, no download.

    python -m okd_jax.study --config=configs/studies/tiny.py --workdir=runs/tiny

Quickstart's teacher, its starts and its data (the Python documentation) with a third of
the steps: sft, kd, gkd and okd, two seeds each. It shows what a study gives; its
differences are mostly noise, and it says so.
"""

from configs import quickstart

ARMS = {name: {"method.name": name} for name in ("sft", "kd", "gkd", "okd")}


def get_config():
  config = quickstart.get_config()
  config.train.steps = 60
  config.checkpoint.every = 30
  config.eval.every = 20
  config.eval.limit = 160
  config.eval.generate = False
  config.stages.teacher["train"]["steps"] = 150
  return config


def get_study():
  return {
    "arms": ARMS,
    "seeds": 2,
    "sets": {"documentation": "embedded:eval"},
    "protocol": {"limit": 64, "max_new_tokens": 24, "batch_size": 64},
    "excess": 8,
  }
