"""OKD at less than its price, over `scarce`: the module learns from some rows or steps.

    python -m configs.studies.scarce                 # once: the data, seconds
    python -m okd_jax.study --config=configs/studies/cheap.py --workdir=runs/cheap

Both kinds of OKD, the paper's and the mode-seeking one; the module learns from one row
in 1, 4, 8 or 16, or from all rows in every fourth step. The adapted teacher teaches in
every step and with every row all the same.
"""

from configs.studies import scarce

SHARES = {
  "": {},
  ", rows .25": {"adapter.rows": 0.25},
  ", rows .125": {"adapter.rows": 0.125},
  ", rows .0625": {"adapter.rows": 0.0625},
  ", every 4": {"adapter.every": 4},
}
KINDS = ("okd", "okd, mode-seeking")
ARMS = {"kd": scarce.ARMS["kd"]} | {
  f"{kind}{share}": scarce.ARMS[kind] | keys
  for kind in KINDS
  for share, keys in SHARES.items()
}

get_config = scarce.get_config


def get_study():
  return {"arms": ARMS, "seeds": 5, "baseline": "okd"} | scarce.MEASURES
