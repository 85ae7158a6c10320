"""Tokenizers made here, for runs without a pretrained one; and comparing two.

`bytes` has one id a byte, `bpe:N` is a byte-level BPE of N entries trained on the
run's own data. Both are what transformers loads from a folder.
"""

import itertools
import logging
import re
from collections.abc import Iterable, Iterator, Mapping

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from okd_jax.data.example import Example
from okd_jax.data.sources import Record
from okd_jax.errors import UserError

EOS = "<|endoftext|>"
PAD = "<|pad|>"
_SMALLEST = 256 + 2  # every byte, EOS and padding
_LARGEST = 1 << 20  # the trainer takes memory for all of them before it begins
_REMEDY = (
  "distillation needs one vocabulary: give the student the teacher's tokenizer, or set "
  "method.name=kd, method.cross_tokenizer=uld and method.kd_ratio=0.6, which needs none"
)


def make_tokenizer(spec: str, records: Iterable[Record]) -> PreTrainedTokenizerFast:
  """A new tokenizer: `bytes`, or `bpe:N` trained on the text of `records`.

  Any text survives encoding and decoding. The ids of `bytes` are the bytes, then
  EOS (256) and padding (257). The same records give the same `bpe:N` everywhere.

  Raises:
    UserError: if `spec` is neither, or N is below the 256 bytes, EOS and padding, or
      beyond what a vocabulary has.

  >>> make_tokenizer("bytes", [])("hi<|endoftext|>")["input_ids"]
  [104, 105, 256]
  """
  if spec == "bytes":
    return _finished(_bytes_tokenizer())
  found = re.fullmatch(r"bpe:([0-9]+)", spec)
  if not found:
    raise UserError(
      f"tokenizer {spec!r} is unknown; use bytes, or bpe:N such as bpe:1024"
    )
  # Not as a number first, whose digits Python limits.
  size = int(found[1]) if len(found[1]) < 20 else _LARGEST + 1
  if not _SMALLEST <= size <= _LARGEST:
    what = "small" if size < _SMALLEST else "large"
    raise UserError(
      f"tokenizer {spec[:40]!r} is too {what}; N must be from {_SMALLEST} to {_LARGEST}"
    )
  return _finished(_bpe_tokenizer(size, records))


def compare_tokenizers(
  teacher: PreTrainedTokenizerBase,
  student: PreTrainedTokenizerBase,
  remedy: str = _REMEDY,
  names: tuple[str, str] = ("teacher", "student"),
) -> None:
  """Checks that every id means the same token to both.

  Model sizes do not matter here: rows without a token are padding. A padding token
  that only one of the two has does no harm either, since it is never a target.

  Args:
    remedy: what to do where they differ.
    names: what a message calls the two.

  Raises:
    UserError: saying how many ids differ, and which.
  """
  theirs, ours = _token_of_id(teacher), _token_of_id(student)
  different = [
    i for i in sorted(theirs.keys() | ours.keys()) if theirs.get(i) != ours.get(i)
  ]
  # Only a padding id of one side's own may be nothing to the other.
  padding = {teacher.pad_token_id: ours, student.pad_token_id: theirs}
  different = [i for i in different if not (i in padding and i not in padding[i])]
  if different:
    shown = "; ".join(
      f"id {i}: {_shown(theirs, i)} in {names[0]}, {_shown(ours, i)} in {names[1]}"
      for i in different[:3]
    )
    more = "; ..." if len(different) > 3 else ""
    raise UserError(
      f"the tokenizers of {names[0]} and {names[1]} differ in {len(different)} ids "
      f"({shown}{more}); {remedy}"
    )


def check_vocabulary(sizes: Mapping[str, int], examples: Iterable[Example]) -> None:
  """Raises a UserError if a row holds a token that one of the models does not have.

  sizes: of the models' vocabularies, by what a message calls the model.
  """
  check_largest(sizes, max(int(example.tokens.max()) for example in examples))


def check_largest(sizes: Mapping[str, int], largest: int) -> None:
  """As `check_vocabulary`, of the largest id that the rows hold."""
  for name, size in sizes.items():
    if largest >= size:
      raise UserError(
        f"the data holds token id {largest}, but {name} has only {size} ids; its "
        "tokenizer is not the one it was trained with"
      )


def _token_of_id(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
  return {token_id: token for token, token_id in tokenizer.get_vocab().items()}


def _shown(tokens: dict[int, str], token_id: int) -> str:
  return repr(tokens[token_id]) if token_id in tokens else "nothing"


def _bytes_tokenizer() -> tokenizers.Tokenizer:
  vocabulary = {char: byte for byte, char in enumerate(_byte_chars())}
  tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
    add_prefix_space=False, use_regex=False
  )
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.add_special_tokens([EOS, PAD])
  return tokenizer


def _byte_chars() -> list[str]:
  """The visible character that byte-level pieces use for each byte.

  GPT-2's convention: bytes that Latin-1 can show stand for themselves, the others
  are numbered from U+0100 on.
  """
  visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
  spare = itertools.count(0x100)
  return [chr(byte if byte in visible else next(spare)) for byte in range(0x100)]


def _bpe_tokenizer(size: int, records: Iterable[Record]) -> tokenizers.Tokenizer:
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=size,
    special_tokens=[EOS, PAD],
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  tokenizer.train_from_iterator(_texts(records), trainer)
  found = tokenizer.get_vocab_size()
  if found < size:
    logging.getLogger("okd_jax").info(
      "tokenizer bpe:%d: the data give no more than %d entries", size, found
    )
  return tokenizer


def _texts(records: Iterable[Record]) -> Iterator[str]:
  for record in records:
    yield from (record.prompt, record.input, record.text, *record.references)
    yield from (message.get("content", "") for message in record.messages)


def _finished(tokenizer: tokenizers.Tokenizer) -> PreTrainedTokenizerFast:
  return PreTrainedTokenizerFast(
    tokenizer_object=tokenizer,
    eos_token=EOS,
    pad_token=PAD,
    clean_up_tokenization_spaces=False,
  )
