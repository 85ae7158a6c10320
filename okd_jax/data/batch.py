"""A batch: rows of one length, and what lies beside them."""

from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree, Shaped

ROW = ("tokens", "labels", "mask", "segment_ids")
# Of rows whose teacher reads another prompt, also these.
OWN_PROMPT = ("teacher_tokens", "teacher_segments", "align")


@flax.struct.dataclass
class Batch:
  """Rows for next-token prediction (`pack_row`), as one tree of arrays.

  Attributes:
    tokens: what a model reads.
    labels: the token that follows each of them.
    mask: where a label is trained on.
    segment_ids: 0 for padding, else the number of the text within its row.
    teacher_tokens, teacher_segments: what the teacher reads in place of these, where
      that is another prompt with the same answer.
    align: where the teacher predicts the label that it counts in `mask`; 0 elsewhere.
    weights: of each position in a token mean, 0 where masked; set by the step.
    module_weights: of each position in the mean over the rows that teach adapters,
      where that is not every row; set by the step.
    gold: the data's own rows for the same prompts, where the rows are sampled.
    answers: rows with the answers that a model, 'teacher' or 'student', gave to the
      same prompts before training.
    other_tokens: the same records in the tokens of the teacher's own tokenizer.
    partner: the row that each one is mixed with.
    stored: what the teacher said about the rows before training, by name.
    trunk: what enters the teacher's lowest adapted layer.
    facts: what a method found about the rows before the step, by name.
  """

  tokens: Int[Array | np.ndarray, "B L"]
  labels: Int[Array | np.ndarray, "B L"]
  mask: Bool[Array | np.ndarray, "B L"]
  segment_ids: Int[Array | np.ndarray, "B L"]
  teacher_tokens: Int[Array | np.ndarray, "B T"] | None = None
  teacher_segments: Int[Array | np.ndarray, "B T"] | None = None
  align: Int[Array | np.ndarray, "B L"] | None = None
  weights: Float[Array, "B L"] | None = None
  module_weights: Float[Array, "B L"] | None = None
  gold: "Batch | None" = None
  answers: Mapping[str, "Batch"] = flax.struct.field(default_factory=dict)
  other_tokens: "Batch | None" = None
  partner: "Batch | None" = None
  stored: Mapping[str, Shaped[Array | np.ndarray, "B L ..."]] | None = None
  trunk: Float[Array | np.ndarray, "B L D"] | None = None
  facts: Mapping[str, Any] = flax.struct.field(default_factory=dict)

  @classmethod
  def of(cls, rows: Mapping[str, Any]) -> "Batch":
    """The batch of rows that a loader gives; their numbers are left out."""
    own = OWN_PROMPT if OWN_PROMPT[0] in rows else ()
    return cls(**{name: rows[name] for name in (*ROW, *own)})

  @property
  def rows(self) -> dict[str, Any]:
    """The arrays of the rows themselves, by name."""
    found = {name: getattr(self, name) for name in (*ROW, *OWN_PROMPT)}
    return {name: value for name, value in found.items() if value is not None}


def first_rows(tree: PyTree, every: int) -> PyTree:
  """Of arrays [B, …] the first of each `every` rows, on the devices they lie on."""
  return jax.tree.map(lambda x: x.reshape(-1, every, *x.shape[1:])[:, 0], tree)


def other_rows(tree: PyTree, every: int) -> PyTree:
  """The rows that `first_rows` leaves out, in order."""

  def others(x: Shaped[Array, "B ..."]) -> Shaped[Array, "_ ..."]:
    return x.reshape(-1, every, *x.shape[1:])[:, 1:].reshape(-1, *x.shape[1:])

  return jax.tree.map(others, tree)
