"""A run is finished where all is as it left it; the rest a checkpoint makes again."""

import pytest

from okd_jax.errors import UserError
from okd_jax.run import finished
from okd_jax.runtime.workdir import Workdir


@pytest.fixture
def workdir(tmp_path):
  """What a finished run has left, with a checkpoint."""
  own = Workdir(tmp_path)
  (tmp_path / "student").mkdir()
  (tmp_path / "checkpoints/4").mkdir(parents=True)
  for path in (own.report, own.metrics, own.student / "config.json", own.config):
    path.write_text("as it was")
  finished.write(own)
  return own


def test_all_is_there(workdir):
  assert finished.whole(workdir)
  (workdir.path / "notes.txt").write_text("somebody's own")
  (workdir.path / "checkpoints/4/x").write_text("")
  assert finished.whole(workdir)


@pytest.mark.parametrize(
  "name", ["student/config.json", "metrics.jsonl", "config.json"]
)
@pytest.mark.parametrize("content", [None, "as it wos"])
def test_what_is_not_is_told_and_made_again(name, content, workdir, caplog):
  path = workdir.path / name
  path.unlink() if content is None else path.write_text(content)
  assert not finished.whole(workdir)
  word = "gone" if content is None else "not as the run left it"
  assert f"{path} is {word}: it is made again" in caplog.text
  if "/" in name:  # nothing is lost, not even what somebody may have changed
    kept = workdir.path / "damaged-student" / "config.json"
    assert not workdir.student.exists() and kept.exists() == (content is not None)


@pytest.mark.parametrize("content", [None, "", "[]", "{", '{"files": 5}'])
def test_nobody_knows(content, workdir):
  if content is None:
    workdir.finished.unlink()
  else:
    workdir.finished.write_text(content)
  assert not finished.whole(workdir)


def test_without_its_report_no_run_is_finished(workdir):
  workdir.report.unlink()
  assert not finished.whole(workdir)


def test_without_a_checkpoint_nothing_can_be_made(workdir):
  (workdir.path / "checkpoints/4").rmdir()
  assert finished.whole(workdir)
  (workdir.student / "config.json").unlink()
  with pytest.raises(UserError, match="there is no checkpoint to make it from"):
    finished.whole(workdir)
  workdir.finished.unlink()  # of a run from before there were digests
  assert finished.whole(workdir)
