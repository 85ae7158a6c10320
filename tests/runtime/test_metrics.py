"""metrics.jsonl, TensorBoard and W&B: what is written, and that it is kept."""

import json
import sys
from types import SimpleNamespace

import pytest

from okd_jax.errors import UserError
from okd_jax.runtime import metrics


def open_writer(workdir, step=0, *, tensorboard=False, wandb="", config=None):
  workdir.mkdir(parents=True, exist_ok=True)
  return metrics.Writer(
    workdir, step, tensorboard=tensorboard, wandb=wandb, config=config or {}
  )


def rows(workdir):
  return [
    json.loads(line)
    for line in (workdir / "metrics.jsonl").read_text().split("\n")[:-1]
  ]


def test_rows_and_what_a_resumed_run_drops(tmp_path):
  writer = open_writer(tmp_path)
  for step in (1, 2, 3):
    writer.write(step, "train", {"loss": step / 2})
  writer.write(3, "train", {"loss": float("nan")})
  writer.close()
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"step": 4, "ki')  # a kill in the middle of a line
  open_writer(tmp_path, 2).close()
  assert rows(tmp_path) == [
    {"step": 1, "kind": "train", "loss": 0.5},
    {"step": 2, "kind": "train", "loss": 1.0},
  ]


def test_another_process_reads_and_writes_nothing(tmp_path, monkeypatch):
  writer = open_writer(tmp_path)
  writer.write(1, "train", {"loss": 0.5})
  writer.close()
  before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
  monkeypatch.setattr("jax.process_index", lambda: 1)
  writer = open_writer(tmp_path, 1, tensorboard=True, wandb="project")
  writer.write(2, "train", {"loss": 0.25})
  writer.close()
  assert writer.kept == [{"step": 1, "kind": "train", "loss": 0.5}]
  assert before == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}


def test_not_finite_is_null(tmp_path):
  writer = open_writer(tmp_path)
  writer.write(1, "train", {"loss": float("inf"), "lr": 0.0})
  writer.close()
  assert rows(tmp_path) == [{"step": 1, "kind": "train", "loss": None, "lr": 0.0}]


def test_rows_of_several_have_names(tmp_path):
  writer = open_writer(tmp_path)
  writer.write(0, "teacher", {"loss": 1.0}, name="big")
  writer.write(0, "teacher", {"loss": 2.0})
  writer.close()
  assert rows(tmp_path) == [
    {"step": 0, "kind": "teacher", "name": "big", "loss": 1.0},
    {"step": 0, "kind": "teacher", "loss": 2.0},
  ]


class Wandb:
  """The calls that W&B would have had."""

  def __init__(self):
    self.begun, self.logged, self.finished = [], [], 0

  def init(self, **options):
    self.begun.append(options)
    return self

  def log(self, values, step):
    self.logged.append((step, values))

  def finish(self):
    self.finished += 1


@pytest.fixture
def wandb(monkeypatch):
  fake = Wandb()
  monkeypatch.setitem(sys.modules, "wandb", fake)
  return fake


def test_wandb_gets_the_configuration_and_is_finished(tmp_path, wandb):
  """It once had neither: a run without settings, its last rows lost."""
  config = {"method": {"name": "okd"}}
  writer = open_writer(tmp_path, wandb="project", config=config)
  writer.write(3, "eval", {"loss": 1.0, "perplexity": float("inf")})
  writer.write(0, "teacher", {"loss": 2.0}, name="big")
  assert not wandb.finished
  writer.close()
  assert wandb.finished == 1
  (options,) = wandb.begun
  assert options["project"] == "project" and options["config"] == config
  assert options["dir"] == str(tmp_path) and options["resume"] == "allow"
  assert wandb.logged == [(3, {"eval/loss": 1.0}), (0, {"teacher/big/loss": 2.0})]


def test_wandb_keeps_runs_apart(tmp_path, wandb, monkeypatch):
  """Every recipe's stages are called alike; with one id they would be one run."""
  folders = ["one", "one/stages/teacher", "two/stages/teacher", "odd name/ü?:#"]
  for folder in folders:
    open_writer(tmp_path / folder, wandb="project").close()
  ids = [options["id"] for options in wandb.begun]
  assert len(set(ids)) == len(folders)
  assert all(set("/\\#?%: ").isdisjoint(name) and len(name) <= 64 for name in ids)
  assert [name.rpartition("-")[0] for name in ids[:3]] == ["one", "teacher", "teacher"]
  names = [options["name"] for options in wandb.begun]
  assert names == ["one", "one/teacher", "two/teacher", "ü?:#"]
  monkeypatch.chdir(tmp_path / "one")  # the same run from somewhere else
  open_writer((tmp_path / "one").relative_to(tmp_path / "one"), wandb="project").close()
  assert (wandb.begun[-1]["id"], wandb.begun[-1]["name"]) == (ids[0], "one")


def test_tensorboard_is_closed(tmp_path, monkeypatch):
  calls = []
  sink = SimpleNamespace(
    add_scalar=lambda *call: calls.append(call), close=lambda: calls.append("closed")
  )
  module = SimpleNamespace(SummaryWriter=lambda folder: calls.append(folder) or sink)
  monkeypatch.setitem(sys.modules, "tensorboardX", module)
  writer = open_writer(tmp_path, tensorboard=True)
  writer.write(1, "train", {"loss": 1.5, "lr": float("nan")})
  writer.close()
  folder = str(tmp_path / "tensorboard")
  assert calls == [folder, ("train/loss", 1.5, 1), "closed"]


@pytest.mark.parametrize(
  "extra, module, wanted",
  [("tensorboard", "tensorboardX", True), ("wandb", "wandb", "project")],
)
def test_what_is_not_installed_is_named(tmp_path, monkeypatch, extra, module, wanted):
  monkeypatch.setitem(sys.modules, module, None)
  with pytest.raises(UserError, match=rf"train.{extra} needs .*okd-jax\[{extra}\]"):
    open_writer(tmp_path, **{extra: wanted})
  assert not (tmp_path / "metrics.jsonl").exists()  # what was there would be, too


@pytest.mark.parametrize(
  "garbage", [b"\x00\xff", b"{", b"[]", b"5", b'{"step": "x"}', b""]
)
def test_garbage_in_the_middle_is_told_and_no_row_dropped(garbage, tmp_path):
  row = b'{"step": 1, "kind": "train"}\n'
  path = tmp_path / "metrics.jsonl"
  path.write_bytes(row + garbage + b"\n" + row)
  with pytest.raises(UserError, match="metrics.jsonl, line 2: no row of figures"):
    metrics.read(tmp_path)
  path.write_bytes(row + row + garbage)  # what a kill has left
  assert len(metrics.read(tmp_path)) == 2
