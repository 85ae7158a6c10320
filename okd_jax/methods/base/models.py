"""The models of a run as pure functions, which is all that a method sees of them."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jaxtyping import Array, Float, Key, PyTree

from okd_jax.data.batch import Batch
from okd_jax.losses import Output
from okd_jax.methods.base.token_weights import TokenWeight
from okd_jax.models import Decoder, Mix, output

Params = Mapping[str, Any]
STUDENT = "student"  # its tree among those that are trained, and among frozen ones


@dataclasses.dataclass(frozen=True)
class Teacher:
  """One teacher's apply functions.

  apply(frozen, adapter, batch, mix=None) -> Output: the plain teacher's where adapter
    is None. `mix` mixes other tokens' embeddings in (`models.Mix`).
  both(frozen, adapter, batch) -> (Output, Output): the adapted and the plain one's,
    what lies below the adapter computed once for both.
  adapter_norm(frozen, adapter) -> the norm of what the adapter adds or has changed.
  """

  apply: Callable[..., Output]
  both: Callable[..., tuple[Output, Output]] | None = None
  adapter_norm: Callable[..., Float[Array, ""]] | None = None


@dataclasses.dataclass(frozen=True)
class Models:
  """The apply functions a method may call, and how to chunk their logits.

  student(params, batch, key, mix=None) -> Output: the student's, without dropout
    where the key is None. `params` is its tree as `seen` gives it.
  teachers: by name; frozen parameters and adapters are trees by these names, too.
  chunk: positions of a row whose logits are in memory at once.
  vocab_size: ids that count, where a stored teacher knows fewer than the student.
  one_row_in: one row in so many teaches the adapters, the first of each group; 0: none
    does, and the adapted teachers only teach.
  module_tokens: which of these rows' tokens teach the adapters; None: all of them.
  join: (trained, frozen) -> the student's variables, where it is trained in part.
  itself: the name of a teacher that is the student itself: it has the student's weights
    of the moment, without what is trained of one that carries LoRA; '' for none.
  """

  student: Callable[..., Output]
  teachers: Mapping[str, Teacher] = dataclasses.field(default_factory=dict)
  chunk: int = 64
  vocab_size: int | None = None
  one_row_in: int = 1
  module_tokens: TokenWeight | None = None
  join: Callable[[PyTree, PyTree], PyTree] | None = None
  itself: str = ""

  def seen(self, params: Params, frozen: Params) -> tuple[Params, Params]:
    """(params, frozen) as a method sees them: a whole student, and teachers alone."""
    if self.join is not None:
      whole = self.join(params[STUDENT], frozen[STUDENT])
      frozen = {name: tree for name, tree in frozen.items() if name != STUDENT}
      params = {**params, STUDENT: whole}
    if self.itself:
      own = params[STUDENT] if self.join is None else params[STUDENT]["params"]
      frozen = {**frozen, self.itself: jax.lax.stop_gradient(own)}
    return params, frozen

  def teacher(
    self,
    frozen: Params,
    adapters: Params | None,
    batch: Batch,
    mix: Mix | None = None,
  ) -> Output:
    """The only teacher's output: adapted, or plain where `adapters` is None."""
    [(name, teacher)] = self.teachers.items()
    return teacher.apply(frozen[name], adapters and adapters[name], batch, mix)

  def both(
    self, frozen: Params, adapters: Params, batch: Batch
  ) -> tuple[Output, Output]:
    """The only teacher's outputs, adapted and plain."""
    [(name, teacher)] = self.teachers.items()
    return teacher.both(frozen[name], adapters[name], batch)

  def suffix(self, name: str) -> str:
    """What the names of figures about this teacher end in: '' for the only one."""
    return f"_{name}" if len(self.teachers) > 1 else ""


def apply_functions(
  student: Decoder,
  teachers: Mapping[str, Decoder],
  adapted: Mapping[str, Decoder],
  chunk: int = 64,
  vocab_size: int | None = None,
  one_row_in: int = 1,
  module_tokens: TokenWeight | None = None,
  itself: str = "",
) -> Models:
  """What the decoders of a run give a method.

  Args:
    teachers: the plain ones by name; none if the method has no use for any.
    adapted: those of them that carry an adapter.
    chunk, vocab_size, one_row_in, module_tokens, itself: see `Models`.
  """

  def apply(
    params: PyTree, batch: Batch, key: Key[Array, ""] | None, mix: Mix | None = None
  ) -> Output:
    decoder = student if key is not None else student.clone(dropout=0.0)
    variables = {"params": params} if part is None else params
    return output(decoder, variables, batch, key, mix=mix)

  part = student.adapter
  join = part.variables if part else None
  named = {name: _teacher(d, adapted.get(name)) for name, d in teachers.items()}
  rest = chunk, vocab_size, one_row_in, module_tokens, join, itself
  return Models(apply, named, *rest)


def _teacher(plain: Decoder, adapted: Decoder | None) -> Teacher:
  start = adapted.adapter.trunk_layers(adapted.config.num_layers) if adapted else 0

  def kept(batch: Batch) -> dict[str, Any]:
    """Where to go on from, if what lies below the adapter was kept (`trunk`)."""
    return {} if batch.trunk is None else {"hidden": batch.trunk, "start": start}

  def apply(
    frozen: PyTree, adapter: PyTree | None, batch: Batch, mix: Mix | None = None
  ) -> Output:
    decoder, variables = plain, {"params": frozen}
    if adapter is not None:
      decoder, variables = adapted, variables | {"adapter": adapter}
    rest = {} if mix else kept(batch)
    return output(decoder, variables, batch, as_teacher=True, mix=mix, **rest)

  def both(frozen: PyTree, adapter: PyTree, batch: Batch) -> tuple[Output, Output]:
    if not start:
      return apply(frozen, adapter, batch), apply(frozen, None, batch)
    variables, top = {"params": frozen}, kept(batch)
    if not top:
      below = output(plain, variables, batch, as_teacher=True, stop=start).hidden
      top = {"hidden": below, "start": start}
    top["as_teacher"] = True
    return (
      output(adapted, variables | {"adapter": adapter}, batch, **top),
      output(plain, variables, batch, **top),
    )

  def adapter_norm(frozen: PyTree, adapter: PyTree) -> Float[Array, ""]:
    return adapted.adapter.norm(adapter, frozen)

  return Teacher(apply, both, adapter_norm)
