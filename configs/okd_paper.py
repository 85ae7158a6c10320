"""OKD as the paper describes it, on any recipe: forward KL for both, nothing else.

    python -m okd_jax.main --config=configs/okd_paper.py --workdir=runs/okd-paper
    python -m okd_jax.main --config=configs/okd_paper.py:gpt2.medium --workdir=…

arXiv 2409.12512, Eqs. 16 and 17: the student takes KL(p_ta || q) alone. The paper does
not name alpha, so it stays as the recipe has it (0.25 by default, 0.5 in gpt2.py).
The module learns from all rows, as there, although a quarter of them does as well at
half the price (`--config.adapter.rows=0.25`; RESULTS.md, `cheap`).
Good at predicting gold text; okd_mode_seeking.py is the preset for good samples.
The default recipe, quickstart, is OKD of this kind but for those rows.
"""

from configs import default


def get_config(recipe: str = "quickstart"):
  config = default.recipe(recipe)
  default.use(
    config,
    "okd",
    divergence="forward_kl",
    teacher_divergence="forward_kl",
    student_kl_weight=1.0,
    gold_weight=0.0,
    anchor_weight=0.0,
    update_order="simultaneous",
  )
  module = {"kind": "lora", "rank": 32, "targets": ("query", "value"), "rows": 1.0}
  config.adapter.update(module)
  return config
