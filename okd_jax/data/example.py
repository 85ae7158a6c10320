"""One row in tokens: what is given, what is trained on, what the teacher reads."""

import dataclasses

import numpy as np
from jaxtyping import Int
from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]  # tokens from the first number to before the second


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Example:
  """One row: the first `prompt_length` tokens are given, the rest is trained on.

  Attributes:
    tokens: of prompt and response.
    prompt_length: 0 for plain text.
    references: acceptable responses; none for plain text, or for a prompt alone.
    where: file and line.
    trained: what is trained on, where that is not just what follows the prompt: earlier
      turns of a conversation, or one alone of them.
    teacher_prompt: what the teacher reads in place of the prompt; None for the same.
    asked: the prompt for people to read.
    kind: of the record that it was made of.
    number: of that record, among those that were encoded with it.
  """

  tokens: Int[np.ndarray, " L"]
  prompt_length: int
  references: tuple[str, ...]
  where: str
  trained: tuple[Span, ...] | None = None
  teacher_prompt: Int[np.ndarray, " P"] | None = None
  asked: str = ""
  kind: str = ""
  number: int = 0

  @property
  def spans(self) -> tuple[Span, ...]:
    """What is trained on; the first token of a row never is, since nothing is before.

    >>> Example(np.arange(5), 3, (), "f:1").spans
    ((3, 5),)
    """
    if self.trained is None:
      return ((self.prompt_length, len(self.tokens)),)
    return self.trained

  @property
  def predicted(self) -> int:
    """How many tokens are trained on.

    >>> Example(np.arange(5), 0, (), "f:1").predicted
    4
    """
    return sum(stop - max(start, 1) for start, stop in self.spans)

  @property
  def bare(self) -> bool:
    """Whether it is a prompt alone, to be answered yet."""
    return bool(self.prompt_length) and self.prompt_length == len(self.tokens)

  @property
  def prompt(self) -> Int[np.ndarray, " P"]:
    """The tokens that are given."""
    return self.tokens[: self.prompt_length]

  @property
  def response(self) -> Int[np.ndarray, " R"]:
    """The tokens behind the prompt."""
    return self.tokens[self.prompt_length :]

  def answered(self, tokens: Int[np.ndarray, " R"]) -> "Example":
    """The same prompt with another answer, which alone is trained on."""
    whole = np.concatenate([self.prompt, tokens])
    return dataclasses.replace(self, tokens=whole, trained=None)

  def for_teacher(self) -> "Example":
    """The row as the teacher reads it: the same answer after its own prompt."""
    own = self.teacher_prompt
    if own is None:
      return self
    whole = np.concatenate([own, self.response])
    return dataclasses.replace(self, tokens=whole, prompt_length=len(own))


def show_example(example: Example, tokenizer: PreTrainedTokenizerBase) -> str:
  """One row as text, what is trained on between `>>>` and `<<<`."""
  at, text = 0, ""
  for start, stop in example.spans:
    text += tokenizer.decode(example.tokens[at:start])
    text += f">>>{tokenizer.decode(example.tokens[start:stop])}<<<"
    at = stop
  text += tokenizer.decode(example.tokens[at:]) if at < len(example.tokens) else ""
  return (
    f"{example.where}: {example.prompt_length} prompt tokens, then {example.predicted} "
    f"trained, between >>> and <<<\n{text}"
  )
