"""What a method is, and what its loss is made of."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from okd_jax.data.batch import Batch
from okd_jax.losses import (
  Output,
  Part,
  TokenLoss,
  acceptance,
  cross_entropy,
  entropy,
  forward_kl,
  reverse_kl,
  sums_of_parts,
  token_weights,
  top1_agreement,
)
from okd_jax.methods.base.knobs import Knob
from okd_jax.methods.base.models import Models, Params
from okd_jax.methods.base.sequences import Sequences
from okd_jax.methods.base.token_weights import TokenWeight, divide

Loss = tuple[Float[Array, ""], dict[str, Float[Array, ""]]]
Logits = Mapping[str, Float[Array, "B C V"]]
Now = Mapping[str, Any]  # knobs at a step: numbers, or traced scalars if they move

stop_gradient = jax.lax.stop_gradient


@dataclasses.dataclass(frozen=True)
class Method:
  """One pure loss and what the rest of the program must know about it.

  loss(models, params, frozen, batch, key, now) -> (loss, metrics): `params` holds the
    trees 'student' and, if teachers adapt, 'adapter', a tree by teacher; `frozen` the
    teachers' base by name; `now` the value of each knob. `batch.weights` holds
    1/(valid tokens of the whole batch) on valid tokens, so a loss and each metric is a
    plain sum, and sums over micro-batches add up.
  knobs: every number in the loss, by its configuration key.
  taught: whether it needs a teacher.
  reads_teacher: whether its loss does, too, and not only the text that comes first.
  several: whether it takes several teachers.
  adapts: whether its teachers carry adapters, which train with the student.
  adapter: their kind where adapter.kind leaves it open.
  trees: what else is trained, by name: `init(key, teachers, hidden_size) -> tree`,
    with the number of teachers and the student's width, and its learning rate.
  updates: the trees that move, in order; trees in one group move simultaneously.
  sequences: where the text comes from. What it puts beside the sampled rows, such as
    `Batch.gold`, is a batch of its own with weights of its own.
  carried: numbers that a run carries from step to step, by name, as they are at the
    first; the loss finds in `now` those whose names do not begin with '_'.
  carry: (carried, the step's metrics, share of the run that is over) -> carried, what
    they are in the next step.
  weights: mask [B, L] of a whole batch to the weight of each position.
  takes_stored: whether the loss reads what a teacher said before, `Batch.stored`,
    where there is no teacher (`cache_teacher`).
  takes_packed: whether a row may hold several texts, apart only by 'segment_ids'.
  takes_own_prompts: whether the teacher may read other prompts than the student, the
    answers being the same (`Batch.align`).
  takes_rows: whether its adapters may learn from some rows alone, or in some steps
    (`Models.one_row_in`, `Batch.module_weights`).
  """

  loss: Callable[[Models, Params, Params, Batch, Array, Now], Loss]
  knobs: Mapping[str, Knob] = dataclasses.field(default_factory=dict)
  taught: bool = True
  reads_teacher: bool = True
  several: bool = False
  adapts: bool = False
  adapter: str = "lora"
  trees: Mapping[str, tuple[Callable[..., PyTree], float]] = dataclasses.field(
    default_factory=dict
  )
  updates: tuple[tuple[str, ...], ...] = (("student",),)
  sequences: Sequences = Sequences()
  carried: Mapping[str, float] = dataclasses.field(default_factory=dict)
  carry: Callable[..., dict[str, Array]] = lambda carried, metrics, progress: carried
  weights: Callable[[Bool[Array, "B L"]], Float[Array, "B L"]] = token_weights
  takes_stored: bool = False
  takes_packed: bool = True
  takes_own_prompts: bool = True
  takes_rows: bool = False

  @property
  def numbers(self) -> list[str]:
    """The names in `now`."""
    return [*self.knobs, *told(self.carried)]


def told(carried: Mapping[str, Any]) -> dict[str, Any]:
  """Those of the carried numbers that the loss finds in `now`."""
  return {name: value for name, value in carried.items() if not name.startswith("_")}


def combine(*terms: tuple[Any, Float[Array, "*B"]]) -> Float[Array, "*B"]:
  """The sum of weight * value.

  A term whose weight is the number 0 is left out, so that it costs nothing and
  0 * inf cannot arise.
  """
  kept = [weight * value for weight, value in terms if not is_zero(weight)]
  return sum(kept[1:], kept[0]) if kept else jnp.zeros_like(terms[0][1])


def is_zero(weight: Any) -> bool:
  """Whether a weight is the number 0, so that what it weighs may be left out."""
  return isinstance(weight, int | float) and weight == 0


def diagnostics(
  logits: Logits, labels: Int[Array, "B C"]
) -> dict[str, Float[Array, "B C"]]:
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
    "acceptance": acceptance(teacher, student),
  }


def gold_nll(
  models: Models, params: Params, gold: Batch, key: Key[Array, ""] | None
) -> Float[Array, ""]:
  """The student's cross-entropy on gold rows, such as lie beside sampled ones."""

  def token_loss(logits: Logits, labels: Int[Array, "B C"]):
    return cross_entropy(logits["student"], labels), {}

  outputs = {"student": models.student(params["student"], gold, key)}
  return token_sums(models, token_loss, outputs, gold, {})[0]


def token_sums(
  models: Models,
  token_loss: TokenLoss,
  outputs: Mapping[str, Output],
  batch: Batch,
  now: Now,
  labels: PyTree | None = None,
  one_vocabulary: bool = True,
) -> Loss:
  """Sums of a token loss over the batch, chunk by chunk (`losses.weighted_sums`).

  Args:
    now: the knobs that the token loss gets as keywords.
    labels: what the loss gets in place of the batch's labels.
    one_vocabulary: whether all heads are of the same tokens, however padded.
  """
  outputs = cut_heads(outputs, models.vocab_size) if one_vocabulary else outputs
  labels = batch.labels if labels is None else labels
  return sums_of_rows(models, [Part(token_loss, outputs, labels, batch.weights)], now)


def sums_of_rows(models: Models, parts: Sequence[Part], now: Now) -> Loss:
  """`token_sums` of several groups of rows, each with a token loss of its own.

  parts: their outputs' heads are cut to one vocabulary already, where that is wanted.
  """
  moving = {k: v for k, v in now.items() if isinstance(v, jax.Array)}
  constant = {k: v for k, v in now.items() if k not in moving}
  bound = [
    part._replace(token_loss=functools.partial(part.token_loss, **constant))
    for part in parts
  ]
  return sums_of_parts(bound, models.chunk, moving)


def weigh(
  how: TokenWeight,
  models: Models,
  outputs: Mapping[str, Output],
  weights: Float[Array, "B L"],
) -> Float[Array, "B L"]:
  """Each row's weights divided anew among its tokens (`token_weights.divide`).

  outputs: of 'student' and 'teacher', and of 'base', the frozen teacher, which then
    says where they differ.
  """
  outputs = cut_heads(outputs, models.vocab_size)
  teacher = outputs.get("base", outputs["teacher"])
  return divide(how, teacher, outputs["student"], weights, models.chunk)


def cut_heads(
  outputs: Mapping[str, Output], vocab_size: int | None = None
) -> dict[str, Output]:
  """Every head cut to the smallest vocabulary, or to `vocab_size`.

  The rows beyond are unused padding: that the tokenizers agree was checked when the
  models were loaded. Padded ids thus have probability 0 on both sides instead of a
  share of somebody's mass.
  """
  size = vocab_size or min(output.head.shape[0] for output in outputs.values())
  return {name: out.first_ids(size) for name, out in outputs.items()}
