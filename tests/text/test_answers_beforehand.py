"""Answers as token ids: the draws, resuming, and what is asked only when needed."""

import json

import jax
import numpy as np
import pytest
from answering import PROMPTS, random_model, say

from okd_jax.errors import UserError
from okd_jax.runtime.workdir import made_from, part
from okd_jax.text.rollout import Sampling, generate
from okd_jax.text.source import decoder_source


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """The file of an undisturbed run; eight rows are written at a time."""
  path = tmp_path_factory.mktemp("whole") / "teacher.jsonl"
  say(path)
  return path


def test_they_are_those_of_one_call(whole):
  decoder, variables, _ = random_model()
  prompts = [np.array(list(x.prompt.encode()), np.int32) for x in PROMPTS]
  wanted = generate(
    decoder_source(decoder),
    variables,
    prompts,
    jax.random.key(0),
    max_new_tokens=12,
    eos_ids=decoder.config.eos_ids,
  )
  found = say(whole)
  assert [x.dtype for x in found] == [np.int32] * 21
  lines = [json.loads(line) for line in whole.read_text().splitlines()]
  for answer, line, each in zip(found, lines, wanted, strict=True):
    assert answer.tolist() == line == each.tokens.tolist()


def test_a_model_is_made_only_for_what_is_missing(whole, tmp_path):
  decoder, variables, _ = random_model()
  made = []

  def make():
    made.append(1)
    return variables

  lines = whole.read_bytes().splitlines(keepends=True)
  path = tmp_path / "teacher.jsonl"
  sidecar = whole.with_name("teacher.jsonl.made_from.json")
  (tmp_path / sidecar.name).write_bytes(sidecar.read_bytes())
  part(path).write_bytes(b"".join(lines[:9]) + lines[9][:3])
  say(path, model=(decoder, make))
  assert path.read_bytes() == whole.read_bytes() and made == [1]
  say(path, model=(decoder, make))
  assert made == [1]
  assert sorted(p.name for p in tmp_path.iterdir()) == [path.name, sidecar.name]


def test_what_else_was_asked_is_refused(whole):
  about = made_from(whole)
  assert about["model"] == "random" and about["temperature"] == 1.0
  for words, options in (
    ("prompts='.*' there", {"prompts": [b"a"]}),
    ("max_new_tokens=12 there, 13 here", {"max_new_tokens": 13}),
    ("top_k=0.0 there, 3.0 here", {"sampling": Sampling(1.0, 3, 1.0)}),
    ("eos_ids=.* there, .7. here", {"eos_ids": [7]}),
    ("model='random' there, 'other' here", {"about": {"model": "other"}}),
  ):
    with pytest.raises(UserError, match=f"{whole.name} was made .*{words}"):
      say(whole, **options)


def test_what_cannot_be_asked_leaves_nothing(tmp_path):
  with pytest.raises(UserError, match="max_new_tokens=0"):
    say(tmp_path / "teacher.jsonl", max_new_tokens=0)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  "content, words",
  [
    ("[1, 2\n", "damaged"),
    ('["a"]\n', "damaged"),
    ("[1]\n[2]\n", "2 answers to 1 prompts; delete it"),
  ],
)
def test_a_damaged_file_is_refused(tmp_path, content, words):
  path = tmp_path / "teacher.jsonl"
  say(path, prompts=[b"a"])
  path.write_text(content)
  with pytest.raises(UserError, match=words):
    say(path, prompts=[b"a"])


class Stop(Exception):
  pass


def stops_before(batch):
  """Lets so many batches through."""

  def heard(batches):
    for i, each in enumerate(batches):
      if i == batch:
        raise Stop
      yield each

  return heard


def test_a_stop_is_heard_between_two_batches(whole, tmp_path):
  """Four batches make a piece, which is written at once; whole pieces stay."""
  path = tmp_path / "teacher.jsonl"
  asked = []

  def second_piece(batches):
    asked.append(1)
    return stops_before(2)(batches) if len(asked) == 2 else iter(batches)

  with pytest.raises(Stop):
    say(path, heard=second_piece)
  assert part(path).read_bytes().count(b"\n") == 8 and not path.exists()
  say(path)
  assert path.read_bytes() == whole.read_bytes()
