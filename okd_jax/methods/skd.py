"""SKD: the student's tokens, those the teacher ranks too low replaced by its own.

Speculative Knowledge Distillation, Xu et al. 2024, arXiv 2410.11325. Left open, the
student draws at temperature 0.5 with top_p 0.5.
"""

import dataclasses

from okd_jax.errors import UserError
from okd_jax.methods import onpolicy
from okd_jax.methods.base import Method, check_least
from okd_jax.text.rollout import Sampling


@dataclasses.dataclass(frozen=True, kw_only=True)
class Knobs(onpolicy.Knobs):
  """What `skd` reads beside `onpolicy.Knobs`.

  accept_top: K, among how many of the teacher's tokens the student's must be.
  teacher_temperature, teacher_top_p: how the teacher draws.
  """

  accept_top: int = 25
  teacher_temperature: float = 0.2
  teacher_top_p: float = 0.5

  own_temperature, own_top_p = 0.5, 0.5

  def __post_init__(self):
    super().__post_init__()
    check_least("method.accept_top", self.accept_top, 1)
    if not self.teacher_temperature >= 0:
      raise UserError(
        f"method.teacher_temperature={self.teacher_temperature} is below 0"
      )
    if not 0 < self.teacher_top_p <= 1:
      raise UserError(f"method.teacher_top_p={self.teacher_top_p} must be in (0, 1]")


def build(knobs: Knobs) -> Method:
  """r D(p, q) on interleaved text, (1 - r + g) CE on gold."""
  teacher = Sampling(knobs.teacher_temperature, 0, knobs.teacher_top_p)
  return onpolicy.build("interleaved", knobs, top=knobs.accept_top, teacher=teacher)
