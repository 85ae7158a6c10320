"""The checker that conftest.py hangs into every import of the package."""

import functools
from collections.abc import Callable
from typing import Any

import beartype

# An int is a float, as Python's own typing has it (PEP 484).
_check = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))
# JAX rebuilds these with whatever a tree may hold: shardings, shapes, nothing at all.
_TREES = ("Batch.__init__", "Mean.__init__", "TrainState.__init__")


def check(function: Callable) -> Callable:
  """The function, which now raises where a call does not fit its annotations.

  The checks are made at the first call: most of what a test imports it never calls,
  and making all would take seconds.
  """
  hints = function.__annotations__.values()
  if function.__qualname__ in _TREES or all(hint is Any for hint in hints):
    return function
  made = []

  @functools.wraps(function)
  def checked(*args: Any, **kwargs: Any) -> Any:
    if not made:
      made.append(_check(function))
    return made[0](*args, **kwargs)

  return checked
