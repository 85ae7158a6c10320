"""LoRA: a product of two thin matrices beside a projection's kernel."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
from flax import traverse_util
from jaxtyping import Array, Float

from okd_jax.errors import UserError
from okd_jax.models.adapters.base import Tree
from okd_jax.models.adapters.layers import TopLayers
from okd_jax.models.bounds import LIST, TEXT, Bound, at_most, number
from okd_jax.models.config import MOST_LAYERS, ModelConfig
from okd_jax.models.product import project

TARGETS = ("query", "key", "value", "out", "gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class Lora(TopLayers):
  """Adds `scale * x @ down @ up` to the outputs of the named projections.

  LoRA, Hu et al. 2021, arXiv 2106.09685; OKD, arXiv 2409.12512, Eq. 15. `down` starts
  as a variance-scaled normal and `up` at zero, so that the adapted teacher equals the
  plain one at step 0.

  Attributes:
    rank: columns of `down`, rows of `up`.
    scale: factor on the product; PEFT's lora_alpha / r.
    targets: the projections, of `TARGETS`.
    layers: how many, counted from the top; 0 means all of them.
  """

  kind: ClassVar[str] = "lora"
  bounds: ClassVar[Mapping[str, Bound]] = {
    "rank": at_most(1 << 16),
    "scale": number(-1e6, 1e6),
    "targets": Bound(LIST, of=TEXT),
    "layers": at_most(MOST_LAYERS),
  }
  rank: int = 32
  scale: float = 1.0
  targets: Sequence[str] = ("query", "value")
  layers: int = 0

  def __post_init__(self):
    if isinstance(self.targets, list):
      object.__setattr__(self, "targets", tuple(self.targets))
    super().__post_init__()

  def problems(self) -> Iterator[str]:
    """As in the base class."""
    unknown = [name for name in self.targets if name not in TARGETS]
    if unknown or not self.targets:
      yield (
        f"adapter.targets={list(self.targets)} must name at least one of "
        f"{', '.join(TARGETS)} and nothing else"
      )
    if self.rank < 1:
      yield f"adapter.rank={self.rank} must be at least 1"
    if not (self.scale and math.isfinite(self.scale)):
      yield f"adapter.scale={self.scale} must be a number other than 0"
    yield from super().problems()

  def check(self, config: ModelConfig) -> None:
    """Raises a UserError if a model of this shape has no place for the module."""
    super().check(config)
    if config.experts and (within := {"gate", "up", "down"} & {*self.targets}):
      raise UserError(
        f"adapter.targets names {', '.join(map(repr, sorted(within)))}, but the "
        "model's MLPs are experts, which take no module; leave it out"
      )
    if "gate" in self.targets and not config.gated_mlp:
      raise UserError(
        "adapter.targets names 'gate', but the model's MLP has no gate; leave it out"
      )

  def delta(
    self, module: nn.Module, x: Float[Array, "*B D"], features: int
  ) -> Float[Array, "*B H"] | None:
    """`scale * x @ down @ up`, in x's dtype; None where no target is called so."""
    if module.name not in self.targets:
      return None

    def init_down() -> Float[Array, "D r"]:
      init = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
      shape = (x.shape[-1], self.rank)
      return init(module.make_rng("params"), shape, jnp.float32)

    down = module.variable("adapter", "down", init_down).value
    up = module.variable("adapter", "up", jnp.zeros, (self.rank, features)).value
    inner = self.scale * project(x, down.astype(x.dtype))
    return project(inner, up.astype(x.dtype))

  def norm(self, tree: Tree, base: Tree | None) -> Float[Array, ""]:
    """The Frobenius norm of all down @ up together, before `scale`; 0 at the start.

    Found without making a product: |down up|^2 = tr(down' down up up').
    """
    flat, total = traverse_util.flatten_dict(tree), jnp.zeros(())
    for (*path, name), up in flat.items():
      if name == "up":
        down = flat[*path, "down"]
        inner = jnp.einsum("ndr,nds->nrs", down, down)
        total += jnp.sum(inner * jnp.einsum("nrh,nsh->nrs", up, up))
    return jnp.sqrt(total)

  def merge(self, params: Tree, tree: Tree) -> Tree:
    """The base with all pairs multiplied out and added: W + scale * down @ up.

    Each sum is made in float32 and rounded once to the weights' own dtype.
    """
    flat, pairs = (traverse_util.flatten_dict(x) for x in (params, tree))
    for path in {path[:-1] for path in pairs}:
      kernel = flat[*path, "kernel"]
      delta = self.scale * jnp.einsum(
        "kdr,krh->kdh", pairs[*path, "down"], pairs[*path, "up"]
      )
      top = kernel[-len(delta) :].astype(jnp.float32) + delta
      merged = kernel.at[-len(delta) :].set(top.astype(kernel.dtype))
      flat[*path, "kernel"] = merged
    return traverse_util.unflatten_dict(flat)
