"""One point of the paper's Figure 9: the share of the divergence in the student's loss.

    for m in okd kd; do for w in 0 0.25 0.5 0.75 1; do
      python -m okd_jax.main --config=configs/studies/loss_weight.py:$m-$w \\
        --workdir=runs/weight-$m-$w
    done; done

The rest is cross-entropy on gold, so that 0 is SFT. Add '@gpt2.base' to the value for
the paper's own pair; the default recipe, quickstart, was not measured.
The paper's average ROUGE-L, read off the figure: 16.1 at 0, then 19.4 to
19.6 for OKD and 16.3 to 16.5 for KD.
"""

from configs import default

VALUES = tuple(
  f"{m}-{w}" for m in ("okd", "kd") for w in ("0", "0.25", "0.5", "0.75", "1")
)


def get_config(point: str = "okd-1"):
  value, config = default.sweep_point(point, VALUES)
  method, weight = value.split("-")
  # One and the same quantity, under the name that each method has for it.
  knob = "student_kl_weight" if method == "okd" else "kd_ratio"
  default.use(config, method, **{knob: float(weight)})
  return config
