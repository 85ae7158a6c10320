"""A Hugging Face tokenizer from the vocabulary inside a GGUF file."""

import json
import re
from collections.abc import Mapping
from typing import Any

import tokenizers
import transformers
from tokenizers import decoders, normalizers, pre_tokenizers, processors

from okd_jax.errors import UserError
from okd_jax.models.bounds import LIST, NUMBER, SWITCH, TEXT, WHOLE, Bound, problems

# llama.cpp's token types.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_LONGEST = 2000  # characters of a token; a SentencePiece is cut at each of them
_FIELDS = {
  "add_bos_token": Bound(SWITCH),
  "add_eos_token": Bound(SWITCH),
  "add_space_prefix": Bound(SWITCH),
  "merges": Bound(LIST, of=TEXT),
  "model": Bound(TEXT),
  "pre": Bound(TEXT),
  "scores": Bound(LIST, -3.5e38, 3.5e38, NUMBER),
  "token_type": Bound(LIST, 0, 255, WHOLE),
  "tokenizer.chat_template": Bound(TEXT),
  "tokens": Bound(LIST, of=TEXT),
}
_NEVER = -1e6  # the score of a piece that no merge makes
_SPACE = "\u2581"  # what SentencePiece writes for a space

# The split of LLaMA 3, as in its own tokenizer.json: contractions; a word with at most
# one other character before it; up to three digits; punctuation; line ends; spaces.
_LLAMA3_SPLIT = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def build(
  fields: Mapping[str, Any], max_length: int, where: str
) -> "transformers.PreTrainedTokenizerFast | None":
  """The tokenizer that a file's fields describe, or None if they have none.

  Raises:
    UserError: for a kind of tokenizer or pre-tokenizer that we do not know.
  """
  kind = fields.get("tokenizer.ggml.model")
  if kind in (None, "none", "no_vocab"):
    return None
  named = {key.removeprefix("tokenizer.ggml."): v for key, v in fields.items()}
  if wrong := list(problems(named, _FIELDS, "tokenizer.ggml.")):
    raise UserError(f"{where}: {'; '.join(wrong)}")
  if kind not in _KINDS:
    raise UserError(
      f"{where}: the tokenizer {kind!r} is not supported, only {', '.join(_KINDS)}"
    )
  try:
    own = _Fields(fields, where)
    own.check()
    return _wrap(_KINDS[kind](own), own, max_length)
  except KeyError as error:
    raise UserError(f"{where}: the tokenizer's field {error} is missing") from None
  except UserError:
    raise
  except Exception as error:  # tokenizers raises bare Exception for what it refuses
    raise UserError(f"{where}: its tokenizer cannot be made: {error}") from error


class _Fields:
  """The `tokenizer.ggml.*` fields, with llama.cpp's defaults."""

  def __init__(self, fields: Mapping[str, Any], where: str) -> None:
    self._fields = fields
    self.where = where
    self.tokens = self["tokens"]
    self.types = self.get("token_type", [_NORMAL] * len(self.tokens))
    self.vocab = {token: index for index, token in enumerate(self.tokens)}

  def __getitem__(self, name: str) -> Any:  # whatever the field holds
    return self._fields[f"tokenizer.ggml.{name}"]

  def get(self, name: str, default: object = None) -> Any:
    return self._fields.get(f"tokenizer.ggml.{name}", default)

  def check(self) -> None:
    """Raises a UserError for lists and ids that do not fit together."""
    count = len(self.tokens)
    for name in ("token_type", "scores"):
      if len(self.get(name) or self.tokens) != count:
        raise UserError(
          f"{self.where}: tokenizer.ggml.{name} has {len(self.get(name))} values for "
          f"{count} tokens"
        )
    for name in ("bos", "eos", "unknown", "padding"):
      if (self.get(f"{name}_token_id") or 0) >= count:
        raise UserError(
          f"{self.where}: its {name} token is {self.get(f'{name}_token_id')}, of "
          f"{count}"
        )
    if longest := next((t for t in self.tokens if len(t) > _LONGEST), ""):
      raise UserError(f"{self.where}: a token has {len(longest):,} characters")

  def named(self) -> dict[str, str]:
    """{'bos': '<s>', …} for the special tokens that the file names."""
    ids = {
      name: self.get(f"{name}_token_id")
      for name in ("bos", "eos", "unknown", "padding")
    }
    return {k: self.tokens[v] for k, v in ids.items() if v is not None}

  def pre_tokenizer(self) -> str:
    """How text is split first: as the file says, or as only one way can be.

    Files made before llama.cpp wrote it down leave it open; a wrong one would give
    other tokens without a word.
    """
    if (name := self.get("pre")) is not None:
      return name
    if self._fields.get("general.architecture") == "gpt2":
      return "gpt-2"
    if _LLAMA3_MARK in self.vocab and len(self.tokens) > _LLAMA3_WORDS:
      return _LLAMA3_NAMES[0]
    raise UserError(
      f"{self.where}: it does not say how its tokenizer splits text "
      "(tokenizer.ggml.pre), which cannot be guessed; convert the model anew"
    )

  def chat_template(self) -> str | None:
    return self._fields.get("tokenizer.chat_template")


def _byte_level(fields: _Fields) -> tokenizers.Tokenizer:
  """GPT-2's BPE over bytes, with the file's own way to split text first."""
  name = fields.pre_tokenizer()
  if name not in _PRE_TOKENIZERS:
    raise UserError(
      f"{fields.where}: the pre-tokenizer {name!r} is not supported, only "
      f"{', '.join(_PRE_TOKENIZERS)}"
    )
  merges = [tuple(pair.split(" ")) for pair in fields["merges"]]
  # LLaMA 3 takes a whole word that is in the vocabulary without looking for merges.
  whole_words = name in _LLAMA3_NAMES
  tokenizer = tokenizers.Tokenizer(
    tokenizers.models.BPE(vocab=fields.vocab, merges=merges, ignore_merges=whole_words)
  )
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(_PRE_TOKENIZERS[name]())
  tokenizer.decoder = decoders.ByteLevel()
  if name == "qwen2":
    tokenizer.normalizer = normalizers.NFC()
  _finish(tokenizer, fields, add_bos=whole_words)
  return tokenizer


def _sentencepiece(fields: _Fields) -> tokenizers.Tokenizer:
  """SentencePiece's BPE: merges follow from the scores, unknown text becomes bytes."""
  tokenizer = tokenizers.Tokenizer(
    tokenizers.models.BPE(
      vocab=fields.vocab,
      merges=_merges_from_scores(fields),
      unk_token=fields.named().get("unknown"),
      fuse_unk=True,
      byte_fallback=True,
    )
  )
  prefix = fields.get("add_space_prefix", True)
  tokenizer.normalizer = normalizers.Sequence(
    [normalizers.Prepend(_SPACE)] * prefix + [normalizers.Replace(" ", _SPACE)]
  )
  steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
  tokenizer.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * prefix)
  _finish(tokenizer, fields, add_bos=True)
  return tokenizer


def _merges_from_scores(fields: _Fields) -> list[tuple[str, str]]:
  """Every way to join two pieces into a third, the best third first.

  SentencePiece joins the neighbours whose union scores highest; a BPE joins those
  whose merge stands first. Sorted by the union's score, the two are the same.
  """
  pieces = {
    token: score
    for token, score, kind in zip(
      fields.tokens, fields["scores"], fields.types, strict=True
    )
    if kind == _NORMAL
  }
  merges = [
    (-score, piece[:cut], piece[cut:])
    for piece, score in pieces.items()
    for cut in range(1, len(piece))
    if piece[:cut] in pieces and piece[cut:] in pieces
  ]
  return [(left, right) for _, left, right in sorted(merges)]


def _finish(tokenizer: tokenizers.Tokenizer, fields: _Fields, add_bos: bool) -> None:
  """Added tokens, and the tokens that every text starts and ends with."""
  special = set(fields.named().values())
  added = {_CONTROL: True, _UNKNOWN: True, _USER_DEFINED: False}
  for token, kind in zip(fields.tokens, fields.types, strict=True):
    if kind in added or token in special:
      is_special = added.get(kind, True)
      entry = tokenizers.AddedToken(token, normalized=False, special=is_special)
      tokenizer.add_tokens([entry])
  named = fields.named()
  first = [named["bos"]] if fields.get("add_bos_token", add_bos) else []
  last = [named["eos"]] if fields.get("add_eos_token", False) else []
  if first or last:
    tokenizer.post_processor = processors.TemplateProcessing(
      single=[*first, "$A", *last],
      pair=[*first, "$A", *last, *first, "$B", *last],
      special_tokens=[(token, fields.vocab[token]) for token in {*first, *last}],
    )


def _wrap(
  tokenizer: tokenizers.Tokenizer, fields: _Fields, max_length: int
) -> "transformers.PreTrainedTokenizerFast":
  named = fields.named()
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizer,
    bos_token=named.get("bos"),
    eos_token=named.get("eos"),
    unk_token=named.get("unknown"),
    pad_token=named.get("padding"),
    chat_template=fields.chat_template(),
    model_max_length=max_length,
    clean_up_tokenization_spaces=False,
  )


def describe(
  tokenizer: "transformers.PreTrainedTokenizerBase", size: int, where: str
) -> dict[str, Any]:
  """A file's fields for a tokenizer: the way back from `build`.

  size: of the model's vocabulary; ids without a token are marked as unused.

  Raises:
    UserError: for a kind of tokenizer that llama.cpp does not know by a name of ours.
  """
  raw = json.loads(tokenizer.backend_tokenizer.to_str())
  model, vocab = raw["model"], tokenizer.get_vocab()
  if model["type"] != "BPE":
    raise UserError(f"{where}: a {model['type']} tokenizer cannot be written as GGUF")
  if (largest := max(vocab.values())) >= size:
    raise UserError(f"{where}: the tokenizer has id {largest}, the model {size} ids")
  tokens = [f"[unused{i}]" for i in range(size)]
  types = [_UNUSED] * size
  for token, index in vocab.items():
    tokens[index], types[index] = token, _NORMAL
  for added in raw["added_tokens"]:
    types[added["id"]] = _CONTROL if added["special"] else _USER_DEFINED
  merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
  if pieces := model.get("byte_fallback"):
    own = _scored(raw, tokens, types, merges)
  else:
    own = {"merges": merges, "pre": _pre_name(raw, where)}
  own |= {"model": "llama" if pieces else "gpt2"} | _ends(tokenizer)
  fields = {"tokens": tokens, "token_type": types} | own
  found = {f"tokenizer.ggml.{key}": value for key, value in fields.items()}
  if tokenizer.chat_template:
    found["tokenizer.chat_template"] = tokenizer.chat_template
  return found


def _scored(
  raw: Mapping[str, Any], tokens: list[str], types: list[int], merges: list[str]
) -> dict[str, Any]:
  """What SentencePiece has in the place of merges; marks bytes among the types."""
  fields, unknown = {}, raw["model"].get("unk_token")
  for i, token in enumerate(tokens):
    types[i] = _BYTE if re.fullmatch(r"<0x[0-9A-F]{2}>", token) else types[i]
  if unknown in tokens:
    fields["unknown_token_id"] = index = tokens.index(unknown)
    types[index] = _UNKNOWN
  # A piece is as good as the merge that makes it is early.
  ranks = {m.replace(" ", ""): float(-i) for i, m in reversed([*enumerate(merges)])}
  fields["scores"] = [ranks.get(token, _NEVER) for token in tokens]
  return fields | {"add_space_prefix": "Prepend" in json.dumps(raw["normalizer"])}


def _ends(tokenizer: "transformers.PreTrainedTokenizerBase") -> dict[str, Any]:
  """Special tokens, and which of them a text begins and ends with."""
  ids = tokenizer("a")["input_ids"]
  bos, eos, pad = (getattr(tokenizer, f"{n}_token_id") for n in ("bos", "eos", "pad"))
  named = {"bos": bos, "eos": eos, "padding": pad}
  return {f"{k}_token_id": v for k, v in named.items() if v is not None} | {
    "add_bos_token": bos is not None and ids[:1] == [bos],
    "add_eos_token": eos is not None and ids[-1:] == [eos],
  }


def _pre_name(raw: Mapping[str, Any], where: str) -> str:
  """llama.cpp's name for how a tokenizer splits text first."""
  if not raw["model"]["merges"]:
    raise UserError(
      f"{where}: llama.cpp runs no tokenizer without merges, as 'bytes' is; train with "
      "data.tokenizer=bpe:N or a model's own"
    )
  own = _steps(raw["pre_tokenizer"])
  for name, split in _PRE_TOKENIZERS.items():
    known = tokenizers.Tokenizer(tokenizers.models.BPE())
    known.pre_tokenizer = pre_tokenizers.Sequence(split())
    if _steps(json.loads(known.to_str())["pre_tokenizer"]) == own and name != "default":
      return name
  raise UserError(
    f"{where}: this tokenizer splits text in a way that has no name here; export a "
    "folder and use llama.cpp's converter"
  )


def _steps(raw: Mapping[str, Any] | None) -> list[Any]:
  """The steps of a pre-tokenizer, as far as they decide where text is cut."""
  steps = (raw or {}).get("pretokenizers", [raw])
  said = ("type", "pattern", "behavior", "invert", "individual_digits", "use_regex")
  return [{key: (step or {}).get(key) for key in said} for step in steps]


def _gpt2_split() -> list[pre_tokenizers.PreTokenizer]:
  return [pre_tokenizers.ByteLevel(add_prefix_space=False)]


def _smollm_split() -> list[pre_tokenizers.PreTokenizer]:
  return [pre_tokenizers.Digits(individual_digits=True), *_gpt2_split()]


def _llama3_split() -> list[pre_tokenizers.PreTokenizer]:
  return _by_pattern(_LLAMA3_SPLIT)


def _by_pattern(pattern: str) -> list[pre_tokenizers.PreTokenizer]:
  return [
    pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
  ]


# LLaMA 3's vocabulary is known by its size and the token that begins every text.
_LLAMA3_MARK, _LLAMA3_WORDS = "<|begin_of_text|>", 128000


def _qwen2_split() -> list[pre_tokenizers.PreTokenizer]:
  return _by_pattern(_LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}"))


_LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3")
_KINDS = {"gpt2": _byte_level, "llama": _sentencepiece}
_PRE_TOKENIZERS = {
  "default": _gpt2_split,
  "gpt-2": _gpt2_split,
  "smollm": _smollm_split,
  "qwen2": _qwen2_split,
  **dict.fromkeys(_LLAMA3_NAMES, _llama3_split),
}
