"""The paper's Table II: GPT-2 XL teaches GPT-2 base, medium or large. For clusters.

    python -m okd_jax.study --config=configs/studies/gpt2.py:base \\
      --workdir=runs/gpt2-base

Every arm is the recipe gpt2.py with another method. The four sets of the paper are
files that you bring, in data/: MiniLLM's processed dolly, vicuna, self_inst and sinst,
beside dolly_valid.jsonl. Several machines that share the folder may each take runs:
--run=ARM:SEED. Time and result: not measured.

The paper's average ROUGE-L of base, medium and large: SFT 16.1, 19.9, 18.9; KD 16.4,
19.0, 19.4; reverse KD 18.1, 21.0, 21.2; ImitKD 15.6, 16.3, 19.1; GKD 19.6, 21.6, 21.6;
MiniLLM 20.0, 21.5, 22.5; OKD 19.9, 22.7, 22.9.
"""

from configs import gpt2
from configs.studies import scarce

ARMS = {
  name: scarce.ARMS[name] for name in ("sft", "kd", "rkd", "imitkd", "gkd", "minillm")
} | {"okd": {"method.name": "okd", "method.teacher_kl_weight": 0.5}}
SETS = ("dolly", "vicuna", "self_inst", "sinst")
MEASURES = {
  "sets": {name: f"data/{name}.jsonl" for name in SETS},
  "protocol": {"max_new_tokens": 256, "batch_size": 32},
}


def get_config(variant: str = "base"):
  config = gpt2.get_config(variant)
  config.data.eval = "data/dolly_valid.jsonl"
  return config


def get_study():
  return {"arms": ARMS, "seeds": 3} | MEASURES
