"""The optimiser: AdamW with warm-up, a schedule and clipping, one per trained tree."""

from collections.abc import Callable
from typing import Any

import jax
import optax
from jaxtyping import PyTree

from okd_jax.config.schema import OptimSettings
from okd_jax.errors import UserError
from okd_jax.runtime.sharding import path_name

# Norm scales, biases and learned vectors are not decayed; matrices are.
_DECAYED = ("kernel", "embedding", "head", "down", "up")
_VECTORS = "prompt"  # an adapter's: its 'embedding' is no table, but what it learns


def schedule(settings: OptimSettings, steps: int) -> Callable[[int], float]:
  """Linear warm-up from 0 to `lr`, then constant, cosine or linear to `end_lr`.

  Raises:
    UserError: if the warm-up is longer than the run.
  """
  warmup, lr, end_lr = settings.warmup_steps, settings.lr, settings.end_lr
  if warmup > steps:
    raise UserError(
      f"optim.warmup_steps={warmup} must lie between 0 and the run's {steps} steps"
    )
  rest = max(steps - warmup, 1)
  after = {
    "constant": optax.constant_schedule(lr),
    "cosine": optax.cosine_decay_schedule(lr, rest, alpha=end_lr / lr if lr else 0.0),
    "linear": optax.linear_schedule(lr, end_lr, rest),
  }[settings.schedule]
  if not warmup:
    return after
  rise = optax.linear_schedule(0.0, lr, warmup)
  return optax.join_schedules([rise, after], [warmup])


def build(
  settings: OptimSettings,
  learning_rate: Callable[[int], float],
  lr_scale: float = 1.0,
) -> optax.GradientTransformation:
  """AdamW on one tree. `clip` bounds the tree's global gradient norm; 0 is off.

  Student and adapters have one each, with norms of their own: an adapter's gradient
  never changes how the student's is clipped.

  `dtype` is that in which the first moment is kept and decayed; '' is the parameters'
  own. The second moment is always as the parameters are: in bfloat16 it could never
  fall, as x * .999 (b2) rounds to x. So would a first moment whose b1 is as near to 1.

  Args:
    lr_scale: the tree's learning rate over `learning_rate`.
  """
  clip = settings.clip
  parts = [optax.clip_by_global_norm(clip)] if clip else []
  adamw = optax.adamw(
    lambda count: learning_rate(count) * lr_scale,
    b1=settings.b1,
    b2=settings.b2,
    eps=settings.eps,
    weight_decay=settings.weight_decay,
    mask=decay_mask,
    mu_dtype=settings.dtype or None,
  )
  return optax.chain(*parts, adamw)


def decay_mask(params: PyTree) -> PyTree:
  """True on the leaves that weight decay applies to."""

  def decayed(path: tuple[Any, ...], _: Any) -> bool:
    *parents, name = path_name(path).split("/")
    return name in _DECAYED and not (parents and parents[-1] == _VECTORS)

  return jax.tree_util.tree_map_with_path(decayed, params)
