"""`scarce` with ten times the text, where okd is not expected to win.

    python -m configs.studies.scarce                 # once: the data, seconds
    python -m okd_jax.study --config=configs/studies/plenty.py --workdir=runs/plenty

5790 windows instead of 579: neither the teacher, in the same 200 steps, nor a student,
in its 600, sees them twice as often as it should, so there is little for an online
teacher to mend. RESULTS.md has what came out.
"""

from configs.studies import scarce

_NAMES = ("sft", "kd", "rkd", "gkd", "okd", "okd, mode-seeking")
ARMS = {name: scarce.ARMS[name] for name in _NAMES}


def get_config():
  config = scarce.get_config()
  config.data.train = str(scarce.DATA / "plenty.jsonl")
  return config


def get_study():
  return {"arms": ARMS, "seeds": 3} | scarce.MEASURES
