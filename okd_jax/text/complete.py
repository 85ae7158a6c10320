"""One prompt continued, as text."""

import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from okd_jax.errors import UserError
from okd_jax.models import Decoder, Model
from okd_jax.text import rollout, speculative
from okd_jax.text.defaults import DRAFT_TOKENS, NEW_TOKENS, RAW
from okd_jax.text.source import Side, decoder_source

_log = logging.getLogger(__name__)


def complete(
  model: Model,
  prompt: str,
  *,
  template: str = RAW,
  max_new_tokens: int | None = None,
  sampling: rollout.Sampling,
  seed: int = 0,
  dtype: str = "float32",
  draft: Model | None = None,
  draft_tokens: int | None = None,
) -> str:
  """The text that `model` puts after `prompt`, without special tokens.

  Args:
    prompt, template: a text to go on with under RAW, an instruction under another.
    max_new_tokens: None is NEW_TOKENS, or less where the context ends before.
    sampling, seed: how to draw.
    dtype: of the matrix products.
    draft: a smaller model that writes so many `draft_tokens` ahead (`speculative`);
      None of them are DRAFT_TOKENS.

  Raises:
    UserError: for an unusable template, an empty prompt, another model's tokenizer,
      `draft_tokens` without a draft.
  """
  tokens = _prompt_tokens(model, prompt, template)
  _check(tokens, model.config.vocab_size)
  settings = {
    "key": jax.random.key(seed),
    "max_new_tokens": max_new_tokens or _room(model, tokens, draft),
    "sampling": sampling,
    "eos_ids": _stop_ids(model, template == "chat"),
  }
  small = draft and _side(_fitting(draft, model), dtype)
  new = _continue(_side(model, dtype), small, tokens, draft_tokens, settings)
  return model.tokenizer.decode(new, skip_special_tokens=True)


def _continue(
  side: Side,
  small: Side | None,
  tokens: list[int],
  draft_tokens: int | None,
  settings: dict[str, Any],
) -> Int[np.ndarray, " T"]:
  """The new tokens; where a small model drafts, it is told how that went."""
  if small is None:
    if draft_tokens:
      raise UserError(
        "--draft_tokens is the length of a draft; name who writes it by --draft"
      )
    source = decoder_source(side.decoder)
    [completion] = rollout.generate(source, side.variables, [tokens], **settings)
    return completion.tokens
  settings["draft_tokens"] = draft_tokens or DRAFT_TOKENS
  found = speculative.generate(side, small, tokens, **settings)
  _log.info("%s", _told(found))
  return found.tokens


def _side(model: Model, dtype: str) -> Side:
  return Side(Decoder(model.config, dtype=jnp.dtype(dtype)), {"params": model.params})


def _fitting(draft: Model, model: Model) -> Model:
  """The draft, if both mean the same by their tokens; else a UserError."""
  if draft.tokenizer is not None:
    # Here, because the data pipeline takes half a second to import.
    from okd_jax.data import compare_tokenizers

    remedy = "name a --draft that was distilled from the model"
    compare_tokenizers(model.tokenizer, draft.tokenizer, remedy, ("model", "draft"))
  return draft


def _told(found: speculative.Drafted) -> str:
  """In words, how the drafts fared."""
  kept = found.kept / max(found.judged, 1)
  return (
    f"kept {found.kept} of {found.judged} drafted tokens ({kept:.0%}); "
    f"{len(found.tokens) / max(found.passes, 1):.1f} tokens a pass of the model"
  )


def _check(tokens: list[int], vocab_size: int) -> None:
  if not tokens:
    raise UserError(
      "the prompt has no tokens and this tokenizer puts none before a text; "
      "give --prompt some text"
    )
  if max(tokens) >= vocab_size:
    raise UserError(
      f"the tokenizer gives token {max(tokens)}, but the model knows only "
      f"{vocab_size}: they do not belong together"
    )


def _room(model: Model, tokens: list[int], draft: Model | None) -> int:
  """The default length, or less where a model's context ends before."""
  most = min(each.config.max_length for each in (model, draft) if each)
  return min(NEW_TOKENS, max(1, most - len(tokens)))


def _prompt_tokens(model: Model, prompt: str, template: str) -> list[int]:
  if template == "chat":
    return _chat_tokens(model, prompt)
  if template == RAW:
    return _plain_tokens(model, prompt)
  # Here, because the data pipeline takes half a second to import.
  from okd_jax.data.format import make_render
  from okd_jax.data.sources import Record

  asked = Record("instruction", "--prompt", prompt=prompt, references=("",))
  return _plain_tokens(model, make_render(template, None)(asked).prompt)


def _plain_tokens(model: Model, prompt: str) -> list[int]:
  """The prompt as it is, after what the tokenizer puts before a text by default."""
  from okd_jax.data.tokens import after, front_ids

  ids = model.tokenizer(prompt, add_special_tokens=False)["input_ids"]
  return after(front_ids(model.tokenizer, prompt), ids)


def _chat_tokens(model: Model, prompt: str) -> list[int]:
  """The prompt as a user's turn, and the opening of the answer."""
  if not model.tokenizer.chat_template:
    raise UserError("the model's tokenizer has no chat template; set --template=raw")
  # Here, because the data pipeline takes half a second to import.
  from okd_jax.data.chat_template import text_of

  messages = [{"role": "user", "content": prompt}]
  what = "the chat template refuses the prompt"
  text = text_of(model.tokenizer, messages, what, prompt=True)
  return model.tokenizer(text, add_special_tokens=False)["input_ids"]


def _stop_ids(model: Model, chat: bool) -> tuple[int, ...]:
  """What ends a text for the model or its tokenizer; in a chat, the end of a turn."""
  ids = set(model.config.eos_ids)
  if model.tokenizer.eos_token_id is not None:
    ids.add(model.tokenizer.eos_token_id)
  if chat:
    # Here, because the data pipeline takes half a second to import.
    from okd_jax.data import stop_ids

    ids |= set(stop_ids(model.tokenizer, "chat"))
  return tuple(sorted(ids))
