"""Where the text of a training step comes from: a description, sampled by `sampler`."""

import dataclasses
from collections.abc import Callable

from okd_jax.errors import UserError
from okd_jax.methods.base.knobs import Knob, Linear, check_share, ends
from okd_jax.text.rollout import Sampling

REPLAY_RATIOS = ("decreasing", "constant", "increasing")


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
    if self.capacity < 1:
      raise UserError(f"method.replay_capacity={self.capacity} must be at least 1")
    if self.ratio not in REPLAY_RATIOS:
      raise UserError(
        f"method.replay_ratio={self.ratio!r} must be one of {', '.join(REPLAY_RATIOS)}"
      )
    if not self.loss_eps >= 0:
      raise UserError(f"method.loss_eps={self.loss_eps} must be at least 0")


@dataclasses.dataclass(frozen=True)
class Sequences:
  """Which text a method trains on; the default is the data's own.

  source: 'gold'; 'student' samples; 'mixture', of both models in each token's
    distribution; 'interleaved', the student's tokens with the teacher's in place of
    those it would not have written.
  share: of the steps that train on sampled text, the others take gold.
  student, teacher: how each draws.
  weight: the teacher's in a mixture.
  top: of the teacher's tokens, that the student's must be among.
  max_new_tokens: of an answer; 0 is what fits between prompt and row length.
  gold: whether the step's gold rows are needed beside, as batch['gold']: those of the
    same prompts, unless the sampled rows are replayed or held from an earlier step.
  beforehand: 'teacher' and 'student' answer every prompt once before training; their
    rows for the same prompts come as batch['teacher'] and batch['student'].
  replay: what becomes of sampled rows.
  own_tokens: the teacher reads the same records in the tokens of its own tokenizer,
    as batch['teacher'].
  updates: steps that train on one and the same sampled batch.
  prepare: (models, params, frozen, batch, key) -> batch, what a batch must know about
    the models as they are before its first update; a sampled one keeps it.
  """

  source: str = "gold"
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
  prepare: Callable | None = None

  @property
  def sampled(self) -> bool:
    """Whether anything is sampled while training."""
    return self.source != "gold"


# The configuration keys of every method that samples.
SAMPLING = (
  "sampled_share",
  "max_new_tokens",
  "sample_temperature",
  "sample_top_p",
  "sample_top_k",
)


def make_sequences(
  source: str,
  *,
  sampled_share: Knob | None = None,
  max_new_tokens: int,
  sample_temperature: float | None,
  sample_top_p: float | None,
  sample_top_k: int,
  defaults: tuple[float, float, float] = (1.0, 1.0, 1.0),
  **more,
) -> Sequences:
  """The sequences that the configuration asks for.

  defaults: the share, temperature and top_p of the method itself, where the
    configuration leaves them open.

  Raises:
    UserError: for a setting out of range.
  """
  share, temperature, top_p = (
    default if value is None else value
    for value, default in zip(
      (sampled_share, sample_temperature, sample_top_p), defaults, strict=True
    )
  )
  if isinstance(share, Linear) and share.start is None:
    share = Linear(defaults[0], share.end)
  check_share("method.sampled_share", share)
  for key, value in (
    ("sample_temperature", temperature),
    ("sample_top_k", sample_top_k),
    ("max_new_tokens", max_new_tokens),
  ):
    if not value >= 0:
      raise UserError(f"method.{key}={value} must be at least 0")
  if not 0 < top_p <= 1:
    raise UserError(f"method.sample_top_p={top_p} must be above 0 and at most 1")
  return Sequences(
    source=source,
    share=share,
    student=Sampling(temperature, sample_top_k, top_p),
    max_new_tokens=max_new_tokens,
    **more,
  )


def never(knob: Knob) -> bool:
  """Whether a weight is 0 throughout."""
  return not any(ends(knob))
