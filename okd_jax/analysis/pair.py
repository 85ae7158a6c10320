"""A student beside its teacher on held-out text: everything `okd_jax.analyze` finds."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from okd_jax import models
from okd_jax.analysis import agreement, exposure_bias
from okd_jax.analysis.judge import judged
from okd_jax.analysis.positions import Logits, Values, at_positions
from okd_jax.data import (
  Example,
  Record,
  check_vocabulary,
  compare_tokenizers,
  prepare,
  stop_ids,
)
from okd_jax.errors import UserError
from okd_jax.models import Decoder, Model
from okd_jax.runtime.files import local
from okd_jax.text.source import Side


@dataclasses.dataclass(frozen=True)
class Options:
  """How to analyse.

  template: as data.template.
  max_length, max_prompt_length: in tokens; longer prompts lose their start.
  limit: first so many rows; 0 is all.
  length: new tokens of which exposure bias is measured; 0 leaves it out.
  seed: of the sampled text and of the bootstrap.
  batch_size: rows at once.
  dtype: of activations and matmuls.
  positions: (row, position of a token) whose likeliest tokens are listed; () is an
    easy, a middling and a hard one.

  Raises:
    UserError: for a number out of range.
  """

  template: str = "default"
  max_length: int = 512
  max_prompt_length: int = 256
  limit: int = 0
  length: int = exposure_bias.LENGTH
  seed: int = 0
  batch_size: int = 8
  dtype: str = "float32"
  positions: Sequence[tuple[int, int]] = ()

  def __post_init__(self):
    least = {"max_length": 2, "max_prompt_length": 1, "batch_size": 1}
    least |= {"limit": 0, "length": 0}
    for name, value in least.items():
      if getattr(self, name) < value:
        raise UserError(f"--{name}={getattr(self, name)} must be at least {value}")


def places(text: str) -> list[tuple[int, int]]:
  """(row, position) of each place in a text.

  >>> places("0:12,3:5")
  [(0, 12), (3, 5)]
  """
  try:
    pairs = (place.split(":") for place in text.split(",") if place)
    return [(int(row), int(position)) for row, position in pairs]
  except ValueError:
    raise UserError(f"--positions={text} must look like 0:12,3:5") from None


def analyse(
  student: Model,
  teacher: Model,
  adapter: str | Path | None,
  records: Sequence[Record],
  options: Options,
  judge: Model | None = None,
) -> dict[str, Any]:
  """What is found, as it goes into JSON.

  Args:
    adapter: folder of the teacher's online module, or of the whole adapted teacher.
    records: held-out rows, of which `judge` knows none.

  Returns:
    'tokens' (how many in each group of difficulty); 'teacher' and, with an adapter,
    'adapted': the figures of `agreement.compare` by group; 'calibration' of each model;
    'exposure_bias' against each teacher; `judged`; 'top_tokens' at some positions.

  Raises:
    UserError: for models or rows that do not fit one another.
  """
  _check_tokenizers(student, teacher)
  sides = _sides(student, teacher, adapter, jnp.dtype(options.dtype))
  examples = _examples(student, teacher, records, options)
  check_vocabulary({n: s.decoder.config.vocab_size for n, s in sides.items()}, examples)
  shown = functools.partial(tqdm, desc="tokens", leave=False, disable=None)
  values, mask = at_positions(
    sides, examples, agreement.figures, batch_size=options.batch_size, shown=shown
  )
  found = {"rows": len(examples)} | agreement.summary(values, mask)
  prompts = [e for e in examples if e.prompt_length]
  if options.length and len(prompts) > 1:
    found["exposure_bias"] = _exposure_bias(sides, prompts, student, options)
  if judge:
    found["judge"] = _judged(judge, sides["student"], prompts, student, options)
  places = options.positions
  places = places or agreement.chosen_positions(values["teacher/unc"], mask)
  said = [_top_tokens(sides, examples, student.tokenizer, place) for place in places]
  return found | {"top_tokens": said}


def _check_tokenizers(student: Model, teacher: Model) -> None:
  if student.tokenizer is None:
    raise UserError("the student has no tokenizer; the analysis needs one")
  if teacher.tokenizer is not None:
    remedy = "the two cannot be compared token by token"
    compare_tokenizers(teacher.tokenizer, student.tokenizer, remedy)


def _sides(
  student: Model, teacher: Model, adapter: str | Path | None, dtype: jnp.dtype
) -> dict[str, Side]:
  sides = {
    name: Side(Decoder(model.config, dtype=dtype), {"params": model.params})
    for name, model in (("student", student), ("teacher", teacher))
  }
  if not adapter:
    return sides
  if (local(adapter) / "adapter_config.json").exists():
    tree, module = models.load_adapter(adapter, teacher.config)
    decoder = Decoder(teacher.config, adapter=module, dtype=dtype)
    variables = {"params": teacher.params, "adapter": tree}
  else:  # a teacher whose own blocks learned is a whole model
    whole = models.load(adapter, dtype=dtype)
    decoder, variables = Decoder(whole.config, dtype=dtype), {"params": whole.params}
  return sides | {"adapted": Side(decoder, variables)}


def _examples(
  student: Model, teacher: Model, records: Sequence[Record], options: Options
) -> list[Example]:
  context = min(student.config.max_length, teacher.config.max_length)
  length = min(options.max_length, context)
  room = min(context - options.length, length - 1)
  if room < 1:
    raise UserError(
      f"--length={options.length} new tokens leave no room for a prompt: the models "
      f"take {context}"
    )
  examples, _ = prepare(
    records[: options.limit or None],
    student.tokenizer,
    template=options.template,
    max_length=length,
    max_prompt_length=min(options.max_prompt_length, room),
    overlong_prompt="truncate",
    overlong_row="truncate",
  )
  _check_places(options.positions, examples)
  return examples


def _check_places(
  places: Sequence[tuple[int, int]], examples: Sequence[Example]
) -> None:
  """Each must stand before a token of a response."""
  for row, position in places:
    known = 0 <= row < len(examples)
    if known:
      example = examples[row]
      known = max(example.prompt_length - 1, 0) <= position < len(example.tokens) - 1
    if not known:
      raise UserError(
        f"--positions: row {row} has no response token that follows position {position}"
      )


def _exposure_bias(
  sides: Mapping[str, Side],
  prompts: Sequence[Example],
  student: Model,
  options: Options,
) -> dict[str, Any]:
  """Against the frozen teacher and, where there is one, the adapted one."""
  ends = {*student.config.eos_ids, *stop_ids(student.tokenizer, options.template)}
  return {
    name: exposure_bias.measure(
      sides[name],
      sides["student"],
      prompts,
      eos_ids=sorted(ends),
      length=options.length,
      seed=options.seed,
      batch_size=options.batch_size,
    )
    for name in sorted(sides.keys() - {"student"}, reverse=True)
  }


def _judged(
  judge: Model,
  side: Side,
  prompts: Sequence[Example],
  student: Model,
  options: Options,
) -> dict[str, float]:
  """Over as many tokens as a row has room for."""
  _check_tokenizers(student, judge)
  longest = max(example.prompt_length for example in prompts)
  room = min(options.max_length, student.config.max_length, judge.config.max_length)
  ends = {*student.config.eos_ids, *stop_ids(student.tokenizer, options.template)}
  return judged(
    Side(Decoder(judge.config, dtype=side.decoder.dtype), {"params": judge.params}),
    side,
    prompts,
    eos_ids=sorted(ends),
    length=max(1, room - longest),
    seed=options.seed,
    batch_size=options.batch_size,
  )


def _top_tokens(
  sides: Mapping[str, Side],
  examples: Sequence[Example],
  tokenizer: Any,
  place: tuple[int, int],
) -> dict[str, Any]:
  """What every model says at one place (Figures 10 to 12)."""
  row, position = place
  values, _ = at_positions(sides, [examples[row]], _probabilities)
  said = {name: value[0, position] for name, value in values.items()}
  tokens = examples[row].tokens
  size = len(next(iter(said.values())))
  names = tokenizer.convert_ids_to_tokens(list(range(min(size, len(tokenizer)))))
  names += [""] * (size - len(names))  # of padded vocabularies
  return {
    "row": row,
    "position": position,
    "before": tokenizer.decode(tokens[: position + 1]),
    "gold": names[int(tokens[position + 1])],
    "tokens": agreement.top_tokens(said, names),
  }


def _probabilities(logits: Logits, _: Int[Array, "B C"]) -> Values:
  return {name: _softmax(z) for name, z in logits.items()}


def _softmax(logits: Float[Array, "B C V"]) -> Float[Array, "B C V"]:
  return jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
