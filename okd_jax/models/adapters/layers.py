"""What the kinds that put a module into each of the top layers have in common."""

from collections.abc import Callable, Iterator

import flax.linen as nn
import jax

from okd_jax.errors import UserError
from okd_jax.models.adapters.base import Adapter, Run, Tree, cut
from okd_jax.models.config import ModelConfig


class TopLayers(Adapter):
  """A module in each of the top `layers` layers, 0 for all of them.

  The layers below are a run of their own, of which no backward pass is made.
  """

  layers: int  # declared here, but a field of each kind, at the end of its own

  def problems(self) -> Iterator[str]:
    """As in the base class."""
    if self.layers < 0:
      yield f"adapter.layers={self.layers} must be at least 0"

  def check(self, config: ModelConfig) -> None:
    """Raises a UserError if a model of this shape has too few layers."""
    if self.layers > config.num_layers:
      raise UserError(
        f"adapter.layers={self.layers}, but the model has only "
        f"{config.num_layers} layers"
      )

  def trunk_layers(self, total: int) -> int:
    """How many of `total` layers lie below the lowest module."""
    return total - (self.layers or total)

  def runs(
    self,
    module: nn.Module,
    layers: Tree,
    draw: Callable[[int], Tree],
    start: int,
    stop: int,
  ) -> Iterator[Run]:
    """The plain layers, then those with a module."""
    total = len(jax.tree.leaves(layers)[0])
    low, own = self.trunk_layers(total), {}
    # A pass that stops below the modules can do without them.
    if stop > low or module.is_initializing():
      own = module.variable("adapter", "layers", draw, total - low).value
    middle = min(max(start, low), stop)
    if start < middle:
      yield Run(start, middle, cut(layers, start, middle), {})
    if middle < stop:
      modules = cut(own, middle - low, stop - low)
      yield Run(middle, stop, cut(layers, middle, stop), modules)
