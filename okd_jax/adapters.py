"""Online modules: small trained parts of a frozen teacher.

They live in the Flax collection `adapter`, beside `params` and never inside it,
so that `teacher.apply({'params': frozen, 'adapter': trained}, tokens)` is the
adapted teacher, the same call without `adapter` is the plain one, and a gradient
with respect to `adapter` touches no base weight.

    params/layers/attention/query/kernel     [N, D, H]   frozen
    adapter/layers/attention/query/down      [k, D, r]   trained
    adapter/layers/attention/query/up        [k, r, H]   trained, zero at the start
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from okd_jax.errors import UserError

TARGETS = ("query", "key", "value", "out", "gate", "up", "down")
KINDS = ("lora",)


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
  """Which online module the teacher carries.

  LoRA adds `scale * x @ down @ up` to the named projections' outputs (LoRA, Hu et
  al. 2021, arXiv 2106.09685; OKD, arXiv 2409.12512, Eq. 15). `layers` counts from
  the top of the teacher; 0 means all of them.
  """

  kind: str = "lora"
  rank: int = 32
  scale: float = 1.0
  targets: tuple[str, ...] = ("query", "value")
  layers: int = 0

  def __post_init__(self):
    object.__setattr__(self, "targets", tuple(self.targets))
    unknown = [name for name in self.targets if name not in TARGETS]
    if self.kind not in KINDS:
      raise UserError(
        f"adapter.kind={self.kind!r} is unknown; use one of {', '.join(KINDS)}"
      )
    if unknown or not self.targets:
      raise UserError(
        f"adapter.targets={list(self.targets)} must name at least one of "
        f"{', '.join(TARGETS)} and nothing else"
      )
    if self.rank < 1 or self.layers < 0:
      raise UserError(
        f"adapter.rank={self.rank} must be at least 1 and "
        f"adapter.layers={self.layers} at least 0"
      )

  def num_layers(self, total: int) -> int:
    """How many of `total` layers, counted from the top, carry a module."""
    return self.layers or total

  def check(self, total: int, gated_mlp: bool) -> None:
    """Raises a UserError if a model of `total` layers has no place for the module."""
    if self.layers > total:
      raise UserError(
        f"adapter.layers={self.layers}, but the teacher has only {total} layers"
      )
    if "gate" in self.targets and not gated_mlp:
      raise UserError(
        "adapter.targets names 'gate', but the teacher's MLP has no gate; leave it out"
      )


def lora_delta(
  module: nn.Module, config: AdapterConfig, x: Float[Array, "*B D"], features: int
) -> Float[Array, "*B H"]:
  """`scale * x @ down @ up`, its matrices declared in `module`'s adapter collection.

  `down` starts as a variance-scaled normal and `up` at zero, so that the adapted
  teacher equals the plain one at step 0. The product runs in x's dtype.
  """

  def init_down():
    shape = (x.shape[-1], config.rank)
    init = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
    return init(module.make_rng("params"), shape, jnp.float32)

  down = module.variable("adapter", "down", init_down).value
  up = module.variable("adapter", "up", jnp.zeros, (config.rank, features)).value
  return config.scale * (x @ down.astype(x.dtype)) @ up.astype(x.dtype)
