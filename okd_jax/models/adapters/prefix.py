"""A prefix: learned keys and values before the real ones of each layer."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import ClassVar

import flax.linen as nn
import jax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from okd_jax.models.adapters.layers import TopLayers
from okd_jax.models.bounds import Bound, at_most
from okd_jax.models.config import MOST_LAYERS

STD = 0.02  # of virtual tokens at the start
MOST_TOKENS = at_most(1 << 16)  # `length_problems` has words for 0


@dataclasses.dataclass(frozen=True)
class Prefix(TopLayers):
  """Puts `length` learned keys and values before the real ones of each layer.

  Prefix-Tuning, Li and Liang 2021, arXiv 2101.00190; without its MLP. What the OKD
  paper calls P-tuning is v2 of it, which is per-layer prompting, and so this.

  Attributes:
    length: virtual tokens.
    layers: how many, counted from the top; 0 means all of them.
  """

  kind: ClassVar[str] = "prefix"
  bounds: ClassVar[Mapping[str, Bound]] = {
    "length": MOST_TOKENS,
    "layers": at_most(MOST_LAYERS),
  }
  length: int = 16
  layers: int = 0

  def problems(self) -> Iterator[str]:
    """As in the base class."""
    yield from super().problems()
    yield from length_problems(self.length)

  @property
  def prefix_length(self) -> int:
    """Virtual keys that attention finds before the real ones."""
    return self.length

  def prefix(
    self, module: nn.Module, heads: int, head_dim: int, dtype: DTypeLike
  ) -> tuple[Float[Array, "1 m K D"], Float[Array, "1 m K D"]]:
    """One layer's keys and values, without positions of their own."""

    def init() -> Float[Array, "m K D"]:
      shape = (self.length, heads, head_dim)
      return STD * jax.random.normal(module.make_rng("params"), shape)

    key = module.variable("adapter", "prefix_key", init).value
    value = module.variable("adapter", "prefix_value", init).value
    return key.astype(dtype)[None], value.astype(dtype)[None]


def length_problems(length: int) -> Iterator[str]:
  """What is wrong with a number of virtual tokens."""
  if length < 1:
    yield f"adapter.length={length} must be at least 1"
