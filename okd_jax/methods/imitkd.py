"""ImitKD: the student's answers, corrected by the teacher's distribution.

Autoregressive Knowledge Distillation through Imitation Learning, Lin et al. 2020,
arXiv 2009.07253. Its mixture moves from gold to the student's text: `sampled_share` 0
with `end.sampled_share` 1; left open it is 1 throughout, as in DistiLLM's code.
"""

from okd_jax.methods import onpolicy
from okd_jax.methods.base import Method


def build(knobs: onpolicy.Knobs) -> Method:
  """r D(p, q) on sampled text, (1 - r + g) CE on gold."""
  return onpolicy.build("student", knobs)
