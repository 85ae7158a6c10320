"""What all methods are made of: models, knobs, divergences, sequences."""

from okd_jax.methods.base.divergences import (
  DIVERGENCES,
  DivergenceKnobs,
  Shape,
  register_divergence,
)
from okd_jax.methods.base.knobs import (
  Knob,
  Linear,
  check_choice,
  check_idle,
  check_least,
  check_positive,
  check_share,
  check_weight,
)
from okd_jax.methods.base.method import (
  Logits,
  Loss,
  Method,
  Now,
  combine,
  cut_heads,
  diagnostics,
  gold_nll,
  is_zero,
  stop_gradient,
  sums_of_rows,
  token_sums,
  weigh,
)
from okd_jax.methods.base.models import (
  STUDENT,
  Models,
  Params,
  Teacher,
  apply_functions,
)
from okd_jax.methods.base.sequences import Sequences, SharedTextKnobs, TextKnobs
from okd_jax.methods.base.targets import (
  TargetKnobs,
  between_teachers,
  towards_student,
)
from okd_jax.methods.base.token_weights import TokenWeight

__all__ = [
  "DIVERGENCES",
  "DivergenceKnobs",
  "Knob",
  "Linear",
  "Logits",
  "Loss",
  "Method",
  "Models",
  "Now",
  "Params",
  "Sequences",
  "Shape",
  "STUDENT",
  "SharedTextKnobs",
  "TargetKnobs",
  "Teacher",
  "TextKnobs",
  "TokenWeight",
  "apply_functions",
  "between_teachers",
  "check_choice",
  "check_idle",
  "check_least",
  "check_positive",
  "check_share",
  "check_weight",
  "combine",
  "cut_heads",
  "diagnostics",
  "gold_nll",
  "is_zero",
  "register_divergence",
  "stop_gradient",
  "sums_of_rows",
  "token_sums",
  "towards_student",
  "weigh",
]
