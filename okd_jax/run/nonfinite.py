"""What is not finite: which term of which model, in a sentence for people."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from okd_jax.errors import UserError
from okd_jax.evaluation import figures
from okd_jax.methods.base import STUDENT
from okd_jax.runtime.sharding import path_name

_OVERFLOWS = {"perplexity"}  # exp(loss), of a loss that is fine


class NotFinite(Exception):
  """A step that must not count; its update was left out of every tree.

  values: its figures; skipped: how many updates have been left out, this one among
    them, or -1 if it was not as a whole.
  """

  def __init__(
    self, step: int, rows: np.ndarray, values: Mapping[str, float], skipped: int = 0
  ):
    self.step, self.rows, self.values, self.skipped = step, rows, values, skipped
    super().__init__(f"step {step}: {terms(values)}")


def names(values: Mapping[str, float | None]) -> list[str]:
  """The figures that are not finite."""
  wrong = [n for n, v in values.items() if v is not None and not math.isfinite(v)]
  return [name for name in wrong if name not in _OVERFLOWS]


def terms(values: Mapping[str, float]) -> str:
  """The figures that are not finite, each under the model that it is of."""
  found: dict[str, list[str]] = {}
  for name in sorted(names(values), key=_depth):
    found.setdefault(_whose(name), []).append(f"{name} {values[name]}")
  return "; ".join(f"of the {who}: {', '.join(each)}" for who, each in found.items())


def check_scores(
  who: str, scores: Mapping[str, float], trees: Mapping[str, PyTree]
) -> None:
  """Refuses to begin with a model whose held-out figures are not finite.

  who: whose they are; trees: the weights that take part, by what people call them.

  Raises:
    UserError: that says which figures, and whose weights if it is these.
  """
  if names(scores):
    raise UserError(
      f"before the first step the held-out figures of {who} are not finite "
      f"({terms(scores)}); {cause(scores, trees)}; nothing was trained or saved"
    )


def error(
  found: NotFinite, where: str, trees: Mapping[str, PyTree], saved: Sequence[int]
) -> UserError:
  """What a run that must stop says.

  Args:
    where: its rows; trees: as in `check_scores`; saved: the steps of checkpoints.
  """
  sound = f"the checkpoint of step {saved[-1]} is sound" if saved else "none is saved"
  limit = ""
  if found.skipped > 0:
    before = found.skipped - 1
    limit = f"; {before} updates were skipped before it, which is all that may be"
  return UserError(
    f"step {found.step}: not finite {terms(found.values)}; its rows are {where}; "
    f"{sound}{limit}; {cause(found.values, trees)}"
  )


def cause(values: Mapping[str, float], trees: Mapping[str, PyTree]) -> str:
  """What is to blame and what to do, as far as it can be told."""
  if bad := {who: path for who, tree in trees.items() if (path := _first_bad(tree))}:
    told = ", ".join(f"those of {who} ({path})" for who, path in bad.items())
    return f"weights are not finite: {told}; start from a model whose weights are whole"
  wrong, whose = names(values), {_whose(name) for name in names(values)}
  if "teacher" in whose:
    return (
      "all weights are finite, so the teacher overflows on these rows: set train.dtype "
      "or teacher.dtype=float32, or leave the rows out"
    )
  if all(name.endswith("_update_norm") for name in wrong):
    return "the gradients are finite, so lower optim.lr, or raise optim.eps"
  return "all weights are finite: look at these rows, or lower optim.lr"


def _first_bad(tree: PyTree) -> str:
  """The path of the first array with a number that is not finite; '' if none has."""
  leaves = [
    (path_name(path), leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    if jnp.issubdtype(leaf.dtype, jnp.inexact)
  ]
  whole = jax.device_get(_are_finite([leaf for _, leaf in leaves]))
  return next((p for (p, _), ok in zip(leaves, whole, strict=True) if not ok), "")


@jax.jit
def _are_finite(leaves: list[Any]) -> list[Any]:
  return [jnp.isfinite(leaf).all() for leaf in leaves]


def _whose(name: str) -> str:
  """The model that a figure tells of: 'teacher', 'student' or another that learns."""
  if name.startswith(("teacher_", "own_token_", "nll_", "rounding_")):
    return "teacher"
  if name.startswith("method."):
    return "method's knobs"
  owner = figures.owner(name)
  # Of evaluations: the adapted teacher's loss tells of what has learned in it.
  return "online module" if owner == "adapter" else owner or STUDENT


def _depth(name: str) -> int:
  """Terms before sums of them, sums before gradients and updates."""
  return 1 + name.endswith("_grad_norm") + 2 * name.endswith("_update_norm")
