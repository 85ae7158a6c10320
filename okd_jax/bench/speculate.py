"""`bench speculate`: a model's text with and without a smaller one writing ahead."""

import argparse
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from okd_jax.bench import measure
from okd_jax.bench.measure import at_least
from okd_jax.data import load_records, prepare, stop_ids
from okd_jax.data.sources import source_list
from okd_jax.errors import UserError
from okd_jax.models import Decoder, Model, load
from okd_jax.text import rollout, speculative
from okd_jax.text.defaults import DRAFT_TOKENS
from okd_jax.text.rollout import Sampling
from okd_jax.text.source import Side, decoder_source
from okd_jax.text.speculative import Drafted


class _Text(NamedTuple):
  """One prompt, answered twice, and how long that took."""

  plain: np.ndarray
  drafted: Drafted
  plain_s: float
  drafted_s: float


def add_flags(parser: argparse.ArgumentParser) -> None:
  """Both models, the prompts, and how they are answered."""
  add = parser.add_argument
  models = "HF folder, hub id, .gguf file or run's workdir"
  needed = {"required": True, "default": argparse.SUPPRESS}
  add("--model", **needed, help=f"whose text it is: {models}")
  add("--draft", **needed, help="a smaller model of the same tokens")
  add("--data", default="embedded:eval", help="rows with prompts, as data.eval")
  add("--template", default="default", help="as data.template")
  add("--limit", type=at_least(1), default=16, help="prompts, the first so many")
  add("--max_prompt_length", type=at_least(1), default=128, help="of them the last")
  add("--max_new_tokens", type=at_least(1), default=64, help="of an answer")
  add(
    "--draft_tokens",
    type=at_least(1),
    default=DRAFT_TOKENS,
    help="drafted before each pass",
  )
  add("--temperature", type=measure.temperature, default=0.0, help="0 is greedy")
  add("--dtype", default="float32", choices=("float32", "bfloat16"), help="of all")


def run(flags: argparse.Namespace) -> tuple[dict[str, Any], dict[str, str]]:
  """Both ways in turn, prompt by prompt; each is compiled before.

  Raises:
    UserError: if the data has no prompt, or a model takes too few tokens.
  """
  model, draft = (load(m, dtype=jnp.dtype(flags.dtype)) for m in _names(flags))
  ways = _ways(model, draft, flags)
  texts = [_both(ways, prompt) for prompt in _prompts(model, flags)]
  pairs = [text.plain_s / text.drafted_s for text in texts]
  found = [text.drafted for text in texts]
  judged = sum(each.judged for each in found)
  share = sum(each.expected for each in found) / judged
  results = {
    "models": [Path(name).name for name in _names(flags)],
    "settings": {
      k: v for k, v in vars(flags).items() if k not in ("command", "output")
    },
    "tokens_per_s": {
      "plain": sum(len(t.plain) for t in texts) / sum(t.plain_s for t in texts),
      "drafted": sum(len(f.tokens) for f in found) / sum(t.drafted_s for t in texts),
    },
    "ratio": measure.spread(pairs),
    "tokens_a_pass": sum(len(f.tokens) for f in found) / sum(f.passes for f in found),
    "judged": judged,
    "accepted": sum(each.kept for each in found) / judged,
    "expected": share,
    "error": (share * (1 - share) / judged) ** 0.5,
    "same": sum(np.array_equal(t.plain, t.drafted.tokens) for t in texts),
  }
  return results, _rows(results, flags, len(texts))


def _names(flags: argparse.Namespace) -> tuple[str, str]:
  return flags.model, flags.draft


def _prompts(model: Model, flags: argparse.Namespace) -> list[np.ndarray]:
  records = load_records(source_list(flags.data))[: flags.limit]
  most = flags.max_prompt_length
  examples, _ = prepare(
    records,
    model.tokenizer,
    template=flags.template,
    max_length=most + flags.max_new_tokens,
    max_prompt_length=most,
    overlong_prompt="truncate",
    overlong_row="truncate",
  )
  found = [e.prompt for e in examples if e.prompt_length]
  if not found:
    raise UserError(f"--data={flags.data} has no prompt to answer")
  return found


def _ways(
  model: Model, draft: Model, flags: argparse.Namespace
) -> tuple[Callable, Callable]:
  """(plain, drafted): functions of a prompt."""
  sides = [
    Side(Decoder(m.config, dtype=jnp.dtype(flags.dtype)), {"params": m.params})
    for m in (model, draft)
  ]
  ends = {*model.config.eos_ids, *stop_ids(model.tokenizer, flags.template)}
  common = {
    "key": jax.random.key(0),
    "max_new_tokens": flags.max_new_tokens,
    "sampling": Sampling(flags.temperature),
    "eos_ids": sorted(ends),
  }

  def plain(prompt: np.ndarray) -> np.ndarray:
    source, variables = decoder_source(sides[0].decoder), sides[0].variables
    [found] = rollout.generate(source, variables, [prompt], **common)
    return found.tokens

  drafted = functools.partial(
    speculative.generate, *sides, draft_tokens=flags.draft_tokens, **common
  )
  return plain, drafted


def _both(ways: Sequence[Callable], prompt: np.ndarray) -> _Text:
  found = [way(prompt) for way in ways]  # compiles what is new
  return _Text(*found, *(measure.seconds(lambda w=way: w(prompt)) for way in ways))


def _rows(
  results: dict[str, Any], flags: argparse.Namespace, prompts: int
) -> dict[str, str]:
  speed, ratio = results["tokens_per_s"], results["ratio"]
  same = "" if flags.temperature else f"; {results['same']} of {prompts} texts equal"
  return {
    "models": f"{results['models'][0]}, drafts by {results['models'][1]}",
    "shape": f"{prompts} prompts one by one, up to {flags.max_new_tokens} new tokens, "
    f"{flags.draft_tokens} drafted at a time, temperature {flags.temperature:g}",
    "tokens/s": f"{speed['plain']:.1f} plain, {speed['drafted']:.1f} with drafts",
    "ratio": f"{ratio['median']:.2f} (median of pairs; {ratio['min']:.2f} to "
    f"{ratio['max']:.2f}); {results['tokens_a_pass']:.2f} tokens a pass{same}",
    "kept": f"{results['accepted']:.1%} of {results['judged']} drafted tokens, "
    f"{results['expected']:.1%} ± {results['error']:.1%} expected of both models",
  }
