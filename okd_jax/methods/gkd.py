"""GKD: with probability lambda the student's own answers, else gold.

On-Policy Distillation of Language Models, Agarwal et al. 2024, arXiv 2306.13649. lambda
is `sampled_share`, 0.5 where it is left open.
"""

import dataclasses

from okd_jax.methods import onpolicy
from okd_jax.methods.base import Method, check_idle
from okd_jax.methods.base.sequences import Replay


@dataclasses.dataclass(frozen=True, kw_only=True)
class Knobs(onpolicy.Knobs):
  """What `gkd` reads beside `onpolicy.Knobs`.

  divergence: '' is the Jensen-Shannon divergence.
  replay: store every sampled row and train on rows drawn from the store, as the GKD
    baseline in DistiLLM's code does; the paper does not.
  replay_capacity: rows kept, the newest.
  """

  replay: bool = False
  replay_capacity: int = 1000

  default_divergence, own_share = "jensen_shannon", 0.5

  def __post_init__(self):
    super().__post_init__()
    if not self.replay:
      check_idle(self, "method.replay=True", "replay_capacity")


def build(knobs: Knobs) -> Method:
  """r D(p, q) on sampled text, (1 - r + g) CE on gold."""
  replay = Replay(knobs.replay_capacity) if knobs.replay else None
  return onpolicy.build("student", knobs, replay=replay)
