"""The decoder as a model of lm-evaluation-harness (the package lm_eval).

Tokens, truncation, windows and stop strings are as in the harness's own backend `hf`
(lm_eval/models/huggingface.py of 0.4.13), so scores may be compared with published
ones; tests hold the two against each other.
"""

import copy
import functools
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import transformers
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from okd_jax.data.chat_template import text_of
from okd_jax.errors import UserError
from okd_jax.evaluation.continuations import log_likelihoods
from okd_jax.models import Decoder, Model
from okd_jax.text.rollout import Sampling, generate
from okd_jax.text.source import decoder_source
from okd_jax.text.until import generate_until

_NEW_TOKENS = 256  # of a task that says nothing
_TOP_K = 50  # what transformers draws from unless told otherwise
# What a task may set, besides until and the number of new tokens.
_SETTINGS = {"do_sample", "temperature", "top_k", "top_p", "num_beams"}

# ((context, continuation) as text or None, tokens of each)
_Request = tuple[tuple[str, str] | None, list[int], list[int]]


class DecoderLM(TemplateLM):
  """A loaded model as the harness asks it: `lm_eval.simple_evaluate(model=…)`.

  Results are in the order of the requests and do not depend on `batch_size`.

  Attributes:
    tokenizer: the model's.
    batch_size: rows at once.
    max_length: tokens that the model reads at once.
  """

  def __init__(
    self,
    model: Model,
    *,
    batch_size: int = 8,
    max_length: int | None = None,
    add_bos_token: bool | None = None,
    dtype: str = "float32",
    seed: int = 0,
  ):
    """Takes the model as it is; nothing is copied to devices.

    Args:
      batch_size: rows at once.
      max_length: tokens of a row, by default the model's context.
      add_bos_token: whether texts begin with BOS; None is as the tokenizer does.
      dtype: of activations and matmuls.
      seed: of answers that are sampled.

    Raises:
      UserError: there is no tokenizer, no token that could begin or end a text, or
        `max_length` is beyond the model's context.
    """
    super().__init__()
    most = model.config.max_length
    if max_length and max_length > most:
      raise UserError(f"--max_length={max_length}, but the model takes only {most}")
    self.tokenizer = _tokenizer(model, add_bos_token)
    self.batch_size, self.max_length = batch_size, max_length or most
    self._config, self._add_bos, self._seed = model.config, add_bos_token, seed
    self._prefix = self.tokenizer.decode(self.prefix_token_id)
    self._decoder = Decoder(model.config, dtype=jnp.dtype(dtype))
    self._variables = {"params": model.params}

  @property
  def eot_token_id(self) -> int:
    """The tokenizer's EOS."""
    return self.tokenizer.eos_token_id

  @property
  def prefix_token_id(self) -> int:
    """What stands before a text without context: BOS, or EOS where there is none."""
    bos = self.tokenizer.bos_token_id
    return self.eot_token_id if bos is None else bos

  @property
  def tokenizer_name(self) -> str:
    """What the harness keeps prepared requests under."""
    return self.tokenizer.name_or_path.replace("/", "__")

  def tok_encode(
    self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
  ) -> list[int]:
    """The tokens of a text, special ones as the tokenizer adds them.

    Args:
      add_special_tokens: None is as the tokenizer does, but without a second BOS.
      **kwargs: ignored.

    Raises:
      UserError: for a token that the model does not have.
    """
    special = self._add_bos if add_special_tokens is None else add_special_tokens
    if add_special_tokens is None and string.startswith(self._prefix):
      special = False
    extra = {} if special is None else {"add_special_tokens": special}
    tokens = self.tokenizer.encode(string, verbose=False, **extra)
    if tokens and max(tokens) >= self._config.vocab_size:
      raise UserError(
        f"the tokenizer gives token {max(tokens)}, but the model knows only "
        f"{self._config.vocab_size}: they do not belong together"
      )
    return tokens

  def apply_chat_template(
    self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
  ) -> str:
    """A chat as text; without its system messages where the template takes none.

    Raises:
      UserError: there is no template, or it refuses the chat.
    """
    if not self.tokenizer.chat_template:
      raise UserError("the model's tokenizer has no chat template")
    plain = [message for message in chat_history if message["role"] != "system"]
    for messages in (chat_history, plain):
      try:
        return text_of(
          self.tokenizer,
          messages,
          "the chat template refuses a prompt",
          prompt=add_generation_prompt,
          goes_on=not add_generation_prompt,
        )
      except UserError as error:
        refusal = error
    raise refusal

  def _loglikelihood_tokens(
    self, requests: Sequence[_Request], disable_tqdm: bool = False, **kwargs: Any
  ) -> list[tuple[float, bool]]:
    """(log-likelihood in nats, whether it is the greedy text) of each continuation."""
    pairs = [
      # A context of spaces alone, which all went to the continuation.
      (context or [self.prefix_token_id], continuation)
      for _, context, continuation in requests
    ]
    with _bar("log-likelihoods", "row", len(pairs), disable_tqdm) as bar:
      return log_likelihoods(
        self._decoder,
        self._variables,
        pairs,
        batch_size=self.batch_size,
        max_length=self.max_length,
        progress=bar.update,
      )

  def loglikelihood_rolling(
    self, requests: Sequence[Instance], disable_tqdm: bool = False
  ) -> list[float]:
    """Log-likelihoods of whole texts, in nats, each token predicted once.

    What does not fit is cut into windows of `max_length`; the last one reads as much
    as the others and predicts what is left.
    """
    owners, windows = [], []
    for i, request in enumerate(requests):
      pieces = get_rolling_token_windows(
        token_list=self.tok_encode(request.args[0]),
        prefix_token=self.prefix_token_id,
        max_seq_len=self.max_length,
        context_len=1,
      )
      for context, continuation in map(make_disjoint_window, pieces):
        owners.append(i)
        windows.append((None, context, continuation))
    totals = [0.0] * len(requests)
    results = self._loglikelihood_tokens(windows, disable_tqdm)
    for i, (total, _) in zip(owners, results, strict=True):
      totals[i] += total
    return totals

  def generate_until(
    self, requests: Sequence[Instance], disable_tqdm: bool = False
  ) -> list[str]:
    """Each context's completion, up to the first of its stop strings.

    Raises:
      UserError: for settings that cannot be met.
    """
    alike: dict[str, list[int]] = {}
    for i, request in enumerate(requests):
      alike.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
    ways = {key: _way(requests[own[0]].args[1]) for key, own in alike.items()}
    total = sum(way.max_new_tokens * len(alike[key]) for key, way in ways.items())
    texts = [""] * len(requests)
    with _bar("answers", "token", total, disable_tqdm) as bar:
      for key, own in alike.items():
        contexts = [requests[i].args[0] for i in own]
        for i, text in zip(
          own, self._answers(contexts, ways[key], own, bar), strict=True
        ):
          texts[i] = text
    return texts

  def check(self, requests: Sequence[Instance]) -> None:
    """Raises a UserError, as `generate_until` does, before anything is computed."""
    for request in requests:
      if request.request_type == "generate_until":
        self._room(_way(request.args[1]))

  def _room(self, way: "_Way") -> int:
    """Tokens that are left for a context."""
    room = self.max_length - way.max_new_tokens
    if room < 1:
      raise UserError(
        f"{way.max_new_tokens} new tokens are asked for, but the model takes only "
        f"{self.max_length} in all: set --gen_kwargs=max_gen_toks=N"
      )
    return room

  def _answers(
    self, contexts: Sequence[str], way: "_Way", rows: Sequence[int], bar: tqdm
  ) -> list[str]:
    """Completions of contexts with the same settings; `rows` tell their draws apart."""
    room = self._room(way)
    prompts = [self.tok_encode(text) or [self.prefix_token_id] for text in contexts]
    tokenizer = self.tokenizer
    special = [stop for stop in way.stops if stop in tokenizer.all_special_tokens]
    ids = tokenizer.convert_tokens_to_ids(special)
    ends = sorted({*self._config.eos_ids, self.eot_token_id, *ids})
    end = tokenizer.decode(self.eot_token_id)
    stops = [*way.stops, *([end] if end else [])]
    decode = functools.partial(tokenizer.decode, skip_special_tokens=True)
    source, how = decoder_source(self._decoder), {"sampling": way.sampling}
    answers = generate_until(
      functools.partial(generate, source, self._variables, eos_ids=ends, **how),
      [prompt[-room:] for prompt in prompts],
      jax.random.key(self._seed),
      stopped=lambda tokens: any(map(decode(tokens).__contains__, stops)),
      max_new_tokens=way.max_new_tokens,
      rows=rows,
      batch_size=self.batch_size,
      progress=bar.update,
    )
    return [postprocess_generated_text(decode(own), stops, None) for own in answers]


def _tokenizer(
  model: Model, add_bos_token: bool | None
) -> "transformers.PreTrainedTokenizerBase":
  """The model's tokenizer; a copy of it, if it is to begin texts another way."""
  if model.tokenizer is None:
    raise UserError("the model has no tokenizer, so it cannot read a task")
  if model.tokenizer.eos_token_id is None:
    raise UserError("the model's tokenizer has no EOS token, which ends a text")
  if add_bos_token is None:
    return model.tokenizer
  tokenizer = copy.deepcopy(model.tokenizer)
  tokenizer.add_bos_token = add_bos_token
  return tokenizer


class _Way(NamedTuple):
  """How a task wants its answers."""

  stops: list[str]
  max_new_tokens: int
  sampling: Sampling


def _way(given: Mapping[str, Any]) -> _Way:
  """What a task's generation_kwargs mean, with the defaults of the backend `hf`."""
  try:
    found = normalize_gen_kwargs(dict(given), _NEW_TOKENS)
  except (TypeError, ValueError) as error:
    raise UserError(f"generation settings: {error}") from error
  stops, new = list(filter(None, found.pop("until"))), found.pop("max_gen_toks")
  if not all(isinstance(stop, str) for stop in stops):
    raise UserError(f"generation settings: until={stops} must be strings")
  unknown = sorted(found.keys() - _SETTINGS)
  if found.get("num_beams", 1) != 1:
    unknown.append("num_beams above 1")
  if unknown:
    raise UserError(f"generation settings that are not there: {', '.join(unknown)}")
  if new < 1:
    raise UserError(f"max_gen_toks={new} must be at least 1")
  if not found["do_sample"]:
    return _Way(stops, new, Sampling(temperature=0.0))
  sampling = Sampling(
    temperature=float(found.get("temperature", 0.0)),
    top_k=_TOP_K if found.get("top_k") is None else int(found["top_k"]),
    top_p=found.get("top_p", 1.0),
  )
  return _Way(stops, new, sampling)


def _bar(what: str, unit: str, total: int, hidden: bool) -> tqdm:
  often = 0.1 if sys.stderr.isatty() else 10  # seconds
  return tqdm(total=total, desc=what, unit=unit, disable=hidden, mininterval=often)
