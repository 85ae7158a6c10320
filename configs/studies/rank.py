"""One point of the paper's Figure 8: the rank of OKD's LoRA modules.

    for r in 16 32 64 128; do
      python -m okd_jax.main --config=configs/studies/rank.py:$r --workdir=runs/rank-$r
    done

Add '@gpt2.base' to the value for the paper's own pair; the default recipe, quickstart,
was not measured. The paper's average ROUGE-L, read off the
figure: 19.3, 19.7, 19.4, 19.4.
"""

from configs import default

VALUES = ("16", "32", "64", "128")


def get_config(point: str = "32"):
  rank, config = default.sweep_point(point, VALUES)
  default.use(config, "okd")
  config.adapter.kind = "lora"
  config.adapter.rank = int(rank)
  return config
