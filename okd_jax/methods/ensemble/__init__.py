"""Several frozen teachers at once: averaged, weighed by a gate, or chosen by a policy.

By `weighting`, with p_i the teachers, q the student, y the gold token, r kd_ratio:

    mean        r D(sum_i w_i p_i, q) + (1 - r) CE(y; q)
    gated       r sum_i a_i D(p_i, q) + (1 - r) CE(y; q)     a: softmax of a learned map
    reinforced  r mean over the chosen of D(p_i, q) + (1 - r) CE(y; q)    per example,
                the first term being 0 where nobody was chosen

The gate is that of ensembled CTR prediction (Zhu et al. 2020, arXiv 2011.04106), the
policy RL-KD's (Yuan et al. 2020, arXiv 2012.06048); `gate` and `policy` say what is
theirs and what is ours.
"""

from okd_jax.methods.ensemble.mix import Knobs, build

__all__ = ["Knobs", "build"]
