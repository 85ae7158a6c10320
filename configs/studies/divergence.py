"""The paper's Table V over `scarce`: the student's divergence, with and without OKD.

    python -m configs.studies.scarce                 # once: the data, seconds
    python -m okd_jax.study --config=configs/studies/divergence.py --workdir=runs/table5

The paper's average ROUGE-L for GPT-2 XL to large, KD then OKD: forward 19.4, 22.9;
reverse 21.2, 22.6; JSD 19.7, 22.8. The module's own divergence is the forward KL
throughout; the paper does not say which of the two it swapped.
"""

from configs.studies import scarce

DIVERGENCES = {
  "forward": "forward_kl",
  "reverse": "reverse_kl",
  "JSD": "jensen_shannon",
}
ARMS = {
  f"{method}, {name}": {"method.name": method, "method.divergence": divergence}
  for method in ("kd", "okd")
  for name, divergence in DIVERGENCES.items()
}

get_config = scarce.get_config


def get_study():
  roles = {"baseline": "kd, forward", "unit": "okd, forward"}
  return {"arms": ARMS, "seeds": 3} | roles | scarce.MEASURES
