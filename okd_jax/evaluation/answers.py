"""A model's answers to held-out prompts, and their scores over seeds."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from okd_jax.data import Example, stop_ids
from okd_jax.models import Decoder
from okd_jax.text.rollout import Sampling, generate
from okd_jax.text.source import decoder_source


def answer(
  decoder: Decoder,
  variables,
  examples: Sequence[Example],
  tokenizer,
  *,
  template: str,
  max_new_tokens: int,
  temperature: float = 0.0,
  seed: int = 0,
  batch_size: int = 8,
  sharding=None,
  heard: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> list[str]:
  """The model's answer to each example's prompt, cut at EOS, special tokens removed.

  heard: as in `rollout.generate`.
  """
  completions = generate(
    decoder_source(decoder),
    variables,
    prompts_of(examples),
    jax.random.key(seed),
    max_new_tokens=max_new_tokens,
    sampling=Sampling(temperature=temperature),
    eos_ids=ends(decoder, tokenizer, template),
    batch_size=batch_size,
    sharding=sharding,
    heard=heard,
  )
  return [
    tokenizer.decode(completion.tokens, skip_special_tokens=True)
    for completion in completions
  ]


def prompts_of(examples: Sequence[Example]) -> list[Int[np.ndarray, " _"]]:
  return [example.prompt for example in examples]


def ends(decoder: Decoder, tokenizer, template: str) -> list[int]:
  """The tokens that end an answer, for the model or for its tokenizer."""
  return sorted({*decoder.config.eos_ids, *stop_ids(tokenizer, template)})


def judged(example: Example) -> bool:
  """Whether a model's answer to it is scored: it has a reference, or will have one."""
  return example.bare or bool(answerable([example]))


def answerable(examples: Sequence[Example]) -> list[Example]:
  """Those with a prompt and at least one reference answer that says something."""
  return [e for e in examples if e.prompt_length and any(e.references)]


def mean_and_std(scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
  """Means over seeds; with several seeds, NAME_std beside each."""
  merged = {}
  for name in ("rougeL", "exact_match"):
    values = [s[name] for s in scores]
    merged[name] = statistics.fmean(values)
    if len(values) > 1:
      merged[f"{name}_std"] = statistics.stdev(values)
  return merged
