"""The paper's Table III: LLaMA-2 7B or 13B teaches TinyLlama 1.1B. For clusters.

    python -m okd_jax.study --config=configs/studies/llama2.py:7b \\
      --workdir=runs/llama-7b

Every arm is the recipe llama.py with another method; the sets are those of gpt2.py.
Time and result: not measured.

The paper's average ROUGE-L with 7B and 13B: SFT 18.8, 18.8; KD 19.9, 19.8; reverse KD
22.9, 23.6; GKD 23.0, 23.8; OKD 25.2, 25.5.
"""

from configs import llama
from configs.studies import gpt2

ARMS = {name: gpt2.ARMS[name] for name in ("sft", "kd", "rkd", "gkd", "okd")}


def get_config(variant: str = "7b"):
  config = llama.get_config(variant)
  config.data.eval = "data/alpaca_valid.jsonl"
  return config


def get_study():
  return {"arms": ARMS, "seeds": 3} | gpt2.MEASURES
