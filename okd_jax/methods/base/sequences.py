"""Where the text of a training step comes from: a description, see `run.batches`."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from okd_jax.data.batch import Batch
from okd_jax.errors import UserError
from okd_jax.methods.base.knobs import (
  Knob,
  Linear,
  check_choice,
  check_least,
  check_share,
)
from okd_jax.text.rollout import Sampling

REPLAY_RATIOS = ("decreasing", "constant", "increasing")
Source = Literal["gold", "student", "teacher", "mixture", "interleaved"]


@dataclasses.dataclass(frozen=True)
class Replay:
  """Sampled rows that are kept and trained on again, first in first out.

  adaptive: DistiLLM's rule (Ko et al. 2024, arXiv 2402.03898, and its code): a share
    phi of the steps is sampled, of which a part is fresh; phi starts at 0 and grows by
    0.1 whenever the held-out loss is at least `loss_eps` above its reference. Else
    every sampled batch is stored, and what is trained on is drawn from the store (the
    GKD baseline in DistiLLM's code).
  ratio: how phi and time decide on fresh text: 'decreasing' phi (1 - t / T),
    'constant' phi / 2, 'increasing' phi t / T.
  """

  capacity: int
  adaptive: bool = False
  ratio: str = "decreasing"
  loss_eps: float = 0.1

  def __post_init__(self):
    check_least("method.replay_capacity", self.capacity, 1)
    check_choice("method.replay_ratio", self.ratio, REPLAY_RATIOS)
    check_least("method.loss_eps", self.loss_eps, 0)


@dataclasses.dataclass(frozen=True)
class Sequences:
  """Which text a method trains on; the default is the data's own.

  source: 'gold'; 'student' samples; 'teacher', its answers, written before training;
    'mixture', of both models in each token's distribution; 'interleaved', the student's
    tokens with the teacher's in place of those it would not have written.
  share: of the steps that train on sampled text, the others take gold.
  student, teacher: how each draws.
  weight: the teacher's in a mixture.
  top: of the teacher's tokens, that the student's must be among.
  max_new_tokens: of an answer; 0 is what fits between prompt and row length.
  gold: whether the step's gold rows are needed beside, as `Batch.gold`: those of the
    same prompts, unless the sampled rows are replayed or held from an earlier step.
  beforehand: 'teacher' and 'student' answer every prompt once before training; their
    rows for the same prompts come as `Batch.answers`. With 'gold' as the source and
    without `gold`, the step's own rows may be prompts alone, and are not to be read.
  replay: what becomes of sampled rows.
  own_tokens: the teacher reads the same records in the tokens of its own tokenizer,
    as `Batch.other_tokens`.
  updates: steps that train on one and the same sampled batch.
  prepare: (models, params, frozen, batch, key, now) -> batch, what is found or drawn
    once for the whole batch, before its first update and before it is cut into
    micro-batches; a sampled one keeps it. What it adds has a row for each of its rows.
  """

  source: Source = "gold"
  share: Knob = 1.0
  student: Sampling = Sampling()
  teacher: Sampling = Sampling()
  weight: float = 0.0
  top: int = 0
  max_new_tokens: int = 0
  gold: bool = False
  beforehand: tuple[str, ...] = ()
  own_tokens: bool = False
  replay: Replay | None = None
  updates: int = 1
  prepare: Callable[..., Batch] | None = None

  @property
  def sampled(self) -> bool:
    """Whether the text is not the data's own."""
    return self.source != "gold"

  @property
  def answers_all(self) -> bool:
    """Whether no row's own answer is read, so that prompts alone will do."""
    if self.source == "gold":
      return bool(self.beforehand) and not self.gold
    adapts = self.replay is not None and self.replay.adaptive
    return not self.gold and self.share == 1.0 and not adapts


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextKnobs:
  """What a method that samples text reads; None is the method's own.

  max_new_tokens: of an answer; 0 is what fits beside the prompt.
  sample_temperature, sample_top_p, sample_top_k: how the student draws (and the teacher
    where answers are written before training).
  """

  max_new_tokens: int = 0
  sample_temperature: float | None = None
  sample_top_p: float | None = None
  sample_top_k: int = 0

  own_temperature, own_top_p = 1.0, 1.0  # of the class, not knobs

  def __post_init__(self):
    for key in ("sample_temperature", "sample_top_k", "max_new_tokens"):
      value = getattr(self, key)
      check_least(f"method.{key}", 0 if value is None else value, 0)
    top_p = self.sampling().top_p
    if not 0 < top_p <= 1:
      raise UserError(f"method.sample_top_p={top_p} must be above 0 and at most 1")

  def sampling(self) -> Sampling:
    """How to draw."""
    temperature, top_p = self.sample_temperature, self.sample_top_p
    return Sampling(
      self.own_temperature if temperature is None else temperature,
      self.sample_top_k,
      self.own_top_p if top_p is None else top_p,
    )

  def sequences(self, source: Source, **more: Any) -> Sequences:
    """The sequences that the knobs ask for; `more` are other fields of them."""
    return Sequences(
      source=source,
      student=self.sampling(),
      max_new_tokens=self.max_new_tokens,
      **more,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharedTextKnobs(TextKnobs):
  """`TextKnobs` of a method that samples in a share of the steps.

  sampled_share: that share; None is the method's own.
  """

  sampled_share: Knob | None = None

  own_share = 1.0

  def __post_init__(self):
    super().__post_init__()
    check_share("method.sampled_share", self.share())

  def share(self) -> Knob:
    """The share of the steps, constant or moving."""
    share = self.sampled_share
    if share is None:
      return self.own_share
    if isinstance(share, Linear) and share.start is None:
      return Linear(self.own_share, share.end)
    return share

  def sequences(self, source: Source, **more: Any) -> Sequences:
    """The sequences that the knobs ask for; `more` are other fields of them."""
    return super().sequences(source, share=self.share(), **more)
