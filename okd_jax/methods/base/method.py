"""What a method is, and what it is given."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from okd_jax.losses import (
  Output,
  TokenLoss,
  cross_entropy,
  entropy,
  forward_kl,
  reverse_kl,
  token_weights,
  top1_agreement,
  weighted_sums,
)
from okd_jax.methods.base.knobs import Knob, Linear
from okd_jax.methods.base.sequences import Sequences
from okd_jax.models import Decoder, output
from okd_jax.models.adapters import module_norm, take_blocks

Params = dict[str, Any]
Batch = dict[str, Array]
Loss = tuple[Float[Array, ""], dict[str, Float[Array, ""]]]

stop_gradient = jax.lax.stop_gradient


@dataclasses.dataclass(frozen=True)
class Models:
  """The apply functions a method may call, and how to chunk their logits.

  student(params, batch, key, mix=None) -> Output: the student's, without dropout
    where the key is None.
  teacher(frozen, adapter, batch, mix=None) -> Output: the plain teacher's where
    adapter is None. `mix` mixes other tokens' embeddings in (`models.Mix`).
  teachers(frozen, adapter, batch) -> (Output, Output): the adapted and the plain
    teacher's, what lies below the modules computed once for both.
  module_norm(frozen, adapter) -> the norm of what the module adds or has changed.
  chunk: positions of a row whose logits are in memory at once.
  vocab_size: ids that count, where a stored teacher knows fewer than the student.
  named: of several teachers the same for each one, by name.
  """

  student: Callable[..., Output]
  teacher: Callable[..., Output]
  teachers: Callable[..., tuple[Output, Output]]
  chunk: int = 64
  module_norm: Callable[..., Float[Array, ""]] = lambda _, adapter: module_norm(adapter)
  vocab_size: int | None = None
  named: Mapping[str, "Models"] = dataclasses.field(default_factory=dict)


def apply_functions(
  decoders: Mapping[str, Decoder], chunk: int = 64, vocab_size: int | None = None
) -> Models:
  """What the decoders 'student', 'teacher' and 'adapted' give a method.

  Of several teachers they are 'teacher:NAME' and 'adapted:NAME'.

  The latter two need not be there if the method has no use for them.
  """

  def student(params, batch, key, mix=None):
    decoder = decoders["student"]
    if key is None:
      decoder = decoder.clone(dropout=0.0)
    return output(decoder, {"params": params}, batch, key, mix=mix)

  def teacher(frozen, adapter, batch, mix=None):
    decoder, variables = decoders["teacher"], {"params": frozen}
    if adapter is not None:
      decoder, variables = decoders["adapted"], variables | {"adapter": adapter}
    top = {} if mix else _kept_trunk(decoders, batch)
    return output(decoder, variables, batch, mix=mix, **top)

  def teachers(frozen, adapter, batch):
    plain, adapted = decoders["teacher"], decoders["adapted"]
    start = _trunk_layers(adapted)
    if not start:
      return teacher(frozen, adapter, batch), teacher(frozen, None, batch)
    variables = {"params": frozen}
    top = _kept_trunk(decoders, batch)
    if not top:
      below = output(plain, variables, batch, stop=start).hidden
      top = {"hidden": below, "start": start}
    return (
      output(adapted, variables | {"adapter": adapter}, batch, **top),
      output(plain, variables, batch, **top),
    )

  def norm(frozen, adapter):
    config, base = decoders["adapted"].adapter, None
    if config.kind == "blocks":
      base = {"layers": take_blocks(frozen["layers"], config)}
    return module_norm(adapter, base)

  names = [role.partition(":")[2] for role in decoders if role.startswith("teacher:")]
  named = {}
  for name in names:
    own = {"student": decoders["student"], "teacher": decoders[f"teacher:{name}"]}
    if f"adapted:{name}" in decoders:
      own["adapted"] = decoders[f"adapted:{name}"]
    named[name] = apply_functions(own, chunk)
  return Models(student, teacher, teachers, chunk, norm, vocab_size, named)


def _trunk_layers(adapted: Decoder) -> int:
  """How many layers lie below the lowest module."""
  total = adapted.config.num_layers
  return total - adapted.adapter.num_layers(total)


def _kept_trunk(decoders, batch) -> dict[str, Any]:
  """Where to go on from, if what lies below the modules was kept (`trunk`)."""
  if "trunk" not in batch:
    return {}
  adapted = decoders["adapted"]
  return {"hidden": batch["trunk"], "start": _trunk_layers(adapted)}


@dataclasses.dataclass(frozen=True)
class Method:
  """One pure loss and what the rest of the program must know about it.

  loss(models, params, frozen, batch, key, knobs) -> (loss, metrics): `params` holds
    the trees 'student' and, if the method adapts, 'adapter'; `frozen` the teacher's
    base. `batch['weights']` holds 1/(valid tokens of the whole batch) on valid tokens,
    so a loss and each metric is a plain sum, and sums over micro-batches add up.
  teacher: 'none', 'frozen', 'adapted' or 'several'; of several, `frozen` and
    params['adapter'] hold a tree by name, the latter for those that adapt.
  trees: what else is trained, by name: `init(key, teachers, hidden_size) -> tree`,
    with the number of teachers and the student's width, and its learning rate.
  knobs: every number in the loss, by its configuration key.
  updates: the trees that move, in order; trees in one group move simultaneously.
  sequences: where the text comes from. What it puts beside the sampled rows, such as
    batch['gold'], is a batch of its own with weights of its own.
  weights: mask [B, L] of a whole batch to the weight of each position.
  module: the kind of online module where adapter.kind leaves it open.
  takes_stored: whether the loss reads what a teacher said before, batch['stored'],
    where there is no teacher (`cache_teacher`).
  takes_packed: whether a row may hold several texts, apart only by 'segment_ids'.
  """

  loss: Callable[[Models, Params, Any, Batch, Array, Mapping[str, Any]], Loss]
  teacher: str
  knobs: Mapping[str, Knob] = dataclasses.field(default_factory=dict)
  updates: tuple[tuple[str, ...], ...] = (("student",),)
  sequences: Sequences = Sequences()
  weights: Callable[[Array], Array] = token_weights
  module: str = "lora"
  takes_stored: bool = False
  takes_packed: bool = True
  trees: Mapping[str, tuple[Callable, float]] = dataclasses.field(default_factory=dict)

  def knobs_at(self, progress) -> dict[str, Any]:
    """The value of each knob at a share of the run, 0 at the first step, 1 at the last.

    Constant knobs stay Python numbers, so that a loss can leave out what they switch
    off; moving ones are traced.
    """
    return {
      name: knob(progress) if isinstance(knob, Linear) else knob
      for name, knob in self.knobs.items()
    }


def combine(*terms: tuple[Any, Float[Array, "B C"]]) -> Float[Array, "B C"]:
  """The sum of weight * value.

  A term whose weight is the number 0 is left out, so that it costs nothing and
  0 * inf cannot arise.
  """
  kept = [weight * value for weight, value in terms if not is_zero(weight)]
  return sum(kept[1:], kept[0]) if kept else jnp.zeros_like(terms[0][1])


def is_zero(weight) -> bool:
  """Whether a weight is the number 0, so that what it weighs may be left out."""
  return isinstance(weight, int | float) and weight == 0


def diagnostics(logits, labels) -> dict[str, Float[Array, "B C"]]:
  """Per-token figures every distillation run logs, at no extra forward pass.

  At temperature 1 and in nats, whatever the loss does. A teacher whose `teacher_nll`
  is above the student's explains a student that distillation makes worse.
  """
  student, teacher = stop_gradient(logits["student"]), stop_gradient(logits["teacher"])
  return {
    "student_nll": cross_entropy(student, labels),
    "teacher_nll": cross_entropy(teacher, labels),
    "student_entropy": entropy(student),
    "teacher_entropy": entropy(teacher),
    "forward_kl": forward_kl(teacher, student),
    "reverse_kl": reverse_kl(teacher, student),
    "top1_agreement": top1_agreement(teacher, student),
  }


def gold_nll(models: Models, params: Params, batch: Batch, key) -> Array:
  """The student's cross-entropy on the gold rows that lie beside sampled ones."""

  def token_loss(logits, labels):
    return cross_entropy(logits["student"], labels), {}

  gold = batch["gold"]
  outputs = {"student": models.student(params["student"], gold, key)}
  return token_sums(models, token_loss, outputs, gold, {})[0]


def token_sums(
  models: Models,
  token_loss: TokenLoss,
  outputs: Mapping[str, Output],
  batch: Batch,
  knobs: Mapping[str, Any],
  labels=None,
  one_vocabulary: bool = True,
) -> Loss:
  """Sums of a token loss over the batch, chunk by chunk (`losses.weighted_sums`).

  labels: what the loss gets in place of the batch's labels.
  one_vocabulary: whether all heads are of the same tokens, however padded.
  """
  moving = {k: v for k, v in knobs.items() if isinstance(v, jax.Array)}
  constant = {k: v for k, v in knobs.items() if k not in moving}
  return weighted_sums(
    functools.partial(token_loss, **constant),
    cut_heads(outputs, models.vocab_size) if one_vocabulary else outputs,
    batch["labels"] if labels is None else labels,
    batch["weights"],
    models.chunk,
    moving,
  )


def cut_heads(
  outputs: Mapping[str, Output], vocab_size: int | None = None
) -> dict[str, Output]:
  """Every head cut to the smallest vocabulary, or to `vocab_size`.

  The rows beyond are unused padding: that the tokenizers agree was checked when the
  models were loaded. Padded ids thus have probability 0 on both sides instead of a
  share of somebody's mass.
  """
  size = vocab_size or min(output.head.shape[0] for output in outputs.values())
  return {name: out._replace(head=out.head[:size]) for name, out in outputs.items()}
