"""A finished model on held-out rows: what `okd_jax.evaluate` reports."""

import contextlib
import dataclasses
import json
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from okd_jax.data import (
  PAD_ID,
  Example,
  Record,
  check_vocabulary,
  compare_tokenizers,
  eval_batches,
  prepare,
)
from okd_jax.data.batch import Batch
from okd_jax.errors import UserError
from okd_jax.evaluation.answers import answerable, mean_and_std
from okd_jax.evaluation.draws import Draw, Way, answers, maker
from okd_jax.evaluation.rouge import score
from okd_jax.evaluation.tokens import (
  STUDENT,
  TEACHER,
  Who,
  compile_token_step,
  evaluate_tokens,
)
from okd_jax.models import Decoder, Model
from okd_jax.runtime.files import local, write_text

_log = logging.getLogger(__name__)

_MOST_NEW, _MOST, _MOST_PROMPT = 256, 1024, 512  # tokens, where nobody says


@dataclasses.dataclass(frozen=True)
class Options:
  """How to evaluate. None of a length is what fits the models' context.

  template: as data.template.
  max_new_tokens: of an answer; 0 writes none.
  max_length, max_prompt_length: in tokens; longer prompts lose their start.
  protocol: as MiniLLM and OKD measure, at temperature 1 unless another is given, and
    greedy answers too.
  temperature: of the answers that are drawn, once a seed; 0 draws none, and the answers
    are greedy. None is 1 under the protocol and 0 without it.
  no_repeat_ngram: so many tokens in a row do not come twice in a prompt and its answer;
    0 bans nothing.
  limit: first so many rows; 0 is all.
  dtype: of activations and matmuls.
  answers: folder that keeps all answers, a file a draw, and goes on with them; '' for
    none.
  predictions: jsonl file for the first draw's answers, '' for none.
  """

  template: str = "default"
  max_new_tokens: int | None = None
  max_length: int | None = None
  max_prompt_length: int | None = None
  protocol: bool = False
  temperature: float | None = None
  no_repeat_ngram: int = 0
  seeds: Sequence[int] = (10, 20, 30, 40, 50)
  limit: int = 0
  batch_size: int = 8
  dtype: str = "float32"
  answers: str = ""
  predictions: str = ""

  def __post_init__(self):
    for name, least in (
      ("temperature", 0),
      ("no_repeat_ngram", 0),
      ("max_new_tokens", 0),
      ("limit", 0),
      ("batch_size", 1),
      ("max_length", 2),
      ("max_prompt_length", 1),
    ):
      value = getattr(self, name)
      if value is not None and not value >= least:
        raise UserError(f"--{name}={value} must be at least {least}")
    if self.protocol and self.temperature == 0:
      raise UserError("--protocol draws answers; give --temperature above 0")
    if not self.seeds or len({*self.seeds}) < len(self.seeds):
      raise UserError(f"--seeds={self.seeds} must be one or more, all different")

  @property
  def draws(self) -> list[Draw]:
    """The answers to give to each prompt."""
    temperature = self.temperature
    if temperature is None:
      temperature = float(self.protocol)
    greedy = [] if temperature and not self.protocol else [Draw(0.0, 0)]
    return greedy + [Draw(temperature, seed) for seed in self.seeds if temperature]


def evaluate(
  model: Model,
  records: Sequence[Record],
  options: Options,
  teacher: Model | None = None,
  name: str = "the model",
) -> dict[str, Any]:
  """`n`, the figures per token and, where rows have prompts, those of the answers.

  teacher: a model to compare with token by token.
  name: what messages call the model.

  Raises:
    UserError: for models that cannot be compared, options that do not fit them, or
      rows that cannot be used.
  """
  _check_tokenizers(model, teacher, name)
  options = _fitted(options, model, teacher, name)
  examples, _ = prepare(
    records[: options.limit or None],
    model.tokenizer,
    template=options.template,
    max_length=options.max_length,
    max_prompt_length=options.max_prompt_length,
    overlong_prompt="truncate",  # never dropped: predictions stay beside their rows
    overlong_row="truncate",
  )
  examples = examples[: options.limit or None]
  models = {(STUDENT, ""): model} | ({(TEACHER, ""): teacher} if teacher else {})
  sizes = {name: model.config.vocab_size}
  if teacher:
    sizes["the teacher"] = teacher.config.vocab_size
  check_vocabulary(sizes, examples)
  results = {"n": len(examples)} | _token_results(models, examples, options)
  prompts = answerable(examples)
  if prompts and options.max_new_tokens:
    results |= _text_results(model, prompts, options)
  return results


def _check_tokenizers(model: Model, teacher: Model | None, name: str) -> None:
  if model.tokenizer is None:
    raise UserError(f"{name} has no tokenizer; evaluation needs one")
  if teacher is not None and teacher.tokenizer is not None:
    remedy = "the two cannot be compared token by token: leave out --teacher"
    compare_tokenizers(teacher.tokenizer, model.tokenizer, remedy)


def _fitted(
  options: Options, model: Model, teacher: Model | None, name: str
) -> Options:
  """The options, lengths that were left open filled in so that all of them fit."""
  own = model.config.max_length
  context = min(own, teacher.config.max_length) if teacher else own
  new = options.max_new_tokens
  new = min(_MOST_NEW, own // 2) if new is None else new
  length = options.max_length
  length = min(_MOST, context) if length is None else length
  room = min(own - new, length - 1)
  prompt = options.max_prompt_length
  prompt = max(1, min(_MOST_PROMPT, room)) if prompt is None else prompt
  if length > context:
    raise UserError(f"--max_length={length}, but a model takes only {context}")
  if prompt > room:
    raise UserError(
      f"--max_prompt_length={prompt} leaves no room: {name} takes {own} tokens, "
      f"--max_length is {length} and --max_new_tokens {new}"
    )
  lengths = dict(max_new_tokens=new, max_length=length, max_prompt_length=prompt)
  return dataclasses.replace(options, **lengths)


def _token_results(
  models: dict[Who, Model], examples: Sequence[Example], options: Options
) -> dict[str, float]:
  dtype = jnp.dtype(options.dtype)
  decoders = {who: Decoder(m.config, dtype=dtype) for who, m in models.items()}
  rows = min(options.batch_size, len(examples))
  batches = eval_batches(
    examples, batch_size=rows, length=_width(examples), pad_id=PAD_ID
  )
  variables = {who: {"params": m.params} for who, m in models.items()}
  step = compile_token_step(decoders, chunk=0)
  return evaluate_tokens(step, variables, map(Batch.of, batches))


def _width(examples: Sequence[Example]) -> int:
  """The longest row, rounded up so that few shapes are compiled."""
  longest = max(len(example.tokens) for example in examples)
  return -(-longest // 64) * 64


def _text_results(
  model: Model, prompts: Sequence[Example], options: Options
) -> dict[str, Any]:
  """Scores of each draw, and means over seeds, or of the greedy answers alone."""
  way = Way(
    options.template,
    options.max_new_tokens,
    options.no_repeat_ngram,
    options.batch_size,
    options.dtype,
  )
  references = [list(p.references) for p in prompts]
  texts, scores, made_by = {}, {}, maker(model)
  with _folder(options) as folder:
    for draw in options.draws:
      label = Path(folder).name if options.answers else "answers"
      texts[draw] = answers(model, prompts, draw, way, local(folder), label, made_by)
      scores[draw] = score(texts[draw], references)
      _log.info("%s: ROUGE-L %.2f", draw.name, scores[draw]["rougeL"])
  if options.predictions:
    lines = (
      json.dumps({"text": x}, ensure_ascii=False) for x in texts[options.draws[0]]
    )
    write_text(local(options.predictions), "".join(line + "\n" for line in lines))
  drawn = [draw for draw in options.draws if draw.temperature]
  found = mean_and_std([scores[draw] for draw in drawn or options.draws])
  if drawn and drawn != options.draws:
    greedy = scores[options.draws[0]]
    found |= {f"{name}_greedy": greedy[name] for name in ("rougeL", "exact_match")}
  each = {
    draw.name: {k: v for k, v in own.items() if k != "n"}
    for draw, own in scores.items()
  }
  seeds = [draw.seed for draw in drawn]
  return found | {"prompts": len(prompts), "seeds": seeds, "draws": each}


def _folder(options: Options) -> contextlib.AbstractContextManager[str]:
  if options.answers:
    return contextlib.nullcontext(options.answers)
  return tempfile.TemporaryDirectory(prefix="okd_jax-answers-")
