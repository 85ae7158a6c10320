"""A model's answers to a set of prompts, greedy and drawn, each in a file that is kept.

MiniLLM and OKD score the answers of five seeds at temperature 1 and report the mean;
greedy answers stand beside them here.
"""

import dataclasses
import functools
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from okd_jax.data import Example, read_predictions
from okd_jax.errors import UserError
from okd_jax.evaluation.answers import ends, prompts_of
from okd_jax.models import Decoder, Model
from okd_jax.runtime.files import local
from okd_jax.text import answers_job
from okd_jax.text.rollout import Completion, Sampling, generate
from okd_jax.text.source import decoder_source


@dataclasses.dataclass(frozen=True)
class Draw:
  """One answer to every prompt. At temperature 0 it is greedy, whatever the seed."""

  temperature: float
  seed: int

  @property
  def name(self) -> str:
    return f"seed{self.seed}" if self.temperature else "greedy"


@dataclasses.dataclass(frozen=True)
class Way:
  """How prompts are written and answered, but for the draw.

  max_new_tokens: of an answer.
  no_repeat_ngram: so many tokens in a row do not come twice in a prompt and its answer;
    0 bans nothing.
  dtype: of activations and matmuls.
  """

  template: str
  max_new_tokens: int
  no_repeat_ngram: int
  batch_size: int
  dtype: str


def answers(
  model: Model,
  examples: Sequence[Example],
  draw: Draw,
  way: Way,
  folder: Path,
  label: str,
  made_by: Mapping[str, str],
) -> list[str]:
  """The text of every answer, from `folder/NAME.jsonl` or written into it.

  A file that is not whole is gone on with. Prompts of like length are answered
  together, the longest first, and what a row draws depends on its own number alone.

  label: what the progress calls the set.
  made_by: `maker(model)`.

  Raises:
    UserError: if the file was made from something else, or is damaged.
  """
  folder = local(folder)
  folder.mkdir(parents=True, exist_ok=True)
  path = folder / f"{draw.name}.jsonl"
  answers_job.answer(_job(model, examples, draw, way, path, label, made_by))
  found = read_predictions(str(path))
  if len(found) != len(examples):
    raise UserError(
      f"{path}: {len(found)} answers to {len(examples)} prompts; delete it to have it "
      "made anew"
    )
  return found


def _job(
  model: Model,
  examples: Sequence[Example],
  draw: Draw,
  way: Way,
  path: Path,
  label: str,
  made_by: Mapping[str, str],
) -> answers_job.Job:
  decoder = Decoder(model.config, dtype=jnp.dtype(way.dtype))
  prompts, eos_ids = prompts_of(examples), ends(decoder, model.tokenizer, way.template)
  ask = functools.partial(
    generate,
    decoder_source(decoder),
    {"params": model.params},
    key=jax.random.key(draw.seed),
    max_new_tokens=way.max_new_tokens,
    no_repeat_ngram=way.no_repeat_ngram,
    sampling=Sampling(temperature=draw.temperature),
    eos_ids=eos_ids,
    batch_size=way.batch_size,
  )
  return answers_job.Job(
    path,
    prompts,
    ask,
    functools.partial(_line, model.tokenizer),
    dataclasses.asdict(way)
    | dataclasses.asdict(draw)
    | {"eos_ids": eos_ids, "prompts": answers_job.digest(prompts)}
    | made_by,
    piece=answers_job.BATCHES * way.batch_size,
    together=False,
    label=f"{label} {draw.name}",
    order=sorted(range(len(prompts)), key=lambda i: -len(prompts[i])),
  )


def _line(tokenizer: Any, _: int, completion: Completion) -> bytes:
  text = tokenizer.decode(completion.tokens, skip_special_tokens=True)
  return json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n"


def maker(model: Model) -> dict[str, str]:
  """What a model's answers are known by: its parameters, and how they are read."""
  config = f"{zlib.crc32(repr(model.config).encode()):08x}"
  return {"model": answers_job.checksum(model.params), "config": config}
