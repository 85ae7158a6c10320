"""DistiLLM: a skew KL, and the student's text only as far as it is needed.

Ko et al. 2024, arXiv 2402.03898: a share phi of the steps trains on the student's text,
fresh or from a store (`sequences.Replay`), times `sampled_share`. phi moves when the
held-out loss is measured, every eval.every steps.
"""

import dataclasses

from okd_jax.methods import onpolicy
from okd_jax.methods.base import Method
from okd_jax.methods.base.sequences import Replay


@dataclasses.dataclass(frozen=True, kw_only=True)
class Knobs(onpolicy.Knobs):
  """What `distillm` reads beside `onpolicy.Knobs`.

  divergence: '' is the skew reverse KL.
  replay_capacity: rows kept, the newest.
  replay_ratio, loss_eps: see `sequences.Replay`.
  """

  replay_capacity: int = 1000
  replay_ratio: str = "decreasing"
  loss_eps: float = 0.1

  default_divergence = "skew_reverse_kl"


def build(knobs: Knobs) -> Method:
  """r D(p, q) on sampled or replayed text, (1 - r + g) CE on gold."""
  replay = Replay(knobs.replay_capacity, True, knobs.replay_ratio, knobs.loss_eps)
  return onpolicy.build("student", knobs, replay=replay)
