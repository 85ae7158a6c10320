"""What an online module is to the decoder, and to those who train and export it."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from okd_jax.errors import UserError
from okd_jax.models.bounds import Bound
from okd_jax.models.bounds import problems as out_of_bounds
from okd_jax.models.config import ModelConfig

Tree = dict[str, Any]


class Run(NamedTuple):
  """Layers `first` to before `last`: alike, and so one scan.

  layers: their weights, stacked on a leading axis.
  modules: their part of `adapter/layers`, stacked likewise; {} where they are plain.
  """

  first: int
  last: int
  layers: Tree
  modules: Tree


@dataclasses.dataclass(frozen=True)
class Adapter:
  """An online module, as the decoder sees it; this one is none: the plain model.

  A kind of its own overrides what it changes. While it runs, the decoder calls
  `virtual` once, `runs` for its layers, `prefix` in each attention and `delta` in each
  projection; each declares what it needs in the collection `adapter` of the Linen
  module that calls it.

  Attributes:
    kind: its name in `adapter.kind`, '' of none.
    folder: where a run exports it: 'adapter' in PEFT's format, 'teacher' as the whole
      model.
    whole: whether a pass must run all layers at once.
    layers_refused: why nobody may choose its layers by `adapter.layers`, '' if one may.
    bounds: what its fields may hold.
  """

  kind: ClassVar[str] = ""
  folder: ClassVar[str] = "adapter"
  whole: ClassVar[bool] = False
  layers_refused: ClassVar[str] = ""
  bounds: ClassVar[Mapping[str, Bound]] = {}

  def __post_init__(self):
    # Types first: `problems` compares.
    wrong = list(out_of_bounds(vars(self), self.bounds, "adapter."))
    if problems := wrong or list(self.problems()):
      raise UserError("; ".join(problems))

  def problems(self) -> Iterator[str]:
    """What is wrong with the fields, whatever the model."""
    return iter(())

  def check(self, config: ModelConfig) -> None:
    """Raises a UserError if a model of this shape has no place for the module."""

  def trunk_layers(self, total: int) -> int:
    """How many of `total` layers lie below the lowest module."""
    return total

  @property
  def prefix_length(self) -> int:
    """Virtual keys that attention finds before the real ones."""
    return 0

  def start(self, base: Tree) -> Tree | None:
    """What takes the place of the collection drawn at random; None if nothing does.

    Args:
      base: the teacher's parameters.
    """
    return None

  def held(self, base: Tree) -> Tree:
    """What stays of the model's parameters, beside the collection: here all of them."""
    return base

  def variables(self, tree: Tree, held: Tree) -> dict[str, Tree]:
    """What the decoder is applied to.

    Args:
      tree: the collection, as it is trained.
      held: what stays (`held`).
    """
    return {"params": held, "adapter": tree}

  def norm(self, tree: Tree, base: Tree | None) -> Float[Array, ""]:
    """How large the module is: the Frobenius norm of what it adds, puts in or changes.

    Args:
      tree: the collection `adapter`.
      base: the frozen parameters, which only a change is measured from.
    """
    total = jnp.zeros(())
    for leaf in jax.tree.leaves(tree):
      total += jnp.sum(jnp.square(leaf))
    return jnp.sqrt(total)

  def merge(self, params: Tree, tree: Tree) -> Tree:
    """The model's parameters with the module in them, in their own dtype.

    Raises:
      UserError: where no weight can hold the module.
    """
    raise UserError(f"a {self.kind} module cannot be merged into weights: LoRA can")

  def delta(
    self, module: nn.Module, x: Float[Array, "*B D"], features: int
  ) -> Float[Array, "*B H"] | None:
    """What is added to the output of the projection `module` of x; None for nothing."""
    return None

  def prefix(
    self, module: nn.Module, heads: int, head_dim: int, dtype: DTypeLike
  ) -> tuple[Float[Array, "1 m K D"], Float[Array, "1 m K D"]] | None:
    """A layer's own keys and values before all others; None if it has none.

    They are no token's and so have no position: rotary embeddings leave them alone.
    """
    return None

  def virtual(
    self, module: nn.Module, features: int, dtype: DTypeLike
  ) -> Float[Array, "1 m D"] | None:
    """Input vectors of tokens that come before all others; None if there are none."""
    return None

  def runs(
    self,
    module: nn.Module,
    layers: Tree,
    draw: Callable[[int], Tree],
    start: int,
    stop: int,
  ) -> Iterator[Run]:
    """The layers from `start` to before `stop`, in runs that are alike.

    Args:
      module: the decoder, in whose collection `adapter` the layers' modules live.
      layers: the stacked weights of all its layers.
      draw: makes the modules of so many layers at random, stacked.
    """
    if start < stop:
      yield Run(start, stop, cut(layers, start, stop), {})


def cut(layers: Tree, first: int, last: int) -> Tree:
  """The stacked layers from `first` to before `last`."""
  return jax.tree.map(lambda x: x[first:last], layers)
