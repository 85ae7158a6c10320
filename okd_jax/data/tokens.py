"""What tokenizers differ in: what they put around a text, and what ends one."""

import json
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from okd_jax.errors import UserError


def ids_of(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
  """Ids of each text, without anything that the tokenizer would add around it."""
  if not texts:
    return []
  return tokenizer(
    list(texts),
    add_special_tokens=False,
    return_attention_mask=False,
    return_token_type_ids=False,
    verbose=False,  # or it warns of texts longer than the model's context
  )["input_ids"]


def front_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
  """What the tokenizer puts before a text by default: BOS, or nothing.

  What it puts after one, an EOS say, is left out: a prompt has not ended.

  text: any; what is put there does not depend on it.
  """
  [bare] = ids_of([text], tokenizer)
  whole = tokenizer(text, verbose=False)["input_ids"]
  if not bare and whole:  # before nothing, or after it?
    ids = sorted(tokenizer.get_vocab().values())
    words = (tokenizer.decode([i], skip_special_tokens=True) for i in ids)
    some = next((word for word in words if ids_of([word], tokenizer)[0]), "")
    return front_ids(tokenizer, some) if some else []
  starts = range(len(whole) - len(bare) + 1)
  found = (start for start in starts if whole[start : start + len(bare)] == bare)
  return whole[: next(found, 0)]


def after(front: list[int], ids: list[int]) -> list[int]:
  """The ids behind what stands before a text, once: some texts write a BOS out."""
  return ids if ids[: len(front)] == front else front + ids


def words(tokenizer: PreTrainedTokenizerBase) -> str:
  """All that a tokenizer is, its special tokens among it: which one is EOS, say."""
  special = {k: str(v) for k, v in tokenizer.special_tokens_map.items()}
  backend = getattr(tokenizer, "backend_tokenizer", None)
  if backend is None:  # written in Python
    return json.dumps([sorted(tokenizer.get_vocab().items()), special])
  raw = json.loads(backend.to_str())
  # What a call has asked for last is no part of it.
  raw = {k: v for k, v in raw.items() if k not in ("truncation", "padding")}
  return json.dumps([raw, special], sort_keys=True)


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
  """Ids that stand for no text, such as an end of turn."""
  added = tokenizer.added_tokens_decoder.items()
  return frozenset(tokenizer.all_special_ids) | {
    token for token, content in added if content.special
  }


def eos_id(tokenizer: PreTrainedTokenizerBase) -> int:
  """The id that ends a text.

  Raises:
    UserError: if there is none.
  """
  if tokenizer.eos_token_id is None:
    raise UserError(
      "the tokenizer has no end-of-text token, so a model could never stop; set "
      "eos_token in its tokenizer_config.json"
    )
  return tokenizer.eos_token_id
