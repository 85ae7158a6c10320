"""The paper's Figure 9 over `scarce`: the divergence's share in the student's loss.

    python -m configs.studies.scarce                 # once: the data, seconds
    python -m okd_jax.study --config=configs/studies/loss_weight.py \\
      --workdir=runs/figure9

The rest of the loss is cross-entropy on gold, so that a share of 0 is SFT. The paper's
average ROUGE-L for GPT-2 XL to base, read off the figure: 16.1 at 0, then 19.4 to 19.6
for OKD and 16.3 to 16.5 for KD.
"""

from configs.studies import scarce

# One and the same quantity, under the name that each method has for it.
_KNOBS = {"kd": "kd_ratio", "okd": "student_kl_weight"}
ARMS = {"sft": {"method.name": "sft"}} | {
  f"{method} {weight}": {"method.name": method, f"method.{knob}": weight}
  for method, knob in _KNOBS.items()
  for weight in (0.25, 0.5, 0.75, 1.0)
}

get_config = scarce.get_config


def get_study():
  roles = {"baseline": "kd 1.0", "unit": "okd 1.0"}
  return {"arms": ARMS, "seeds": 3} | roles | scarce.MEASURES
