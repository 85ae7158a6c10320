"""OKD by the alpha-beta divergence, on any recipe; not the paper's.

    python -m okd_jax.main --config=configs/okd_alpha_beta.py --workdir=runs/okd-ab
    python -m okd_jax.main --config=configs/okd_alpha_beta.py:gpt2.medium --workdir=…

The student's divergence is ABKD's (Wang et al. 2025, arXiv 2505.04560; alpha 0.2, beta
0.7), between forward and reverse KL. The module learns as in the paper, but from a
quarter of the rows. RESULTS.md has the arm 'okd, alpha-beta' of `scarce`: a better
ROUGE-L of samples than the paper's OKD, a worse held-out loss. Time and result with
the default recipe, quickstart: not measured.
"""

from configs import default


def get_config(recipe: str = "quickstart"):
  config = default.recipe(recipe)
  knobs = {"divergence": "alpha_beta", "ab_alpha": 0.2, "ab_beta": 0.7}
  default.use(config, "okd", **knobs)
  config.adapter.update({"kind": "lora", "rows": 0.25})
  return config
