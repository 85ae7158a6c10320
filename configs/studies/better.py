"""OKD beyond its paper, over `scarce`: gates, a held anchor, other targets, own text.

    python -m configs.studies.scarce                 # once: the data, seconds
    python -m okd_jax.study --config=configs/studies/better.py --workdir=runs/better

All arms but the last two begin with okd_mode_seeking.py's settings and change one
thing; those two are the paper's OKD, one row in eight teaching its module, and the
control of the arms on own text. Beside the held-out loss a judge counts: stories260K
fine-tuned on 5,211 windows that no student and no teacher has seen, reading what each
student writes.
"""

from configs.studies import scarce

# okd_mode_seeking.py.
_MODE_SEEKING = {
  "method.name": "okd",
  "method.divergence": "skew_reverse_kl",
  "method.teacher_kl_weight": 0.5,
  "method.gold_weight": 0.15,
  "method.anchor_weight": 0.3,
}
# The same on the student's own text, in a share of the steps; gold beside it.
_ON_SAMPLES = _MODE_SEEKING | {"method.name": "gkd", "adapter.kind": "lora"}
_OKD = {"method.name": "okd", "adapter.rows": 0.125}

ARMS = {
  "okd_mode_seeking": _MODE_SEEKING,
  "rows .125": _MODE_SEEKING | {"adapter.rows": 0.125},
  "module, top .2": _MODE_SEEKING | {"adapter.tokens": "top:0.2"},
  "student, top .5": _MODE_SEEKING | {"method.token_weight": "top:0.5"},
  "student, entropy": _MODE_SEEKING | {"method.token_weight": "entropy"},
  "drift .05": _MODE_SEEKING | {"method.drift_target": 0.05},
  "half frozen": _MODE_SEEKING | {"method.target_mix": 0.5},
  "moving target": _MODE_SEEKING
  | {"method.student_mix": 0.6, "method.end.student_mix": 0.0},
  "own text, 1 step in 4": _ON_SAMPLES | {"method.sampled_share": 0.25},
  "own text, 1 step in 2": _ON_SAMPLES | {"method.sampled_share": 0.5},
  "okd": _OKD,
  "gkd, gold, no module": {"method.name": "gkd", "method.gold_weight": 0.15}
  | {"method.divergence": "skew_reverse_kl"},
}


def get_config():
  config = scarce.get_config()
  config.stages.judge = {
    "method": {"name": "sft"},
    "student": {"path": str(scarce.SHARED / "models" / "stories260K")},
    "data": {"train": str(scarce.DATA / "judge.jsonl")},
    "train": {"steps": 600},
    "optim": {"lr": 1e-3},
    "eval": {"every": 0},
  }
  return config


def get_study():
  return {
    "arms": ARMS,
    "seeds": 5,
    "baseline": "okd_mode_seeking",
    "unit": "okd_mode_seeking",
    "judge": "stage:judge",
    "excess": 0,
  }
