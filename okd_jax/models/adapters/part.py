"""Part: some of a model's own parameters are trained, the others stay as they are."""

import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Bool, Int

from okd_jax.errors import UserError
from okd_jax.models.adapters.base import Adapter, Run, Tree

_LAYERS = "layers"
_SHOWN = 8  # names in a message


@dataclasses.dataclass(frozen=True)
class Part(Adapter):
  """Adds nothing: its tree holds those of the model's parameters that are trained.

  Of a stack of layers it holds some rows. What stays has neither a gradient nor a
  moment, and nothing is in memory twice.

  Attributes:
    frozen: a regular expression; a parameter stays if it is found in its name, which is
      'layers/3/attention/query/kernel' in layer 3, or 'embed/embedding'.
  """

  kind: ClassVar[str] = "part"
  frozen: str

  def problems(self) -> Iterator[str]:
    """As in the base class."""
    try:
      re.compile(self.frozen)
    except (re.error, OverflowError, RecursionError) as error:
      yield f"student.frozen={self.frozen!r} is no regular expression ({error})"

  def check_names(self, params: Tree) -> None:
    """Raises a UserError if all of a model's parameters stay, or none of them.

    Args:
      params: the whole model's; shapes will do.
    """
    flat = _flat(params)
    moves = np.concatenate([self.moves(k, _count(k, x)) for k, x in flat.items()])
    if moves.any() and not moves.all():
      return
    names = [re.sub(f"^{_LAYERS}/", f"{_LAYERS}/0/", path) for path in flat]
    which = "none" if moves.all() else "every one"
    raise UserError(
      f"student.frozen={self.frozen!r} is found in {which} of the parameters' names, "
      f"such as {', '.join(names[:_SHOWN])}"
    )

  def start(self, base: Tree) -> Tree:
    """What is trained, as it is in the whole model."""
    return self._share(base, trained=True)

  def held(self, base: Tree) -> Tree:
    """What stays of the whole model."""
    return {_LAYERS: {}} | self._share(base, trained=False)

  def variables(self, tree: Tree, held: Tree) -> dict[str, Tree]:
    """All but the trained rows of layers lies where the plain model has it."""
    own = dict(tree)
    layers = {_LAYERS: own.pop(_LAYERS)} if _LAYERS in own else {}
    params = traverse_util.unflatten_dict(_flat(held) | _flat(own), sep="/")
    return {"params": {_LAYERS: {}} | params, "adapter": layers}

  def merge(self, params: Tree, tree: Tree) -> Tree:
    """The whole model, what is trained in its place."""
    kept, own = _flat(params), _flat(tree)
    whole = kept | own
    for path in {*kept} & {*own}:
      total = len(kept[path]) + len(own[path])
      both = jnp.concatenate([kept[path], own[path]])
      places = np.concatenate([self._where(path, total, x) for x in (False, True)])
      whole[path] = both[np.argsort(places)]
    return traverse_util.unflatten_dict(whole, sep="/")

  def runs(
    self,
    module: nn.Module,
    layers: Tree,
    draw: Callable[[int], Tree],
    start: int,
    stop: int,
  ) -> Iterator[Run]:
    """Layers of which the same parameters are trained make a run.

    So no gradient of a frozen parameter is ever computed, nor a whole stack made.
    """
    if not module.has_variable("adapter", _LAYERS):  # at the start, or all stay
      yield from super().runs(module, layers, draw, start, stop)
      return
    total = module.config.num_layers
    kept, own = (
      traverse_util.flatten_dict({_LAYERS: x}, sep="/")
      for x in (layers, module.get_variable("adapter", _LAYERS))
    )
    moves = {path: self.moves(path, total) for path in {**kept, **own}}
    first = start
    while first < stop:
      last = first + 1
      while last < stop and all(rows[first] == rows[last] for rows in moves.values()):
        last += 1
      weights = {}
      for path, rows in moves.items():
        trained = rows[first]
        row = int(np.sum(rows[:first] == trained))
        stack = (own if trained else kept)[path]
        weights[path] = stack[row : row + last - first]
      yield Run(
        first, last, traverse_util.unflatten_dict(weights, sep="/")[_LAYERS], {}
      )
      first = last

  def moves(self, path: str, count: int) -> Bool[np.ndarray, " N"]:
    """Which of the layers' parameters of this path are trained; others are alone."""
    of_layers = path.startswith(f"{_LAYERS}/")
    rest = path.removeprefix(f"{_LAYERS}/")
    names = [f"{_LAYERS}/{i}/{rest}" if of_layers else path for i in range(count)]
    return np.array([re.search(self.frozen, name) is None for name in names])

  def _where(self, path: str, count: int, trained: bool) -> Int[np.ndarray, " M"]:
    return np.flatnonzero(self.moves(path, count) == trained)

  def _share(self, base: Tree, trained: bool) -> Tree:
    found: dict[str, Any] = {}
    for path, leaf in _flat(base).items():
      count = _count(path, leaf)
      rows = self._where(path, count, trained)
      if len(rows) == count:
        found[path] = leaf
      elif len(rows):
        found[path] = leaf[rows]
    return traverse_util.unflatten_dict(found, sep="/")


def _flat(tree: Tree) -> dict[str, Any]:
  return traverse_util.flatten_dict(tree, sep="/")


def _count(path: str, leaf: Any) -> int:
  """How many parameters a name stands for: those of a stack's layers, or one."""
  return leaf.shape[0] if path.startswith(f"{_LAYERS}/") else 1
