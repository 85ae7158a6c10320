"""How large the numbers of a configuration may be; how small, the sections say.

Beyond these no run would do what it says: seeds are 32 bits, steps are counted in 32,
and a temperature of 1e-30 makes every logit infinite, so that nothing is learnt.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from okd_jax.models.bounds import at_most, number, problems, whole

_COUNT, _SEED = at_most(2**31 - 1), whole(0, 2**32 - 1)
_ANY = {bool: None, int: _COUNT, float: number(-1e9, 1e9)}  # by a value's type
_SIZE, _RATE = at_most(2**24), number(-1e3, 1e3)
_WARM = number(1e-3, 1e3)
_KEYS = {
  "adapter.length": at_most(2**16),
  "adapter.lr_scale": number(-1e6, 1e6),
  "adapter.rank": at_most(2**16),
  "adapter.scale": number(-1e6, 1e6),
  "data.holdout_seed": _SEED,
  "data.max_length": _SIZE,
  "data.max_prompt_length": _SIZE,
  "data.max_teacher_length": _SIZE,
  "data.num_proc": whole(0, 1024),
  "eval.batch_size": _SIZE,
  "eval.max_new_tokens": _SIZE,
  "mesh.data": whole(-1, 2**20),
  "mesh.fsdp": whole(-1, 2**20),
  "mesh.tensor": whole(-1, 2**20),
  "method.max_new_tokens": _SIZE,
  "method.rank_temperature": _WARM,
  "method.replay_capacity": _SIZE,
  "method.temperature": _WARM,
  "optim.b1": number(0, 1 - 1e-9),
  "optim.b2": number(0, 1 - 1e-9),
  "optim.end_lr": _RATE,
  "optim.eps": number(1e-30, 1),
  "optim.lr": _RATE,
  "optim.weight_decay": _RATE,
  "train.batch_size": _SIZE,
  "train.microbatches": _SIZE,
  "train.seed": _SEED,
}
_GREEDY = (
  "eval.temperature",
  "method.sample_temperature",
  "method.teacher_temperature",
)


def beyond(section: str, values: Mapping[str, Any]) -> Iterator[str]:
  """A sentence for each number of a section, or one inside it, that is out of bounds.

  values: of the section's keys; None where nothing is set.
  """
  for name, value in values.items():
    key = f"{section}.{name}"
    if isinstance(value, Mapping):
      yield from beyond(key, value)
      continue
    # A knob that moves ends within the bounds that it starts in.
    own = key.replace("method.end.", "method.")
    bound = _KEYS.get(own, _ANY.get(type(value)))
    if own in _GREEDY:
      bound = _WARM if value else None
    if bound is not None and value is not None:
      yield from problems({key: value}, {key: bound})
