"""The optimiser: AdamW with warm-up, a schedule and clipping, one per trained tree."""

from collections.abc import Callable

import jax
import optax

from okd_jax.errors import UserError
from okd_jax.runtime.sharding import path_name

SCHEDULES = ("constant", "cosine", "linear")
DTYPES = ("float32", "bfloat16")  # float16 has no room for small gradients
# Norm scales, biases and learned vectors are not decayed; matrices are.
_DECAYED = ("kernel", "embedding", "head", "down", "up")


def schedule(
  name: str, lr: float, steps: int, warmup_steps: int, end_lr: float
) -> Callable[[int], float]:
  """Linear warm-up from 0 to `lr`, then constant, cosine or linear to `end_lr`."""
  if name not in SCHEDULES:
    raise UserError(f"optim.schedule={name!r} must be one of {', '.join(SCHEDULES)}")
  if not 0 <= warmup_steps <= steps:
    raise UserError(
      f"optim.warmup_steps={warmup_steps} must lie between 0 and the run's {steps} "
      "steps"
    )
  rest = max(steps - warmup_steps, 1)
  after = {
    "constant": optax.constant_schedule(lr),
    "cosine": optax.cosine_decay_schedule(lr, rest, alpha=end_lr / lr if lr else 0.0),
    "linear": optax.linear_schedule(lr, end_lr, rest),
  }[name]
  if not warmup_steps:
    return after
  warmup = optax.linear_schedule(0.0, lr, warmup_steps)
  return optax.join_schedules([warmup, after], [warmup_steps])


def build(
  learning_rate: Callable[[int], float],
  *,
  lr_scale: float = 1.0,
  b1: float,
  b2: float,
  eps: float,
  weight_decay: float,
  clip: float,
  dtype: str = "",
) -> optax.GradientTransformation:
  """AdamW on one tree. `clip` bounds the tree's global gradient norm; 0 is off.

  Student and online module have one each, with norms of their own: a module's
  gradient never changes how the student's is clipped.

  dtype: in which the first moment is kept and decayed; '' is the parameters' own. The
    second moment is always as the parameters are: in bfloat16 it could never fall, as
    x * .999 (b2) rounds to x. So would a first moment whose b1 is as near to 1.
  """
  parts = [optax.clip_by_global_norm(clip)] if clip else []
  adamw = optax.adamw(
    lambda count: learning_rate(count) * lr_scale,
    b1=b1,
    b2=b2,
    eps=eps,
    weight_decay=weight_decay,
    mask=decay_mask,
    mu_dtype=dtype or None,
  )
  return optax.chain(*parts, adamw)


def decay_mask(params):
  """True on the leaves that weight decay applies to."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: path_name(path).rsplit("/", 1)[-1] in _DECAYED, params
  )
