"""Workdirs on a store: the copy here, the store there, and who is right."""

import json
import shutil

import fsspec
import pytest
from commands import QUICK, same_folder

from okd_jax import main
from okd_jax.errors import UserError
from okd_jax.models import load
from okd_jax.run import checkpoint
from okd_jax.runtime import mirror

URL = "memory://bucket/run"


@pytest.fixture
def store(tmp_path, monkeypatch):
  """An empty store, and an empty home."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  system = fsspec.filesystem("memory")
  system.store.clear()
  system.pseudo_dirs[:] = [""]
  yield system
  system.store.clear()


def names(system):
  return sorted(
    path.removeprefix("/bucket/run/") for path in system.find("/bucket/run")
  )


def elsewhere(tmp_path):
  """Another machine: its copy of everything is gone."""
  shutil.rmtree(tmp_path / "cache", ignore_errors=True)


def test_what_is_written_goes_up_and_what_is_removed_goes(store, tmp_path):
  with mirror.opened(URL) as folder:
    (folder / "a.txt").write_text("one")
    (folder / "deep").mkdir()
    (folder / "deep/b.txt").write_text("two")
    (folder / ".a.tmp").write_text("torn")
    (folder / "checkpoints/3.orbax-checkpoint-tmp").mkdir(parents=True)
    (folder / "checkpoints/3.orbax-checkpoint-tmp/x").write_text("half")
    mirror.push()
    assert names(store) == ["a.txt", "deep/b.txt"]
    (folder / "a.txt").unlink()
    (folder / "deep/b.txt").write_text("three")
  assert names(store) == ["deep/b.txt"]
  elsewhere(tmp_path)
  with mirror.opened(URL) as folder:
    assert (folder / "deep/b.txt").read_text() == "three"
  assert not mirror._open


def test_at_the_start_the_store_is_right(store):
  """Guards a copy with what a killed run never put there."""
  with mirror.opened(URL) as folder:
    (folder / "a.txt").write_text("one")
    (folder / "b.txt").write_text("two")
  (folder / "a.txt").write_text("a killed run's")
  (folder / "c.txt").write_text("a killed run's")
  store.pipe_file("/bucket/run/b.txt", b"another machine's")
  with mirror.opened(URL) as folder:
    found = {path.name: path.read_text() for path in folder.iterdir()}
  assert found == {"a.txt": "one", "b.txt": "another machine's"}


def test_what_others_write_comes_down_between_two_looks(store):
  with mirror.opened(URL) as folder:
    (folder / "mine.txt").write_text("new here")
    store.pipe_file("/bucket/run/theirs.txt", b"new there")
    mirror.pull()
    assert (folder / "theirs.txt").read_text() == "new there"
    assert (folder / "mine.txt").exists()
    mirror.push()
    store.rm_file("/bucket/run/theirs.txt")
    mirror.pull()
    assert not (folder / "theirs.txt").exists()
    store.rm_file("/bucket/run/mine.txt")
    with pytest.raises(UserError, match="memory://bucket/run is gone; what was in it"):
      mirror.pull()
    assert (folder / "mine.txt").exists()


def test_what_takes_a_place_is_there_before_the_old_goes(store, monkeypatch):
  """Guards checkpoint.keep=1: a network that fails leaves one whole checkpoint."""
  with mirror.opened(URL) as folder:
    (folder / "checkpoints/2").mkdir(parents=True)
    (folder / "checkpoints/2/_CHECKPOINT_METADATA").write_text("{}")
    mirror.push()
    shutil.move(folder / "checkpoints/2", folder / "checkpoints/4")

    def fails(self, here, there):
      raise OSError("no network")

    with monkeypatch.context() as patch:
      patch.setattr(type(store), "put_file", fails)
      with pytest.raises(OSError, match="no network"):
        mirror.push()
    assert names(store) == ["checkpoints/2/_CHECKPOINT_METADATA"]
  assert names(store) == ["checkpoints/4/_CHECKPOINT_METADATA"]


def test_readers_and_second_runs_leave_a_run_alone(store):
  with mirror.opened(URL) as folder:
    (folder / "a.txt").write_text("one")
    mirror.push()
    (folder / "metrics.jsonl").write_text("not there yet")
    other = mirror.fetched(URL)
    assert other != folder and [p.name for p in other.iterdir()] == ["a.txt"]
    assert (folder / "metrics.jsonl").exists()
    with pytest.raises(UserError, match="another run of this machine works in it"):
      with mirror.opened(URL):
        raise AssertionError("two runs in one copy")


def test_nothing_goes_up_twice(store, monkeypatch):
  sent = []
  put = store.put_file
  monkeypatch.setattr(
    type(store),
    "put_file",
    lambda self, here, there: sent.append(there) or put(here, there),
  )
  with mirror.opened(URL) as folder:
    (folder / "a.txt").write_text("one")
    mirror.push()
    mirror.push()
  assert len(sent) == 1
  with mirror.opened(URL):
    pass
  assert len(sent) == 1


def test_a_file_url_is_the_folder_itself(tmp_path):
  with mirror.opened(f"file://{tmp_path}/run") as folder:
    assert folder == tmp_path / "run"
  with mirror.opened(str(tmp_path / "run")) as folder:
    assert folder == tmp_path / "run"


def test_checkpoints_on_gs_are_orbaxs_own(monkeypatch, store):
  """Its path there is told to Orbax, and nothing of it is copied."""
  monkeypatch.setattr(mirror.fsspec, "url_to_fs", lambda url: (store, "/bucket/run"))
  store.pipe_file("/bucket/run/checkpoints/4/_CHECKPOINT_METADATA", b"{}")
  store.pipe_file("/bucket/run/config.json", b"{}")
  with mirror.opened("gs://bucket/run") as folder:
    place = mirror.checkpoints_of(folder)
    stage = mirror.checkpoints_of(folder / "stages/sft")
    assert [path.name for path in folder.iterdir()] == ["config.json"]
  assert str(place) == "gs://bucket/run/checkpoints"
  assert str(stage) == "gs://bucket/run/stages/sft/checkpoints"
  assert isinstance(place, checkpoint.Place)


def test_a_store_that_nobody_can_open(store):
  with pytest.raises(UserError, match="nosuch://x/run: cannot be opened"):
    mirror.Mirror("nosuch://x/run")


def test_a_model_that_is_not_there(store):
  with pytest.raises(UserError, match="memory://bucket/run: there is no such folder"):
    load(URL)


@pytest.mark.slow
def test_a_run_goes_on_on_another_machine(store, tmp_path, monkeypatch):
  """Guards L: stopped by a fault after step 4, with no copy left, to the same bytes."""
  changes = ["--config=configs/debug.py", *QUICK, "--config.data.num_proc=1"]
  whole = tmp_path / "whole"
  main.main([*changes, f"--workdir={whole}"])
  save = checkpoint.Checkpoints.save

  def fails(self, step, *rest):
    if step == 6:
      raise OSError("the machine is gone")
    save(self, step, *rest)
    self.wait()

  monkeypatch.setattr(checkpoint.Checkpoints, "save", fails)
  with pytest.raises(OSError, match="machine is gone"):
    main.main([*changes, f"--workdir={URL}"])
  monkeypatch.setattr(checkpoint.Checkpoints, "save", save)
  assert any(name.startswith("checkpoints/4/") for name in names(store))
  elsewhere(tmp_path)
  main.main([*changes, f"--workdir={URL}"])
  assert {"report.html", "student/model.safetensors"} <= set(names(store))
  elsewhere(tmp_path)
  found = mirror.fetched(URL)
  for kind in ("student", "adapter"):
    assert same_folder(whole / kind, found / kind)
  rows = [
    [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
    for place in (whole, found)
  ]
  losses = [
    {r["step"]: r["loss"] for r in part if r["kind"] == "train"} for part in rows
  ]
  assert losses[0] == losses[1]
  assert load(URL).config == load(whole).config
