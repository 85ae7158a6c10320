"""Where answers end: whether the student, once exported, stops where it learns to.

Students that never stop come from ids that differ: a teacher that ends its turns with
<|im_end|>, say, and a student whose generation config knows <|endoftext|> alone.
"""

import logging
from collections.abc import Mapping

from transformers import PreTrainedTokenizerBase

from okd_jax.config.schema import DataSettings
from okd_jax.data.encode import short_chat
from okd_jax.data.tokens import eos_id
from okd_jax.errors import UserError
from okd_jax.run.outline import Outline

_log = logging.getLogger(__name__)


def tell(outline: Outline, data: DataSettings) -> None:
  """Warns of ends that the student does not know; silent where all is well."""
  for sentence in problems(outline, data):
    _log.warning("%s", sentence)


def problems(outline: Outline, data: DataSettings) -> list[str]:
  """What is wrong with the ends, each in a sentence."""
  tokenizer, found = outline.tokenizer, []
  strange = {
    token: who
    for token, who in _ends(outline, data.template).items()
    if token not in outline.student.eos_ids
  }
  if strange:
    ends = "; ".join(
      f"{named(token, tokenizer)}, with which {' and '.join(who)} end"
      for token, who in strange.items()
    )
    known = ", ".join(named(i, tokenizer) for i in outline.student.eos_ids)
    found.append(
      f"the exported student will not stop at {ends}, since its generation config "
      f"stops at {known or 'nothing'}; list all of them as eos_token_id in "
      "generation_config.json, of student.path or of the exported student"
    )
  marks = data.template == "chat" and data.turns == "all"
  if marks and not _trains_its_end(tokenizer):
    found.append(
      "the chat template leaves the end of a turn out of what it marks by "
      "{% generation %}, so with data.turns=all no row teaches the student to stop; "
      "put the end into the marks, or set data.turns=last"
    )
  return found


def named(token: int, tokenizer: PreTrainedTokenizerBase) -> str:
  """An id with its token: '<|im_end|> (id 2)'."""
  return f"{tokenizer.convert_ids_to_tokens(token)} (id {token})"


def row_end(tokenizer: PreTrainedTokenizerBase, template: str) -> int:
  """The id that ends a row: that of a turn under a chat template, else EOS."""
  if template == "chat":
    try:
      return int(short_chat(tokenizer).tokens[-1])
    except UserError:  # it refuses our example; the data's own rows may do
      pass
  return eos_id(tokenizer)


def _ends(outline: Outline, template: str) -> Mapping[int, list[str]]:
  """Who ends with each id, in words; a teacher's only where it has the same tokens."""
  found = {row_end(outline.tokenizer, template): ["training rows"]}
  if outline.teacher_tokenizer is None:
    several = len(outline.teachers) > 1
    for name, teacher in outline.teachers.items():
      for token in teacher.eos_ids:
        who = found.setdefault(token, [])
        who.append(f"answers of teacher {name}" if several else "the teacher's answers")
  return found


def _trains_its_end(tokenizer: PreTrainedTokenizerBase) -> bool:
  try:
    example = short_chat(tokenizer, turns="all")
  except UserError:
    return True
  return example.spans[-1][1] == len(example.tokens)
