"""OKD by skew divergences, on any recipe; not the paper's.

    python -m okd_jax.main --config=configs/okd_skew.py --workdir=runs/okd-skew
    python -m okd_jax.main --config=configs/okd_skew.py:gpt2.medium --workdir=…

KL(p_ta || 0.1 p_ta + 0.9 q) for the student, DistiLLM's skew (Ko et al. 2024, arXiv
2402.03898) of the paper's forward KL: bounded, so that a token the student has all but
ruled out cannot rule its step. The module's loss is the paper's, from a quarter of the
rows. Time and result with the default recipe, quickstart: not measured.
"""

from configs import default


def get_config(recipe: str = "quickstart"):
  config = default.recipe(recipe)
  default.use(config, "okd", divergence="skew_forward_kl", skew=0.1)
  config.adapter.update({"kind": "lora", "rows": 0.25})
  return config
