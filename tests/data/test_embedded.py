"""The data made from Python's own documentation."""

import importlib
import json
import os
import re
import subprocess
import sys

import pytest

from okd_jax.data import embedded, load_records

DUMP = """
import json
from okd_jax.data import embedded
text = json.dumps([embedded.rows("train"), embedded.rows("eval")])
"""


@pytest.fixture(scope="module")
def parts():
  return {split: embedded.rows(split) for split in ("train", "eval")}


def test_there_is_enough(parts):
  assert len(parts["train"]) >= 2500


def test_rows_are_usable_records(parts):
  for split in parts:
    records = load_records(f"embedded:{split}")
    assert len(records) == len(parts[split])
  assert all(record.kind == "instruction" for record in records)


def test_rows_are_unique(parts):
  questions = [(r["instruction"], r["input"]) for p in parts.values() for r, _ in p]
  assert len(set(questions)) == len(questions)


def test_the_same_object_is_never_in_both_parts(parts):
  train, held_out = ({where for _, where in parts[split]} for split in parts)
  assert not train & held_out
  assert 0.03 < len(held_out) / (len(train) + len(held_out)) < 0.07
  # Nor does an answer to "what does it do" occur in both: methods share docstrings.
  train, held_out = (
    {row["output"] for row, _ in parts[split] if row["instruction"].startswith("What")}
    for split in parts
  )
  assert not train & held_out


def test_answers_are_short(parts):
  words = [len(row["output"].split()) for row, _ in parts["train"]]
  assert min(words) >= 1 and max(words) <= 60
  assert sum(count < 40 for count in words) > 0.9 * len(words)


def test_kinds_of_rows(parts):
  rows = [row for part in parts.values() for row, _ in part]
  assert sum(bool(row["input"]) for row in rows) > 500
  # Rows of one object that every Python documents alike.
  split = [
    row for part in parts.values() for row, w in part if w.endswith(":str.split")
  ]
  asked = {row["instruction"]: row for row in split}
  assert any(
    row["output"].startswith("Return a list of the substrings") for row in split
  )
  assert any(row["output"] == "str.split" and row["input"] for row in split)
  assert "str.split(self, /, sep=None, maxsplit=-1)" in {r["output"] for r in split}
  assert "sep, maxsplit" in {row["output"] for row in split}
  assert len(asked) == 4
  assert any(row["instruction"] == 'Explain the Python topic "truth".' for row in rows)


def test_nothing_depends_on_the_machine(parts):
  text = json.dumps([row for part in parts.values() for row, _ in part])
  assert " at 0x" not in text
  assert os.path.expanduser("~") not in text
  assert not re.search(r"/(home|root|Users|usr)/", text)
  assert "site-packages" not in text


def test_the_first_rows_are_a_mixture(parts):
  modules = {where.split(".")[0] for _, where in parts["train"][:200]}
  assert len(modules) > 30


def test_same_text_in_every_process():
  """Also here, where a test runner, and perhaps torch, have patched the library."""
  elsewhere = subprocess.run(
    [sys.executable, "-W", "error", "-c", f"{DUMP}print(text)"],
    env=os.environ | {"PYTHONHASHSEED": "1"},
    stdout=subprocess.PIPE,
    check=True,
    text=True,
  )
  importlib.import_module("transformers")
  scope = {}
  exec(DUMP, scope)
  assert elsewhere.stdout.rstrip("\n") == scope["text"]
