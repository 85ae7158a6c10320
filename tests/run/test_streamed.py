"""Runs whose data is a stream: what they refuse, and that a kill costs nothing."""

import json
import shutil
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from commands import ROOT, call, command, environment, losses, rows, same_folder
from small import built, config

from okd_jax.data import stream
from okd_jax.errors import UserError


def corpus(folder, shards=3, texts=40):
  """Sharded texts of all lengths, and one file of them to evaluate with."""
  folder.mkdir(exist_ok=True)
  for shard in range(shards):
    lines = [
      json.dumps({"text": f"{shard} {i} " + "word " * (i * 7 % 50)})
      for i in range(texts)
    ]
    (folder / f"{shard}.jsonl").write_text("\n".join(lines) + "\n")
  (folder / "eval.txt").write_text("words to evaluate with")
  return {
    "data.train": f"{folder}/*.jsonl",
    "data.eval": f"{folder}/eval.txt",
    "data.stream": True,
  }


def test_a_run_reads_its_rows_from_the_stream(tmp_path):
  run = built(config(**corpus(tmp_path)), tmp_path / "w")
  assert run.plan.steps == 4 and run.data.kinds == {"text"}
  batch = next(run.data.stream)
  assert batch["tokens"].shape == (8, 96) and batch["segment_ids"].max() > 1
  assert "jsonl:" in run.data.where(batch["row"])
  assert len(run.data.eval) == 1 and run.data.train[0].where.endswith(":1")
  assert run.data.packs[7] == (7,)


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"train.steps": 0}, "set train.steps"),
    ({"data.eval": ""}, "set data.eval"),
    ({"method.name": "gkd"}, "gkd answers prompts"),
    ({"method.name": "seqkd"}, "seqkd answers prompts"),
    ({"method.name": "mixkd"}, "mixkd looks at rows as wholes"),
    ({"teacher.cache": "c"}, "teacher.cache keeps rows by number"),
    ({"teacher.trunk": "memory"}, "teacher.trunk keeps rows by number"),
    ({"data.prepared": "p"}, "data.prepared=p is read in place of data.train"),
    ({"data.tokenizer": "bpe:300"}, "bpe:300 would read the whole corpus"),
    ({"method.cross_tokenizer": "uld"}, "method.cross_tokenizer pairs answers"),
  ],
)
def test_what_needs_rows_by_number_is_refused(changes, message, tmp_path):
  with pytest.raises(UserError, match=message):
    built(config(**corpus(tmp_path) | changes), tmp_path / "w")


def test_a_narrow_student_is_chosen_by_the_first_rows(tmp_path, monkeypatch):
  monkeypatch.setattr(stream, "BLOCK", 8)
  changes = {"student.model.hidden_size": 0, "student.width": 0.5}
  run = built(config(**corpus(tmp_path) | changes), tmp_path / "w")
  assert run.cast.kept is not None


FLAGS = ["--config=configs/debug.py", "--config.method.name=kd"]
FLAGS += ["--config.train.steps=6", "--config.checkpoint.every=2"]
FLAGS += ["--config.eval.every=3", "--config.data.max_length=48"]
FLAGS += ["--config.data.max_prompt_length=40", "--config.train.log_every=1"]


def train(folder, workdir):
  changes = [f"--config.{k}={v}" for k, v in corpus(folder).items()]
  return [*FLAGS, *changes, f"--workdir={workdir}"]


@pytest.mark.slow
def test_killed_and_resumed_is_bit_identical(tmp_path):
  whole, cut = tmp_path / "whole", tmp_path / "cut"
  call("main", *train(tmp_path / "data", whole))
  process = subprocess.Popen(
    command("main", *train(tmp_path / "data", cut)),
    cwd=ROOT,
    env=environment(),
    stderr=subprocess.DEVNULL,
    stdout=subprocess.DEVNULL,
  )
  deadline = time.monotonic() + 200
  while not (cut / "checkpoints" / "2").exists():
    assert process.poll() is None and time.monotonic() < deadline
    time.sleep(0.01)
  process.kill()
  process.wait()
  done = call("main", *train(tmp_path / "data", cut))
  assert "resuming at step" in done.stderr
  assert losses(whole) == losses(cut) and len(losses(cut)) == 6
  assert same_folder(whole / "student", cut / "student")
  about = json.loads((whole / "about.json").read_text())
  assert about["data"]["train"]["shards"] == 3
  assert "a stream of 3 shards" in (whole / "report.html").read_text()
  assert np.isfinite([row["loss"] for row in rows(cut, "eval")]).all()
  longer = [*train(tmp_path / "data", cut), "--config.train.steps=8"]
  (tmp_path / "data" / "0.jsonl").write_text('{"text": "another"}\n')
  refused = call("main", *longer, status=2).stderr
  assert "data.train: not as when the run" in refused


def together(*arguments):
  """The command as two processes."""
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    port = probe.getsockname()[1]
  script = f"""
import runpy, sys
import jax
number = int(sys.argv.pop(1))
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize("localhost:{port}", 2, number)
runpy.run_module("okd_jax.main", run_name="__main__")
"""
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", script, str(number), *arguments],
      cwd=ROOT,
      env=environment(),
      stdout=subprocess.DEVNULL,
      stderr=subprocess.PIPE,
      text=True,
    )
    for number in range(2)
  ]
  said = [process.communicate(timeout=300)[1] for process in processes]
  assert not any(p.returncode for p in processes), said[0][-2000:] + said[1][-2000:]
  return said[0]


@pytest.mark.slow
def test_two_processes_train_as_one_and_go_on(tmp_path):
  one, two = tmp_path / "one", tmp_path / "two"
  call("main", *train(tmp_path / "data", one))
  together(*train(tmp_path / "data", two))
  whole = losses(two)
  np.testing.assert_allclose(
    list(whole.values()), list(losses(one).values()), rtol=1e-4
  )
  for name in ("checkpoints/6", "student"):
    shutil.rmtree(two / name)
  (two / "report.html").unlink()
  assert "resuming at step 4" in together(*train(tmp_path / "data", two))
  assert losses(two) == whole
