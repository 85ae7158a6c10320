"""Blocks: some of the teacher's own layers, as trained copies in their places."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from okd_jax.errors import UserError
from okd_jax.models.adapters.base import Adapter, Run, Tree, cut
from okd_jax.models.bounds import LIST, WHOLE, Bound
from okd_jax.models.config import MOST_LAYERS, ModelConfig


@dataclasses.dataclass(frozen=True)
class Blocks(Adapter):
  """Adds nothing: the layers `blocks` are replaced by trained copies (`methods.clda`).

  The copies are float32 whatever the teacher's dtype, since small updates would be lost
  in bfloat16; they run in the teacher's.

  Attributes:
    blocks: the layers, numbered from below, ascending.
  """

  kind: ClassVar[str] = "blocks"
  folder: ClassVar[str] = "teacher"
  layers_refused: ClassVar[str] = (
    "which chooses layers by their saliency; leave it at 0 and set adapter.share"
  )
  bounds: ClassVar[Mapping[str, Bound]] = {"blocks": Bound(LIST, 0, MOST_LAYERS, WHOLE)}
  blocks: Sequence[int]

  def __post_init__(self):
    super().__post_init__()
    object.__setattr__(self, "blocks", tuple(map(int, self.blocks)))

  def problems(self) -> Iterator[str]:
    """As in the base class."""
    if not self.blocks or list(self.blocks) != sorted({*self.blocks}):
      yield f"blocks {list(self.blocks)} must be at least one, ascending, each once"

  def check(self, config: ModelConfig) -> None:
    """Raises a UserError if a model of this shape lacks one of the layers."""
    total = config.num_layers
    if not 0 <= self.blocks[0] <= self.blocks[-1] < total:
      raise UserError(
        f"blocks {list(self.blocks)} are not all among the teacher's {total} layers"
      )

  def trunk_layers(self, total: int) -> int:
    """The layers below the lowest trained one."""
    return self.blocks[0]

  def start(self, base: Tree) -> Tree:
    """float32 copies of the layers, [c, …]."""
    return {"layers": self._copies(base["layers"])}

  def norm(self, tree: Tree, base: Tree | None) -> Float[Array, ""]:
    """The Frobenius norm of what the layers have changed since they were the base's."""
    change = jax.tree.map(jnp.subtract, tree, self.start(base))
    return super().norm(change, base)

  def merge(self, params: Tree, tree: Tree) -> Tree:
    """The base with the trained layers in their places."""
    index = np.array(self.blocks)
    layers = jax.tree.map(
      lambda x, y: x.at[index].set(y.astype(x.dtype)), params["layers"], tree["layers"]
    )
    return params | {"layers": layers}

  def runs(
    self,
    module: nn.Module,
    layers: Tree,
    draw: Callable[[int], Tree],
    start: int,
    stop: int,
  ) -> Iterator[Run]:
    """The layers of `merge`, in runs that are frozen or trained as a whole.

    So no gradient of a frozen layer is ever computed, nor a second copy of the frozen
    ones made.
    """
    own = module.variable("adapter", "layers", self._copies, layers).value
    first = start
    while first < stop:
      trained, last = first in self.blocks, first + 1
      while last < stop and (last in self.blocks) == trained:
        last += 1
      weights = cut(layers, first, last)
      if trained:
        row = self.blocks.index(first)
        new = cut(own, row, row + last - first)
        weights = jax.tree.map(lambda x, y: y.astype(x.dtype), weights, new)
      yield Run(first, last, weights, {})
      first = last

  def _copies(self, layers: Tree) -> Tree:
    index = np.array(self.blocks)
    return jax.tree.map(lambda x: x[index].astype(jnp.float32), layers)
