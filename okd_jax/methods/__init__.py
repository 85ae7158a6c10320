"""Methods: one pure loss each, by name. A new one is a file, a line in the registry, a
config and its tests; somebody else's is a file of his own (docs/your_own_method.md).
"""

from okd_jax.methods.base import (
  DivergenceKnobs,
  Knob,
  Method,
  Models,
  Sequences,
  Shape,
  Teacher,
  TextKnobs,
  apply_functions,
  register_divergence,
)
from okd_jax.methods.registry import (
  METHODS,
  Builder,
  build,
  defaults,
  find,
  load_file,
  register,
  unread,
  used_knobs,
  who_reads,
)

__all__ = [
  "METHODS",
  "Builder",
  "DivergenceKnobs",
  "Knob",
  "Method",
  "Models",
  "Sequences",
  "Shape",
  "Teacher",
  "TextKnobs",
  "apply_functions",
  "build",
  "defaults",
  "find",
  "load_file",
  "register",
  "register_divergence",
  "unread",
  "used_knobs",
  "who_reads",
]
