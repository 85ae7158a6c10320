"""A study's recipe: its arms, seeds and folders, and what is refused."""

import re

import pytest

from configs.studies import scarce
from okd_jax.config import study as studies
from okd_jax.errors import UserError

RECIPE = """
from configs import quickstart
get_config = quickstart.get_config
def get_study():
  return {study}
"""


@pytest.fixture
def recipe(tmp_path):
  """Writes a recipe with these keywords of a study; returns its path."""

  def write(**study):
    path = tmp_path / "mine.py"
    path.write_text(RECIPE.format(study=repr(study)))
    return str(path)

  return write


ARMS = {
  "kd": {"method.name": "kd"},
  "okd": {"method.name": "okd", "optim.lr": 5e-4},
}


def test_the_jobs_are_the_stages_and_then_every_arm_seed_by_seed(recipe, tmp_path):
  study = studies.load(recipe(arms=ARMS, seeds=2), ["--config.train.batch_size=4"])
  jobs = studies.jobs(study, tmp_path / "out")
  names = ["stage:teacher", "stage:start", "kd:0", "okd:0", "kd:1", "okd:1"]
  assert [job.name for job in jobs] == names
  assert [job.arm for job in jobs] == ["", "", "kd", "okd", "kd", "okd"]
  last = jobs[-1]
  assert last.workdir == tmp_path / "out" / "runs" / "okd" / "1" and last.seed == 1
  assert last.config.train.seed == 1 and last.config.optim.lr == 5e-4
  assert last.config.train.batch_size == 4 == jobs[0].config.train.batch_size
  # Shared once: every run begins with the same teacher and the same start.
  teachers = {job.config.teacher.path for job in jobs if job.arm}
  assert teachers == {str(tmp_path / "out" / "stages" / "teacher")}


def test_a_judge_is_a_model_or_a_stage(recipe, tmp_path):
  for given, want in (("stage:start", tmp_path / "stages" / "start"), ("gpt2", "gpt2")):
    *_, last = studies.jobs(studies.load(recipe(arms=ARMS, judge=given), []), tmp_path)
    assert last.judge == str(want)
  with pytest.raises(UserError, match="judge='stage:nobody', but the stages are"):
    studies.jobs(studies.load(recipe(arms=ARMS, judge="stage:nobody"), []), tmp_path)


def test_an_arm_may_have_any_name_but_no_folder_s(recipe):
  studies.load(recipe(arms=ARMS | {"okd, alpha 0.5": {}}), [])
  for name in ("a/b", "../up", "a:b", ".hidden"):
    with pytest.raises(UserError, match="cannot name a folder"):
      studies.load(recipe(arms=ARMS | {name: {}}), [])


@pytest.mark.parametrize(
  "wrong, message",
  [
    ({"arms": {}}, "it needs an arm and a seed"),
    ({"arms": ARMS, "seeds": 0}, "it needs an arm and a seed"),
    ({"arms": ARMS, "baseline": "sft"}, "baseline 'sft' is none of kd, okd"),
    ({"arms": ARMS, "unit": "gkd"}, "unit 'gkd' is none of kd, okd"),
    ({"arms": ARMS, "protocol": {"batch_size": 0}}, "--batch_size=0"),
  ],
)
def test_what_is_refused(recipe, wrong, message):
  with pytest.raises(UserError, match=re.escape(message)):
    studies.load(recipe(**wrong), [])


def test_an_unknown_key_of_an_arm_is_named_with_the_arm(recipe, tmp_path):
  study = studies.load(recipe(arms=ARMS | {"typo": {"method.nmae": "kd"}}), [])
  with pytest.raises(UserError, match="arm typo: .*method.nmae"):
    studies.jobs(study, tmp_path)


def test_a_run_s_recipe_is_no_study():
  with pytest.raises(UserError, match="has no get_study"):
    studies.load("quickstart", [])


def test_some_arms_and_seeds_of_a_study():
  study = studies.load("studies/scarce", [])
  some = studies.select(study, "gkd, gold; okd", 2)
  assert list(some.arms) == ["gkd, gold", "okd"] and some.seeds == 2
  assert (some.baseline, some.unit) == ("gkd, gold", "okd")
  assert studies.select(study, "", 0) == study
  with pytest.raises(UserError, match="--arms: 'gkd,gold' is none of"):
    studies.select(study, "gkd,gold", 0)


def test_windows_leave_out_no_text_and_share_none():
  model = scarce.SHARED / "models" / "stories260K"
  if not model.exists():
    pytest.skip("needs ../shared")
  text = "First, you know Caius Marcius is chief enemy to the people.\n" * 40
  rows = scarce.windows(text, str(model))
  again = [row["prompt"] + row["completion"] for row in rows]
  assert len(rows) > 5 and all(text[:40] in again[0] for _ in again)
  at = 0
  for row, following in zip(again, again[1:], strict=False):
    assert text.startswith(row, at)  # each goes on into the next one
    at += row.index(following[:80], 1)


def test_the_held_out_windows_are_not_trained_on(monkeypatch, tmp_path):
  monkeypatch.setattr(
    scarce, "windows", lambda *_: [{"prompt": str(i)} for i in range(7000)]
  )
  (tmp_path / "text.txt").write_text("")
  scarce.main([f"--output={tmp_path}", f"--text={tmp_path / 'text.txt'}"])
  parts = {
    name: (tmp_path / f"{name}.jsonl").read_text().splitlines()
    for name in ("scarce", "plenty", "eval")
  }
  assert {name: len(rows) for name, rows in parts.items()} == {
    "scarce": 579,
    "plenty": 5790,
    "eval": 256,
  }
  assert set(parts["scarce"]) <= set(parts["plenty"])
  assert not set(parts["plenty"]) & set(parts["eval"])
