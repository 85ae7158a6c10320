"""The bugs that mutate.py plants still fit the code; planting them takes longer."""

import ast

import mutate
import pytest


@pytest.mark.parametrize("bug", mutate.BUGS, ids=[bug.what for bug in mutate.BUGS])
def test_every_bug_has_its_place(bug):
  text = (mutate.ROOT / bug.file).read_text(encoding="utf8")
  planted = mutate.plant(text, bug)
  assert planted != text
  ast.parse(planted)


def test_the_bugs_are_different():
  assert len({(bug.file, bug.old, bug.new) for bug in mutate.BUGS}) == len(mutate.BUGS)
  assert len({bug.what for bug in mutate.BUGS}) == len(mutate.BUGS)
