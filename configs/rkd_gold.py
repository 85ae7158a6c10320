"""Reverse KD with a little gold text: the fair control of okd_mode_seeking.py.

    python -m okd_jax.main --config=configs/rkd_gold.py --workdir=runs/rkd-gold
    python -m okd_jax.main --config=configs/rkd_gold.py:gpt2.medium --workdir=…

KL(q || p) + 0.25 CE, no online module: what a mode-seeking loss and gold text do by
themselves (BUILD_NOTES.md, "A first study"). Time and result with
the default recipe, quickstart: not measured.
"""

from configs import default


def get_config(recipe: str = "quickstart"):
  config = default.recipe(recipe)
  default.use(config, "rkd", kd_ratio=1.0, gold_weight=0.25)
  return config
