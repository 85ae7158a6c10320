"""Tokenizers made here, and comparing two."""

import hashlib
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from okd_jax import models
from okd_jax.data import Record, compare_tokenizers, load_records, make_tokenizer
from okd_jax.data.tokenizer import _byte_chars
from okd_jax.errors import UserError

RECORDS = [
  Record(
    "instruction", "f:1", prompt="the cat", input="a cat", references=("the hat",)
  ),
  Record("text", "f:2", text="the cat sat on the mat " * 20),
  Record(
    "messages",
    "f:3",
    messages=({"role": "user", "content": "zebra zebra zebra"},),
    references=("ok",),
  ),
]
PRINT_VOCABULARY = """
import hashlib
from okd_jax.data import load_records, make_tokenizer
tokenizer = make_tokenizer("bpe:700", load_records("embedded")[:1500])
print(hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest())
"""

by_bytes = make_tokenizer("bytes", [])
by_pieces = make_tokenizer("bpe:270", RECORDS)


def test_ids_of_bytes_are_bytes():
  assert by_bytes("h\x00é")["input_ids"] == [0x68, 0, 0xC3, 0xA9]
  assert by_bytes("a<|endoftext|>")["input_ids"] == [0x61, 256]
  assert (by_bytes.eos_token_id, by_bytes.pad_token_id) == (256, 257)
  assert len(by_bytes) == 258


def test_byte_characters_are_the_librarys():
  chars = _byte_chars()
  assert set(chars) == set(pre_tokenizers.ByteLevel.alphabet())
  split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  for text in (bytes(range(128)).decode(), "äß€中🙂"):
    [(piece, _)] = split.pre_tokenize_str(text)
    assert piece == "".join(chars[byte] for byte in text.encode())


@pytest.mark.parametrize("tokenizer", [by_bytes, by_pieces])
@given(text=st.text())
def test_any_text_survives(tokenizer, text):
  assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_bpe_has_the_size_asked_for_and_learns_pieces():
  assert len(by_pieces) == 270
  assert by_pieces.tokenize("the cat sat") == ["the", "Ġcat", "Ġsat"]
  talk = Record("messages", "f:1", messages=({"content": "zebra " * 9},))
  assert make_tokenizer("bpe:264", [talk]).tokenize("zebra") == ["zebra"]
  assert by_pieces("the hat<|endoftext|>")["input_ids"][-1] == by_pieces.eos_token_id


def test_too_little_data_is_said(caplog):
  with caplog.at_level("INFO", logger="okd_jax"):
    assert len(make_tokenizer("bpe:900", RECORDS)) == 278
  assert "bpe:900: the data give no more than 278 entries" in caplog.text


def test_bpe_is_the_same_in_every_process():
  elsewhere = subprocess.run(
    [sys.executable, "-c", PRINT_VOCABULARY],
    env=os.environ | {"PYTHONHASHSEED": "1"},
    stdout=subprocess.PIPE,
    check=True,
    text=True,
  )
  here = make_tokenizer("bpe:700", load_records("embedded")[:1500])
  digest = hashlib.sha256(here.backend_tokenizer.to_str().encode()).hexdigest()
  assert elsewhere.stdout.strip() == digest


@pytest.mark.parametrize("tokenizer", [by_bytes, by_pieces])
def test_save_and_load(tokenizer, tmp_path):
  tokenizer.save_pretrained(tmp_path)
  loaded = AutoTokenizer.from_pretrained(tmp_path)
  assert loaded.is_fast and loaded.get_vocab() == tokenizer.get_vocab()
  assert loaded.eos_token_id == tokenizer.eos_token_id
  assert loaded.pad_token_id == tokenizer.pad_token_id
  text = "the zebra , sat\n\n naïve's <|endoftext|> <|pad|>!"
  ids = tokenizer(text)["input_ids"]
  assert loaded(text)["input_ids"] == ids
  assert loaded.decode(ids) == tokenizer.decode(ids) == text


def test_padding_may_be_eos(tmp_path):
  tokenizer = make_tokenizer("bytes", [])
  tokenizer.pad_token = tokenizer.eos_token
  tokenizer.save_pretrained(tmp_path)
  assert AutoTokenizer.from_pretrained(tmp_path).pad_token_id == 256


@pytest.mark.parametrize("spec", ["byte", "bpe", "bpe:", "bpe:x", "bpe:-3", ""])
def test_unknown_kinds(spec):
  with pytest.raises(UserError, match="is unknown; use bytes, or bpe:N"):
    make_tokenizer(spec, RECORDS)


def test_too_small():
  with pytest.raises(UserError, match="'bpe:257' is too small; N must be from 258"):
    make_tokenizer("bpe:257", RECORDS)


# Comparing


def test_equal_tokenizers_compare_equal(tmp_path):
  by_bytes.save_pretrained(tmp_path)
  compare_tokenizers(by_bytes, AutoTokenizer.from_pretrained(tmp_path))


def test_different_tokenizers_name_the_first_ids():
  with pytest.raises(UserError) as caught:
    compare_tokenizers(by_bytes, by_pieces)
  message = str(caught.value)
  assert "differ in 270 ids" in message
  assert "id 0: 'Ā' in teacher, '<|endoftext|>' in student; id 1: 'ā' in" in message
  assert "id 2: " in message and "id 3: " not in message and "; ..." in message


def test_one_id_renamed():
  other = make_tokenizer("bpe:270", RECORDS)
  other.add_tokens(["extra"])
  for pair, text in (
    ((by_pieces, other), "id 270: nothing in teacher, 'extra' in student)"),
    ((other, by_pieces), "id 270: 'extra' in teacher, nothing in student)"),
  ):
    with pytest.raises(UserError) as caught:
      compare_tokenizers(*pair)
    assert "differ in 1 ids (" in str(caught.value) and text in str(caught.value)


def test_a_padding_token_of_ones_own_does_no_harm():
  other = make_tokenizer("bpe:270", RECORDS)
  other.add_special_tokens({"pad_token": "<pad>"})
  assert len(other) == 271
  compare_tokenizers(by_pieces, other)
  compare_tokenizers(other, by_pieces)


def test_a_padding_id_that_is_text_to_the_other_does():
  other = make_tokenizer("bpe:270", RECORDS)
  other.add_special_tokens({"pad_token": "<pad>"})
  another = make_tokenizer("bpe:270", RECORDS)
  another.add_tokens(["word"])
  with pytest.raises(UserError, match="id 270: '<pad>' in teacher, 'word' in student"):
    compare_tokenizers(other, another)


def test_a_folder_with_nothing_but_a_tokenizer(shared):
  tokenizer = models.load_tokenizer(shared / "tokenizers" / "gpt2")
  assert tokenizer.decode(tokenizer.encode("Once upon")) == "Once upon"
  with pytest.raises(UserError, match="there is no such file or folder"):
    models.load_tokenizer("./nowhere")


@pytest.mark.parametrize("size", ["99999999999", "1048577", "9" * 5000])
def test_too_large(size):
  """The trainer would take memory for all entries at once, terabytes for the first."""
  with pytest.raises(UserError, match="^tokenizer 'bpe:.*is too large; N must be from"):
    make_tokenizer(f"bpe:{size}", [])
