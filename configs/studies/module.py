"""The paper's Table VI over `scarce`: the kind of online module.

    python -m configs.studies.scarce                 # once: the data, seconds
    python -m okd_jax.study --config=configs/studies/module.py --workdir=runs/table6

The paper's average ROUGE-L for GPT-2 XL to large: KD 19.4, OKD with LoRA 22.9, prefix
20.7, P-tuning 21.2 (its reference for the last is P-tuning v2; ours is v1).
"""

from configs.studies import scarce

ARMS = {"kd": {"method.name": "kd"}} | {
  f"okd, {kind}": {"method.name": "okd", "adapter.kind": kind}
  for kind in ("lora", "prefix", "prompt")
}

get_config = scarce.get_config


def get_study():
  return {"arms": ARMS, "seeds": 3, "unit": "okd, lora"} | scarce.MEASURES
