"""What a report says of sizes, data, machines and cost, and the answers it shows."""

import pytest
from reporting import (
  ABOUT,
  ANSWERS,
  COST,
  VERSIONS,
  Page,
  keep,
  page,
  run,
  whole_run,
)

from okd_jax.analysis import facts, plots


@pytest.fixture
def no_charts(monkeypatch):
  monkeypatch.setattr(plots, "charts", lambda history: [])


def test_sizes_in_sentences():
  assert facts.sizes(ABOUT) == [
    "The student has 40 million parameters (gpt2, 4 layers × 256).",
    "Its teacher has 160 million parameters (gpt2, 12 layers × 768), 4 times as many; "
    "beside it learns a module of 1.6 million, 1 % of that.",
  ]
  teacher = ABOUT["models"]["teachers"]["teacher"]
  two = {"old": teacher, "new": {k: v for k, v in teacher.items() if k != "module"}}
  models = ABOUT["models"] | {"teachers": two}
  _, old, new = facts.sizes({"models": models})
  assert old.startswith("Teacher old has") and "module" in old
  assert new.startswith("Teacher new has") and "module" not in new
  assert len(facts.sizes({"models": models | {"teachers": {}}})) == 1
  assert facts.sizes({}) == []


@pytest.mark.parametrize("exported", [10, 20])
def test_answers_stand_side_by_side(tmp_path, exported):
  rows = whole_run()
  rows[-1]["exported_step"] = exported
  history = plots.read_history(run(tmp_path, rows))
  first, second = facts.sample_answers(ANSWERS, history)
  assert first.prompt == "What is <b>?"
  assert first.said == [
    ("reference", "bold / a tag"),
    ("teacher", "bold\n text"),
    ("student, start", "��"),
    (f"student, step {exported}", "half" if exported == 10 else "<b>"),
  ]
  said = dict(second.said)
  assert said["teacher"] == "y" * 1500 + " … (500 more characters)"
  assert said["student, start"] == ""


def test_a_row_that_a_teacher_did_not_answer(tmp_path):
  """Of teachers with other tokens, in which a row may not fit."""
  history = plots.read_history(run(tmp_path, whole_run()))
  teachers = {"big": [None, "b"], "old": ["c", "d"]}
  first, second = facts.sample_answers(ANSWERS | {"teachers": teachers}, history)
  assert [who for who, _ in first.said][1:2] == ["teacher old"]
  assert [who for who, _ in second.said][1:3] == ["teacher big", "teacher old"]
  nobody = ANSWERS | {"teachers": {}, "student": {}}
  assert (
    facts.sample_answers(nobody, history) == facts.sample_answers({}, history) == []
  )


def test_the_page_says_it_all(tmp_path, no_charts):
  text = page(keep(run(tmp_path, whole_run())))
  words = " ".join(text.split())
  for wanted in (
    "40 million parameters",
    "11,435, digest 0123456789abcdef",
    "500 rows, digest fedcba9876543210; 64 of their prompts were answered",
    "1:02:05 (h:m:s) in all",
    "2.35 GB of the process",
    "1 × cpu, 2 CPU cores",
    "python 3.12.1, jax 0.12.0",
    "What is &lt;b&gt;?",
    "Sample answers",
  ):
    assert wanted in words, wanted
  assert "\x00" not in text and Page(text).open == []
  assert text == page(tmp_path)  # the same run, the same bytes


POD = {"device": "TPU v5e", "devices": 16, "processes": 4, "cpus": 112}
HISTORY = plots.History({}, {}, {}, None, {})
CONFIG = {"train": {"steps": 0, "batch_size": 8}}


def test_a_run_that_moved_names_both_machines():
  moved = [*ABOUT["parts"], {"step": 300, "machine": POD, "versions": VERSIONS}]
  found = facts.facts(HISTORY, CONFIG, ABOUT | {"parts": moved}, COST)
  pod = "from step 300 on 16 × TPU v5e, 112 CPU cores a process, 4 processes"
  assert found["machine"] == f"1 × cpu, 2 CPU cores; {pod}"
  assert "command" not in found and "commit" not in found["versions"]  # an old run's


def test_a_run_says_how_it_was_made():
  part = ABOUT["parts"][0] | {"commit": "abc-dirty", "command": "python -m x '--a=b c'"}
  found = facts.facts(HISTORY, CONFIG, ABOUT | {"parts": [part]}, COST)
  assert found["versions"].endswith("jax 0.12.0, commit abc-dirty")
  assert found["command"] == "python -m x '--a=b c'"


def test_stages_are_linked_both_ways(tmp_path, no_charts):
  whole = run(tmp_path / "whole", whole_run())
  (whole / "stages").mkdir()
  stage = run(whole / "stages" / "teacher", whole_run())
  assert ("a", {"href": "../../report.html"}) in Page(page(stage)).elements
  assert ("a", {"href": "stages/teacher/report.html"}) in Page(page(whole)).elements
