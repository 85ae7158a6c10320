"""Online modules: the trained parts of a model that is otherwise frozen.

They live in the Flax collection `adapter`, beside `params` and never inside it,
so that `teacher.apply({'params': frozen, 'adapter': trained}, tokens)` is the
adapted teacher, the same call without `adapter` is the plain one, and a gradient
with respect to `adapter` touches no base weight.

    params/layers/attention/query/kernel     [N, D, H]      frozen
    adapter/layers/attention/query/down      [k, D, r]      lora
    adapter/layers/attention/query/up        [k, r, H]      lora, zero at the start
    adapter/layers/attention/prefix_key      [k, m, K, D]   prefix
    adapter/layers/attention/prefix_value    [k, m, K, D]   prefix
    adapter/prompt/embedding                 [m, D]         prompt, and its MLP's
    adapter/prompt/{hidden,out}/{kernel,bias}               kernels [D, D], biases [D]
    adapter/prompt/vectors                   [m, D]         prompt without its MLP
    adapter/layers/attention/query/kernel    [c, D, H]      blocks, and so on: all of c
                                                            layers' own parameters

With LoRA and blocks the adapted teacher is the plain one at step 0. Prefix and prompt
have no such start: whatever virtual tokens hold, they take attention from the real
ones.

A student that is trained in part has LoRA, or is a `Part` of itself.

A new kind is a class of `base.Adapter`, a line in `KINDS`, and one in the table of
`formats.peft` if PEFT knows it.
"""

import dataclasses
from typing import Any

from okd_jax.errors import UserError
from okd_jax.models.adapters.base import Adapter, Run
from okd_jax.models.adapters.blocks import Blocks
from okd_jax.models.adapters.lora import TARGETS, Lora
from okd_jax.models.adapters.part import Part
from okd_jax.models.adapters.prefix import Prefix
from okd_jax.models.adapters.prompt import Prompt, prompt_vectors

__all__ = [
  "KINDS",
  "TARGETS",
  "Adapter",
  "Blocks",
  "Lora",
  "Part",
  "Prefix",
  "Prompt",
  "Run",
  "make",
  "prompt_vectors",
]

KINDS: dict[str, type[Adapter]] = {
  cls.kind: cls for cls in (Lora, Prefix, Prompt, Blocks)
}


def make(kind: object, **fields: Any) -> Adapter:
  """The online module of this kind, with those of the fields that the kind has.

  Args:
    kind: of `KINDS`.
    **fields: of any kind, such as a configuration's whole section `adapter`.

  Raises:
    UserError: for an unknown kind, a field that is wrong, or a choice of `layers` for a
      kind that leaves none.
  """
  if not isinstance(kind, str) or kind not in KINDS:
    raise UserError(f"adapter.kind={kind!r} is unknown; use one of {', '.join(KINDS)}")
  cls = KINDS[kind]
  if cls.layers_refused and (layers := fields.get("layers")):
    raise UserError(
      f"adapter.layers={layers} does not go with adapter.kind={kind!r}, "
      f"{cls.layers_refused}"
    )
  own = {field.name for field in dataclasses.fields(cls)}
  return cls(**{name: value for name, value in fields.items() if name in own})
