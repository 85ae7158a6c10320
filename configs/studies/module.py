"""One row of the paper's Table VI: the kind of online module.

    for k in lora prefix prompt; do
      python -m okd_jax.main --config=configs/studies/module.py:$k --workdir=runs/$k
    done

Add '@gpt2.large' to the value for the paper's own pair; the default recipe, quickstart,
was not measured. The paper's average ROUGE-L: LoRA 22.9,
prefix 20.7, P-tuning 21.2 (its reference for the last is P-tuning v2; ours is v1).
"""

from configs import default

VALUES = ("lora", "prefix", "prompt")


def get_config(point: str = "lora"):
  kind, config = default.sweep_point(point, VALUES)
  default.use(config, "okd")
  config.adapter.kind = kind
  return config
