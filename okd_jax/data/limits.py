"""How long rows may be, and what is said of those that are longer."""

import dataclasses

from okd_jax.errors import UserError

POLICIES = ("drop", "truncate")
TURNS = ("all", "last")


@dataclasses.dataclass(frozen=True)
class Form:
  """How records become rows, how long these may be, and what becomes of longer ones.

  Conversations that are too long lose their first turns before anything else.

  Attributes:
    template: see `format.make_render`.
    teacher_template: what the teacher reads, see `privileged.teacher_render`.
    turns: of conversations, train on `all` answers or on the `last` alone.
    max_length: of a whole row, in tokens. Plain text is cut into windows of it.
    max_prompt_length: of a prompt.
    overlong_prompt: `drop` the row, or `truncate` the prompt to its last tokens.
    overlong_row: `truncate` the response, which then has no end token, or `drop`.
    max_teacher_length: of a row with the teacher's own prompt; 0 is max_length.
  """

  template: str = "default"
  teacher_template: str = ""
  turns: str = "last"
  max_length: int = 512
  max_prompt_length: int = 256
  overlong_prompt: str = "drop"
  overlong_row: str = "truncate"
  max_teacher_length: int = 0

  def __post_init__(self) -> None:
    problems = []
    for name, least in (("max_length", 2), ("max_prompt_length", 1)):
      value = getattr(self, name)
      if not isinstance(value, int) or value < least:
        problems.append(f"data.{name}={value!r} must be an integer of at least {least}")
    choices = {"overlong_prompt": POLICIES, "overlong_row": POLICIES, "turns": TURNS}
    for name, among in choices.items():
      value = getattr(self, name)
      if value not in among:
        problems.append(f"data.{name}={value!r} must be one of {', '.join(among)}")
    if problems:
      raise UserError("; ".join(problems))

  @property
  def teacher_length(self) -> int:
    """The most tokens of a row that the teacher reads."""
    return self.max_teacher_length or self.max_length

  @property
  def most_teacher_prompt(self) -> int:
    """The most tokens of its prompt: as much is left for the answer as elsewhere."""
    return self.teacher_length - max(self.max_length - self.max_prompt_length, 0)


@dataclasses.dataclass(frozen=True)
class Counts:
  """What became of the rows of a dataset.

  `windows` counts the pieces of texts that were cut; `kept` counts examples, so it
  exceeds `rows` when texts were. `straddled`: a token reached from the prompt into the
  response, which then has tokens of its own. `rewritten`: the chat template writes the
  conversation in another way than its prompt begins. `shortened`: conversations that
  lost their first turns. `apart`: turns that are rows of their own, since the template
  writes them anew once others follow. `untrained`: rows whose answer weighs 0.
  `last_alone`:
  conversations of which only the last answer is trained, since the teacher reads other
  ones before it.
  """

  rows: int
  kept: int = 0
  dropped_prompts: int = 0
  truncated_prompts: int = 0
  dropped_rows: int = 0
  truncated_rows: int = 0
  windows: int = 0
  straddled: int = 0
  rewritten: int = 0
  shortened: int = 0
  apart: int = 0
  untrained: int = 0
  last_alone: int = 0
  dropped_teacher_prompts: int = 0
  truncated_teacher_prompts: int = 0


def nothing_left(counts: Counts, limits: Form) -> str:
  """Why there is no row left, and which key to change."""
  fates = _fates(counts, limits)
  if len(fates) == 1:
    [(number, what, why, remedy)] = fates
    return f"all {number} {what} are {why}; {remedy}"
  causes = ", ".join(f"{n} {what} are {why} ({fix})" for n, what, why, fix in fates)
  return f"none of the {counts.rows} rows is left: {causes}"


def summary(counts: Counts, limits: Form) -> str:
  """The one line about a dataset."""
  parts = [f"{counts.kept} rows from {counts.rows} records"]
  if counts.windows:
    parts.append(f"{counts.windows} are windows of long texts")
  for number, what, why, _ in _fates(counts, limits):
    parts.append(f"dropped {number} ({what} {why})")
  if counts.truncated_prompts:
    length = limits.max_prompt_length
    parts.append(
      f"cut {counts.truncated_prompts} prompts to their last {length} tokens"
    )
  if counts.truncated_teacher_prompts:
    parts.append(
      f"cut {counts.truncated_teacher_prompts} teacher's prompts to their last "
      f"{limits.most_teacher_prompt} tokens"
    )
  if counts.shortened:
    parts.append(f"{counts.shortened} conversations without their first turns")
  if counts.truncated_rows:
    parts.append(f"cut {counts.truncated_rows} rows to {limits.max_length} tokens")
  if counts.straddled:
    parts.append(f"{counts.straddled} responses with tokens apart from their prompts'")
  if counts.rewritten:
    parts.append(f"{counts.rewritten} that the chat template writes anew")
  if counts.apart:
    parts.append(f"{counts.apart} earlier turns as rows of their own")
  if counts.last_alone:
    parts.append(
      f"{counts.last_alone} conversations of which the last answer alone is trained, "
      "since the teacher reads other ones"
    )
  return "; ".join(parts)


def _fates(counts: Counts, limits: Form) -> list[tuple[int, str, str, str]]:
  """Of each way to lose rows that occurred: how many, what, why, and the remedy."""
  if limits.overlong_row == "drop":
    row = ("rows", "longer than", "raise it or set data.overlong_row=truncate")
  else:
    remedy = "raise it or lower data.max_prompt_length"
    row = ("prompts", "too long for a response to fit in", remedy)
  fates = [
    (
      counts.dropped_prompts,
      "prompts",
      f"longer than data.max_prompt_length={limits.max_prompt_length}",
      "raise it or set data.overlong_prompt=truncate",
    ),
    (
      counts.dropped_teacher_prompts,
      "teacher's prompts",
      f"longer than the {limits.most_teacher_prompt} tokens that "
      f"data.max_teacher_length={limits.teacher_length} leaves",
      "raise it or set data.overlong_prompt=truncate",
    ),
    (
      counts.untrained,
      "answers",
      "of weight 0",
      "leave such rows out"
      + (" or set data.turns=all" if limits.turns == "last" else ""),
    ),
    (
      counts.dropped_rows,
      row[0],
      f"{row[1]} data.max_length={limits.max_length}",
      row[2],
    ),
  ]
  return [fate for fate in fates if fate[0]]
