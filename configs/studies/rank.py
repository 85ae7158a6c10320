"""The paper's Figure 8 over `scarce`: the rank of OKD's LoRA modules.

    python -m configs.studies.scarce                 # once: the data, seconds
    python -m okd_jax.study --config=configs/studies/rank.py --workdir=runs/figure8

The paper's average ROUGE-L for GPT-2 XL to base, read off the figure: 19.3, 19.7, 19.4
and 19.4 for ranks 16, 32, 64 and 128 at a width of 1600. Here the width is 64: ranks
below it, down to 2.
"""

from configs.studies import scarce

ARMS = {"kd": {"method.name": "kd"}} | {
  f"okd {rank}": {"method.name": "okd", "adapter.rank": rank} for rank in (2, 8, 32, 64)
}

get_config = scarce.get_config


def get_study():
  return {"arms": ARMS, "seeds": 3, "unit": "okd 32"} | scarce.MEASURES
