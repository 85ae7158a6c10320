"""Every figure that is logged or shown, declared once: its name and what it means.

Rows of metrics.jsonl, tables, the report and the choice of the best checkpoint all
read what stands here.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping

from okd_jax.errors import UserError

NEEDS = ("", "teacher", "distribution", "answers")


@dataclasses.dataclass(frozen=True)
class Figure:
  """What is to be known of a figure.

  of: the tree whose pass it is read from, in a step of several passes: 'student',
    'adapter', 'policy' or another that a method trains. If that tree has no pass of its
    own, the figure is read from the first pass.
  column: whether tables show it.
  needs: of columns, what there must be to measure it: '', a 'teacher' in the student's
    own tokens, its whole 'distribution', or 'answers' to compare with.
  each: of those that several teachers have one each, what they are called, with {} in
    the place of the teacher's name.

  Raises:
    UserError: for another `needs`, or an `each` without a place for the name.
  """

  name: str
  title: str
  meaning: str = ""
  digits: int = 3
  larger_is_better: bool = False
  of: str = "student"
  column: bool = False
  needs: str = ""
  each: str = ""

  def __post_init__(self):
    if self.needs not in NEEDS:
      raise UserError(
        f"figure {self.name}: needs={self.needs!r} must be one of "
        f"{', '.join(map(repr, NEEDS))}"
      )
    if self.each and self.each.count("{}") != 1:
      raise UserError(f"figure {self.name}: each={self.each!r} must have one {{}}")


# In the order in which tables show them. In rows of training 'loss' is what is
# minimised, all terms together; 'top1_agreement' and 'acceptance' are shares there, not
# per cent.
_COLUMNS = (
  Figure(
    "loss",
    "loss",
    "cross-entropy of the held-out tokens in nats; less is better",
    each="{}_loss",
  ),
  Figure(
    "perplexity",
    "perplexity",
    "exp(loss): torn between so many equal choices",
    digits=2,
  ),
  Figure(
    "forward_kl",
    "KL(teacher‖·)",
    "nats per token from the frozen teacher to this model: what it misses of what the "
    "teacher would say; a copy has 0",
    needs="distribution",
    each="{}_forward_kl",
  ),
  Figure(
    "reverse_kl",
    "KL(·‖teacher)",
    "the other way: what the teacher would not say",
    needs="distribution",
  ),
  Figure(
    "top1_agreement",
    "top-1 %",
    "tokens at which its first choice is the teacher's",
    digits=1,
    larger_is_better=True,
    needs="teacher",
  ),
  Figure(
    "acceptance",
    "acceptance %",
    "the share of this model's tokens that speculative decoding with the teacher keeps",
    digits=1,
    larger_is_better=True,
    needs="distribution",
  ),
  Figure(
    "rougeL",
    "ROUGE-L",
    "words in common with the reference answers, F1 × 100",
    digits=1,
    larger_is_better=True,
    needs="answers",
  ),
  Figure(
    "exact_match",
    "exact match",
    "answers that equal a reference, in %",
    digits=1,
    larger_is_better=True,
    needs="answers",
  ),
)

_HELD_OUT = (
  Figure("teacher_loss", "teacher's loss", "the frozen teacher's held-out loss"),
  Figure(
    "top10_overlap",
    "top-10 %",
    "share of the teacher's ten likeliest tokens that are among this model's",
    digits=1,
    larger_is_better=True,
  ),
  Figure(
    "rounding_kl",
    "KL(whole‖int8)",
    "nats a token from the teacher as it is stored to the one of teacher.dtype=int8",
    digits=5,
  ),
  Figure("own_token_loss", "loss in own tokens", "of a teacher with other tokens"),
  Figure(
    "adapted_loss",
    "adapted teacher's loss",
    "the adapted teacher's held-out loss",
    of="adapter",
    each="{}_adapted_loss",
  ),
  Figure(
    "adapted_forward_kl",
    "KL(adapted‖·)",
    "nats per token from the adapted teacher to the student",
    each="{}_adapted_forward_kl",
  ),
  Figure(
    "adapted_drift",
    "KL(teacher‖adapted)",
    "nats per token by which the online module moved the teacher",
    of="adapter",
  ),
  Figure("rougeL_std", "ROUGE-L ±", "deviation over seeds", digits=1),
  Figure("exact_match_std", "exact match ±", "deviation over seeds", digits=1),
  Figure("n", "rows", "how many rows were evaluated", digits=0),
)

# Of training rows, in nats per token unless something else is said.
_ON_ROWS = (
  Figure("student_nll", "student's CE", "the student's cross-entropy on the labels"),
  Figure("teacher_nll", "teacher's CE", "its teacher's cross-entropy on the labels"),
  Figure("student_entropy", "student's entropy", "how unsure the student is"),
  Figure("teacher_entropy", "teacher's entropy", "how unsure its teacher is"),
)
_STUDENT = (
  Figure("student_loss", "student's loss", "what the student minimises"),
  Figure("divergence", "divergence", "the method's own, of teacher and student"),
  Figure("student_divergence", "divergence, own text", "on what the student wrote"),
  Figure("gold_nll", "CE on gold", "beside sampled text, on the data's own answers"),
  Figure("rank_loss", "rank loss", "1 - correlation of the likeliest tokens' ranks"),
  Figure("aligned", "aligned", "share of positions at which both answers go on"),
  Figure("reward", "reward", "log-probability ratio of teacher and student", 3, True),
  Figure("importance", "importance", "mean weight of the sampled tokens"),
  Figure("weight", "weight", "how much a teacher counts", each="weight_{}"),
  Figure("nll", "CE of a teacher", "its cross-entropy on the labels", each="nll_{}"),
)
_OTHERS = (
  Figure(
    "module_loss",
    "module's loss",
    "what the online module minimises",
    of="adapter",
    each="module_loss_{}",
  ),
  Figure(
    "module_divergence",
    "module's divergence",
    "the adapted teacher's, of the student",
    of="adapter",
    each="module_divergence_{}",
  ),
  Figure(
    "drift",
    "drift",
    "KL from the frozen teacher to the adapted one",
    of="adapter",
    each="drift_{}",
  ),
  Figure("pull", "pull", "KL from the adapted teacher to the frozen one", of="adapter"),
  Figure(
    "adapter_norm",
    "module's norm",
    "of what the module adds to the weights or has changed in them",
    of="adapter",
    each="adapter_norm_{}",
  ),
  Figure("gate_loss", "gate's loss", "what the gate minimises", of="gate"),
  Figure("policy_loss", "policy gradient", "its surrogate loss", of="policy"),
  Figure(
    "policy_reward",
    "policy's reward",
    "minus what the student still loses once it has moved",
    larger_is_better=True,
    of="policy",
  ),
  Figure(
    "policy_gain",
    "policy's gain",
    "how much less the student loses than before the step",
    larger_is_better=True,
    of="policy",
  ),
)

_ABOUT_STEPS = (
  Figure("lr", "learning rate", "of the student at this step", digits=6),
  Figure("tokens", "tokens", "in the step's rows", digits=0),
  Figure("trained_tokens", "trained tokens", "those that the loss counts", digits=0),
  Figure("tokens_per_s", "tokens/s", "since the row before", 0, larger_is_better=True),
  Figure("step_s", "s a step", "since the row before, sampling and all", digits=4),
  Figure("sampled", "sampled", "share of steps on sampled text"),
  Figure("sampled_length", "sampled length", "tokens of an answer", digits=1),
  Figure("sampled_ended", "sampled and ended", "share of answers that came to an end"),
  Figure("sampling_time_share", "sampling time", "share of the time spent on sampling"),
  Figure("replay_age", "replay age", "steps since the rows were sampled", digits=1),
)


def _of_trees() -> tuple[Figure, ...]:
  """Norms of each tree that a method here may train."""
  return tuple(
    Figure(f"{tree}_{kind}_norm", f"{kind} norm, {tree}", meaning, of=tree)
    for tree in ("student", "adapter", "gate", "policy")
    for kind, meaning in (("grad", "before clipping"), ("update", "of one step"))
  )


def _mixed() -> tuple[Figure, ...]:
  """MixKD's figures of mixed rows, which are not those of plain ones."""
  beside = [f for f in _COLUMNS if f.needs in ("teacher", "distribution")]
  return tuple(
    Figure(
      f"mixed_{f.name}",
      f"mixed {f.name.replace('_', ' ')}",
      f"{f.meaning}, on mixed rows",
      f.digits,
      f.larger_is_better,
    )
    for f in (*_ON_ROWS, *beside)
  )


FIGURES: dict[str, Figure] = {
  f.name: f
  for f in (
    *(dataclasses.replace(f, column=True) for f in _COLUMNS),
    *(_HELD_OUT + _ON_ROWS + _STUDENT + _OTHERS + _ABOUT_STEPS),
    *(_of_trees() + _mixed()),
  )
}


def declare(figure: Figure) -> None:
  """Adds a figure, such as one that somebody else's method logs.

  Raises:
    UserError: if the name is taken by another one.
  """
  if FIGURES.setdefault(figure.name, figure) != figure:
    raise UserError(
      f"figure {figure.name!r} is declared already, as "
      f"{FIGURES[figure.name].title!r}; take another name"
    )


def figure(name: str) -> Figure:
  """What was declared; of an undeclared name, a plain figure with it as the title.

  Of one of several teachers, such as 'module_loss_big' or 'big_forward_kl', that of
  the figure they have one each of. Moving knobs, 'method.KNOB', are undeclared:
  configuration, not measurements.
  """
  if name in FIGURES:
    return FIGURES[name]
  found = [f for f in FIGURES.values() if f.each and _is_one(name, f.each)]
  # The longest: 'big_adapted_loss' is no loss of a teacher 'big_adapted'.
  return max(found, key=lambda f: len(f.each), default=Figure(name, name))


def _is_one(name: str, pattern: str) -> bool:
  before, after = pattern.split("{}")
  longer = len(name) > len(before) + len(after)
  return longer and name.startswith(before) and name.endswith(after)


def owner(name: str) -> str:
  """The trained tree that a figure is about."""
  return figure(name).of


def columns() -> dict[str, Figure]:
  """Those that tables show, in order."""
  return {name: f for name, f in FIGURES.items() if f.column}


def score_by(name: str) -> Callable[[Mapping[str, float | None]], float] | None:
  """What ranks checkpoints by figure `name`, larger being better; None for ''.

  One that was not finite, or is saved as null since it was not, is worse than any.
  """
  if not name:
    return None
  sign = 1 if figure(name).larger_is_better else -1

  def score(values: Mapping[str, float | None]) -> float:
    value = values[name]
    if value is None or not math.isfinite(value):
      return -math.inf
    return sign * value

  return score


def stalled(
  evals: Mapping[int, Mapping[str, float | None]], best: str, patience: int
) -> bool:
  """Whether the last `patience` evaluations brought nothing better than one before.

  evals: figures by step; step 0, of which there is no checkpoint, does not count. With
    patience 0, or no figure to go by, a run never stalls.
  """
  score = score_by(best)
  if not (score and patience):
    return False
  scores = [score(evals[step]) for step in sorted(evals) if step]
  if len(scores) <= patience:
    return False
  return not max(scores[-patience:]) > max(scores[:-patience])


def table(rows: Mapping[str, Mapping[str, float]]) -> str:
  """A plain-text table: a row a name, and those of `columns` that any of them has."""
  shown = {
    name: f.title
    for name, f in columns().items()
    if any(name in row for row in rows.values())
  }
  cells = [["", *shown.values()]]
  for name, row in rows.items():
    cells.append([name, *(_cell(row, column) for column in shown)])
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  lines = [
    "  ".join(
      [line[0].ljust(widths[0])]
      + [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
    ).rstrip()
    for line in cells
  ]
  return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def _cell(row: Mapping[str, float], name: str) -> str:
  """Of a terminal: four significant digits or so, and the deviation if there is one."""
  value, std = row.get(name), row.get(f"{name}_std")
  if value is None or not math.isfinite(value):
    return "–"
  digits = 3 if abs(value) < 10 else 2 if abs(value) < 100 else 1
  return f"{value:.{digits}f}" + ("" if std is None else f" ± {std:.{digits}f}")
