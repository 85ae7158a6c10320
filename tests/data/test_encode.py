"""Token rows: exactly the response and its end are trained, whatever the template."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from chats import CHATML, LONG_TALK, chat_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from okd_jax.data import (
  Counts,
  Example,
  Record,
  encode,
  load_records,
  make_tokenizer,
  pad_row,
  prepare,
  show_example,
  stop_ids,
)
from okd_jax.errors import UserError

SHARED = Path(__file__).parents[2].parent / "shared"
ROOMY = {"max_length": 4096, "max_prompt_length": 4096}
EOS, PAD = 256, 257  # of the byte tokenizer


def ask(prompt="ab", response="xyz", where="f:1"):
  return Record("completion", where, prompt=prompt, references=(response,))


def bytes_tokenizer():
  return make_tokenizer("bytes", [])


def framed_tokenizer():
  """Puts <s> before every text and EOS behind it, as some tokenizers do."""
  tokenizer = bytes_tokenizer()
  tokenizer.add_special_tokens({"bos_token": "<s>"})
  tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
    single="<s> $A <|endoftext|>",
    special_tokens=[("<s>", tokenizer.bos_token_id), ("<|endoftext|>", EOS)],
  )
  assert tokenizer("a")["input_ids"] == [258, 97, EOS]
  return tokenizer


def shared_tokenizer(path):
  if not (SHARED / path).is_dir():
    pytest.skip(f"no {path}")
  return AutoTokenizer.from_pretrained(SHARED / path)


def spans(example):
  """(given, trained) ids, read off the padded training row and not the example."""
  row = pad_row(example, len(example.tokens), pad_id=0)
  trained = row["labels"][row["mask"]].tolist()
  assert example.tokens.dtype == np.int32
  return example.tokens.tolist()[: len(example.tokens) - len(trained)], trained


# What is trained


def test_response_and_eos():
  [example] = encode(ask(), bytes_tokenizer(), **ROOMY)
  assert example.prompt_length == 2
  assert spans(example) == (list(b"ab"), [*b"xyz", EOS])
  assert (example.references, example.where) == (("xyz",), "f:1")


def test_padding_with_eos_and_id_0():
  tokenizer = bytes_tokenizer()
  tokenizer.pad_token = tokenizer.eos_token
  [example] = encode(ask("\0a", "\0\0"), tokenizer, **ROOMY)
  assert spans(example) == ([0, 97], [0, 0, EOS])


@pytest.mark.parametrize("template", ["default", "alpaca", "Q {instruction} {input} A"])
@given(instruction=st.text(min_size=1), extra=st.text(), response=st.text(min_size=1))
def test_any_record_under_any_template(template, instruction, extra, response):
  """Guards B7: the wrong span masked (TRL#2169)."""
  record = Record(
    "instruction", "f:1", prompt=instruction, input=extra, references=(response,)
  )
  [example] = encode(record, bytes_tokenizer(), template, **ROOMY)
  prompt, trained = spans(example)
  assert trained == [*response.encode(), EOS]
  assert instruction.encode() in bytes(prompt)
  assert len(prompt) == example.prompt_length


@given(
  prompt=st.text(min_size=1, max_size=30),
  response=st.text(min_size=1, max_size=30),
  max_length=st.integers(2, 40),
  max_prompt_length=st.integers(1, 40),
  overlong_prompt=st.sampled_from(["drop", "truncate"]),
  overlong_row=st.sampled_from(["drop", "truncate"]),
)
def test_any_limits(prompt, response, **limits):
  """Against a plain restatement of the rules on lists of bytes."""
  limits = dict(limits)
  before, after = list(prompt.encode()), [*response.encode(), EOS]
  if len(before) > limits["max_prompt_length"]:
    keep = limits["overlong_prompt"] == "truncate"
    before = before[-limits["max_prompt_length"] :] if keep else None
  expected = []
  if before is not None:
    whole = before + after
    cut = whole[: limits["max_length"]]
    if cut == whole or (
      limits["overlong_row"] == "truncate" and len(cut) > len(before)
    ):
      expected = [(before, cut[len(before) :])]
  examples = encode(ask(prompt, response), bytes_tokenizer(), **limits)
  assert [spans(example) for example in examples] == expected


def test_a_token_across_the_seam_is_split():
  """Generation is given the prompt's own tokens, so training must start with them."""
  tokenizer = shared_tokenizer("tokenizers/gpt2")
  prompt, response = "The answer is ", "Paris"
  [example] = encode(ask(prompt, response), tokenizer, **ROOMY)
  assert tokenizer(prompt + response)["input_ids"] != example.tokens[:-1].tolist()
  given_ids, trained = spans(example)
  assert given_ids == tokenizer(prompt)["input_ids"]
  assert trained == [*tokenizer(response)["input_ids"], tokenizer.eos_token_id]


def test_no_seam_means_the_tokens_of_the_whole_text():
  tokenizer = shared_tokenizer("tokenizers/gpt2")
  [example] = encode(ask("The answer is", " Paris"), tokenizer, **ROOMY)
  whole = tokenizer("The answer is Paris")["input_ids"]
  assert example.tokens.tolist() == [*whole, tokenizer.eos_token_id]
  assert example.prompt_length == 3


def test_a_bos_that_is_written_out_is_the_only_one():
  """As in rows that somebody rendered for LLaMA: '<s>[INST] … [/INST] …'."""
  tokenizer = framed_tokenizer()
  bos = tokenizer.bos_token_id
  [text] = encode(Record("text", "f:1", text="<s>abc"), tokenizer, **ROOMY)
  assert text.tokens.tolist() == [bos, *b"abc", EOS]
  [row] = encode(ask("<s>ab", "xyz"), tokenizer, **ROOMY)
  assert spans(row) == ([bos, *b"ab"], [*b"xyz", EOS])
  [inside] = encode(ask("a<s>b", "xyz"), tokenizer, **ROOMY)
  assert spans(inside) == ([bos, *b"a", bos, *b"b"], [*b"xyz", EOS])


def test_a_vocabulary_without_letters_that_anybody_could_probe_with():
  """Twenty amino acids and no token for the unknown: a, j, u and x are none."""
  letters = "ACDEFGHIKLMNPQRSTVWY"
  vocabulary = {letter: i for i, letter in enumerate(letters)}
  backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
  backend.add_special_tokens(["<s>", "</s>"])
  bos, eos = 20, 21
  backend.post_processor = processors.TemplateProcessing(
    single="<s> $A", special_tokens=[("<s>", bos)]
  )
  tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=backend, bos_token="<s>", eos_token="</s>"
  )
  [row] = encode(ask("MK", "VL"), tokenizer, **ROOMY)
  ids = [vocabulary[letter] for letter in "MKVL"]
  assert spans(row) == ([bos, *ids[:2]], [*ids[2:], eos])
  assert stop_ids(tokenizer) == (eos,)


def test_bos_is_kept_and_eos_is_never_doubled():
  tokenizer = framed_tokenizer()
  bos = tokenizer.bos_token_id
  [example] = encode(ask(), tokenizer, **ROOMY)
  assert spans(example) == ([bos, *b"ab"], [*b"xyz", EOS])
  [text] = encode(Record("text", "f:1", text="abc"), tokenizer, **ROOMY)
  assert (text.tokens.tolist(), text.prompt_length) == ([bos, *b"abc", EOS], 0)


def test_a_literal_eos_in_the_data_is_the_end():
  record = Record("completion", "f:1", prompt="a", references=("b<|endoftext|>", "c"))
  [example] = encode(record, bytes_tokenizer(), **ROOMY)
  assert spans(example) == ([97], [98, EOS])
  assert example.references == ("b", "c")
  [silent] = encode(ask("a", "<|endoftext|>"), bytes_tokenizer(), **ROOMY)
  assert spans(silent) == ([97], [EOS])


# Chat


def test_chat_ends_with_the_end_of_turn():
  tokenizer = chat_tokenizer()
  end = tokenizer.convert_tokens_to_ids("<|im_end|>")
  [example] = encode(LONG_TALK, tokenizer, "chat", **ROOMY)
  prompt, trained = spans(example)
  assert trained == [*b"hello", end]  # not the newline after it, and no EOS
  assert tokenizer.decode(prompt).endswith("<|im_end|>\n<|im_start|>assistant\n")
  assert prompt.count(end) == 3  # the earlier turns are given, not trained


@pytest.mark.parametrize(
  "ending, trained",
  [("", [EOS]), ("<|endoftext|>", [EOS]), (" END\n", [*b" END\n", EOS])],
)
def test_chat_without_an_end_of_turn_token_gets_eos(ending, trained):
  template = CHATML.replace("<|im_end|>\n", ending)
  [example] = encode(LONG_TALK, chat_tokenizer(template), "chat", **ROOMY)
  assert spans(example)[1] == [*b"hello", *trained]


def test_chat_brings_its_own_special_tokens():
  tokenizer = framed_tokenizer()
  tokenizer.chat_template = "<s>" + CHATML
  [example] = encode(LONG_TALK, tokenizer, "chat", **ROOMY)
  assert example.tokens.tolist().count(tokenizer.bos_token_id) == 1


def test_a_response_that_was_cut_off_gets_no_end():
  """Guards B7: the model never said that it ended there. See `okd_jax.sample`."""
  tokenizer = chat_tokenizer()
  cut = dataclasses.replace(LONG_TALK, ended=False)
  [example] = encode(cut, tokenizer, "chat", **ROOMY)
  assert spans(example)[1] == list(b"hello")
  [whole] = encode(LONG_TALK, tokenizer, "chat", **ROOMY)
  assert spans(whole)[0] == spans(example)[0]
  [plain] = encode(dataclasses.replace(ask(), ended=False), tokenizer, **ROOMY)
  assert spans(plain) == (list(b"ab"), list(b"xyz"))
  text = Record("text", "f:1", text="abc", ended=False)
  assert encode(text, tokenizer)[0].tokens.tolist() == list(b"abc")
  silent = dataclasses.replace(ask(response="<|endoftext|>"), ended=False)
  with pytest.raises(UserError, match="f:1: 'ended' is false, but the response has no"):
    encode(silent, tokenizer)


def test_stop_ids():
  tokenizer = chat_tokenizer()
  end = tokenizer.convert_tokens_to_ids("<|im_end|>")
  assert stop_ids(tokenizer, "chat") == (EOS, end)
  assert stop_ids(tokenizer, "default") == (EOS,)
  assert stop_ids(chat_tokenizer("{{ messages[-1].content }}"), "chat") == (EOS,)


# Limits


def test_truncating_keeps_the_end_of_the_prompt_and_bos():
  limits = {"max_length": 9, "max_prompt_length": 3, "overlong_prompt": "truncate"}
  [example] = encode(ask("abcdef"), bytes_tokenizer(), **limits)
  assert spans(example) == (list(b"def"), [*b"xyz", EOS])
  tokenizer = framed_tokenizer()
  [example] = encode(ask("abcdef"), tokenizer, **limits)
  assert spans(example) == ([tokenizer.bos_token_id, *b"ef"], [*b"xyz", EOS])


@pytest.mark.parametrize(
  "max_length, trained",
  [(6, [*b"xyz", EOS]), (5, list(b"xyz")), (4, list(b"xy")), (3, list(b"x"))],
)
def test_a_truncated_response_has_no_eos(max_length, trained):
  examples, counts = prepare(
    [ask()], bytes_tokenizer(), max_length=max_length, max_prompt_length=9
  )
  assert spans(examples[0]) == (list(b"ab"), trained)
  assert counts.truncated_rows == (max_length < 6)


def test_texts_are_cut_into_windows():
  record = Record("text", "f:1", text="abcdefg")
  pieces = encode(record, bytes_tokenizer(), max_length=3)
  assert [p.tokens.tolist() for p in pieces] == [
    [97, 98, 99],
    [100, 101, 102],
    [103, EOS],
  ]
  assert {p.prompt_length for p in pieces} == {0} and pieces[0].references == ()
  # Cut to 7 + 1: the eighth token alone would predict nothing.
  assert len(encode(record, bytes_tokenizer(), max_length=7)) == 1


def test_counts_and_their_line(caplog):
  records = [
    ask("a", "b"),
    ask("abcdef", "x"),
    ask("a", "xyzxyz"),
    ask("abcd", "x"),
    Record("text", "f:5", text="abcdefg"),
  ]
  limits = {"max_length": 4, "max_prompt_length": 4}
  with caplog.at_level("INFO", logger="okd_jax"):
    examples, counts = prepare(records, bytes_tokenizer(), name="train", **limits)
  assert counts == Counts(
    rows=5, kept=4, dropped_prompts=1, dropped_rows=1, truncated_rows=1, windows=2
  )
  assert len(examples) == 4
  assert caplog.messages == [
    "train: 4 rows from 5 records; 2 are windows of long texts; dropped 1 (prompts "
    "longer than data.max_prompt_length=4); dropped 1 (prompts too long for a response "
    "to fit in data.max_length=4); cut 1 rows to 4 tokens"
  ]
  limits |= {"overlong_prompt": "truncate", "overlong_row": "drop"}
  _, counts = prepare(records[:3], bytes_tokenizer(), **limits)
  assert counts == Counts(rows=3, kept=1, truncated_prompts=1, dropped_rows=2)


@pytest.mark.parametrize(
  "limits, message",
  [
    (
      {"max_length": 8, "max_prompt_length": 8, "overlong_row": "drop"},
      "all 3 rows are longer than data.max_length=8; raise it or set "
      "data.overlong_row=truncate",
    ),
    (
      {"max_length": 99, "max_prompt_length": 3},
      "all 3 prompts are longer than data.max_prompt_length=3; raise it or set "
      "data.overlong_prompt=truncate",
    ),
    (
      {"max_length": 4, "max_prompt_length": 9},
      "all 3 prompts are too long for a response to fit in data.max_length=4; raise it "
      "or lower data.max_prompt_length",
    ),
    (
      {"max_length": 7, "max_prompt_length": 6, "overlong_row": "drop"},
      "none of the 3 rows is left: 1 prompts are longer than "
      "data.max_prompt_length=6 (raise it or set data.overlong_prompt=truncate), "
      "2 rows are longer than data.max_length=7 (raise it or set "
      "data.overlong_row=truncate)",
    ),
  ],
)
def test_nothing_left(limits, message):
  records = [ask("abcd", "uvwxyz"), ask("abcdef", "xyz"), ask("abcdefg", "xyz")]
  with pytest.raises(UserError) as caught:
    prepare(records, bytes_tokenizer(), **limits)
  assert str(caught.value) == message


def test_other_mistakes():
  tokenizer = bytes_tokenizer()
  with pytest.raises(UserError, match="holds no records"):
    prepare([], tokenizer)
  with pytest.raises(UserError, match="f:7: the prompt has no tokens"):
    encode(ask("", where="f:7"), tokenizer)
  with pytest.raises(UserError, match="f:8: the text has no tokens"):
    encode(Record("text", "f:8", text="<|endoftext|>"), tokenizer)
  tokenizer.eos_token = None
  with pytest.raises(UserError, match="no end-of-text token"):
    encode(ask(), tokenizer)


def test_bad_limits_are_all_named():
  with pytest.raises(UserError) as caught:
    encode(
      ask(),
      bytes_tokenizer(),
      max_length=1,
      max_prompt_length=0,
      overlong_prompt="cut",
      overlong_row="",
    )
  for name in ("max_length=1", "max_prompt_length=0", "prompt='cut'", "row=''"):
    assert name in str(caught.value)
  with pytest.raises(TypeError, match="max_len"):
    encode(ask(), bytes_tokenizer(), max_len=3)


# A whole dataset


def test_a_dataset_is_its_records():
  """Batches of texts give what each gives alone, in order and beyond one batch."""
  records = [ask(f"p{i} ", f" r{i}", where=f"f:{i}") for i in range(2100)]
  tokenizer = make_tokenizer("bpe:264", records)
  examples, counts = prepare(records, tokenizer)
  assert (counts.kept, len(examples)) == (2100, 2100)
  for i in (0, 999, 1000, 2099):
    [alone] = encode(records[i], tokenizer)
    assert examples[i].where == f"f:{i}"
    np.testing.assert_array_equal(examples[i].tokens, alone.tokens)
    assert examples[i].prompt_length == alone.prompt_length


def test_show_example():
  [example] = encode(ask("Say it.\n", "It."), bytes_tokenizer())
  assert show_example(example, bytes_tokenizer()) == (
    "f:1: 8 prompt tokens, then 4 trained, between >>> and <<<\n"
    "Say it.\n>>>It.<|endoftext|><<<"
  )
  text = Example(np.array([97, 98, 99], np.int32), 0, (), "f:2")
  assert show_example(text, bytes_tokenizer()).startswith(
    "f:2: 0 prompt tokens, then 2"
  )


@pytest.mark.parametrize("path", ["tokenizers/gpt2", "models/stories260K"])
@pytest.mark.parametrize("template", ["default", "alpaca"])
def test_real_data_and_tokenizers(path, template):
  tokenizer = shared_tokenizer(path)
  records = load_records(str(SHARED / "data/train/instructions_1100.jsonl"))[:300]
  examples, counts = prepare(records, tokenizer, template, **ROOMY)
  assert counts == Counts(rows=300, kept=300)
  for record, example in zip(records, examples, strict=True):
    prompt, trained = spans(example)
    assert trained[-1] == tokenizer.eos_token_id
    # SentencePiece marks words and not spaces, and puts one in front of a text.
    decoded = tokenizer.decode(trained[:-1]).strip()
    assert decoded == record.references[0].strip()
    assert tokenizer.decode(prompt).endswith("### Response:\n")


def test_a_literal_end_in_real_data():
  tokenizer = shared_tokenizer("tokenizers/gpt2")
  records = load_records(str(SHARED / "data/train/p3_30k.jsonl.gz"))[:300]
  examples, _ = prepare(records, tokenizer)
  for example in examples:
    _, trained = spans(example)
    assert trained.count(tokenizer.eos_token_id) == 1
    assert "<|endoftext|>" not in example.references[0]
