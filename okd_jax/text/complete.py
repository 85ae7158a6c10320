"""One prompt continued, as text."""

import jax
import jax.numpy as jnp
import jinja2

from okd_jax.errors import UserError
from okd_jax.models import Decoder, Model
from okd_jax.text import rollout
from okd_jax.text.source import decoder_source

NEW_TOKENS = 128


def complete(model: Model, prompt: str, flags) -> str:
  """The text that `model` puts after `prompt`, without special tokens."""
  tokens = _chat_tokens(model, prompt) if flags.chat else _plain_tokens(model, prompt)
  if not tokens:
    raise UserError(
      "the prompt has no tokens and this tokenizer puts none before a text; "
      "give --prompt some text"
    )
  if max(tokens) >= model.config.vocab_size:
    raise UserError(
      f"the tokenizer gives token {max(tokens)}, but the model knows only "
      f"{model.config.vocab_size}: they do not belong together"
    )
  decoder = Decoder(model.config, dtype=jnp.dtype(flags.dtype))
  [completion] = rollout.generate(
    decoder_source(decoder),
    {"params": model.params},
    [tokens],
    jax.random.key(flags.seed),
    max_new_tokens=flags.max_new_tokens or _room(model, tokens),
    sampling=rollout.Sampling(flags.temperature, flags.top_k, flags.top_p),
    eos_ids=_stop_ids(model, flags.chat),
  )
  return model.tokenizer.decode(completion.tokens, skip_special_tokens=True)


def _room(model: Model, tokens: list[int]) -> int:
  """The default length, or less where the model's context ends before."""
  return min(NEW_TOKENS, max(1, model.config.max_length - len(tokens)))


def _plain_tokens(model: Model, prompt: str) -> list[int]:
  """The prompt as it is, after what the tokenizer puts before a text by default.

  What it puts after one, an EOS say, is left out: a prompt has not ended.
  """
  probe = model.tokenizer("a", return_special_tokens_mask=True)
  front = probe["input_ids"][: probe["special_tokens_mask"].index(0)]
  return front + model.tokenizer(prompt, add_special_tokens=False)["input_ids"]


def _chat_tokens(model: Model, prompt: str) -> list[int]:
  """The prompt as a user's turn, and the opening of the answer."""
  if not model.tokenizer.chat_template:
    raise UserError("the model's tokenizer has no chat template; leave out --chat")
  messages = [{"role": "user", "content": prompt}]
  try:
    text = model.tokenizer.apply_chat_template(
      messages, tokenize=False, add_generation_prompt=True
    )
  except (jinja2.TemplateError, TypeError, ValueError) as error:
    raise UserError(f"the chat template refuses the prompt ({error})") from error
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
