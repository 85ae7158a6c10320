"""What methods share whose loss is `kd`'s on text that the models write.

Cross-entropy, where there is any, stays with the gold answers of the same prompts.
Sampled tokens are constants: nothing is differentiated through them, and how they were
drawn never enters the loss.
"""

import dataclasses
from typing import Any

from okd_jax.methods import kd
from okd_jax.methods.base import Method, SharedTextKnobs
from okd_jax.methods.base.knobs import never
from okd_jax.methods.base.sequences import Source


@dataclasses.dataclass(frozen=True, kw_only=True)
class Knobs(SharedTextKnobs, kd.Knobs):
  """Those of `kd` and of sampling."""

  def __post_init__(self):
    kd.Knobs.__post_init__(self)
    SharedTextKnobs.__post_init__(self)


def build(source: Source, knobs: Knobs, **more: Any) -> Method:
  """`kd` on text from `source`; `more` are other fields of its `Sequences`."""
  no_gold = knobs.kd_ratio == 1 and never(knobs.gold_weight)
  sequences = knobs.sequences(source, gold=not no_gold, **more)
  return dataclasses.replace(kd.build(knobs), sequences=sequences)
