"""The command `prepare`, and runs that read what it wrote."""

import shutil

import pytest
from commands import QUICK, call
from small import built, config

from okd_jax import prepare
from okd_jax.config import read
from okd_jax.data import rows
from okd_jax.errors import UserError
from okd_jax.run import build
from okd_jax.runtime.workdir import Workdir

FLAGS = ["--config=configs/debug.py", "--config.method.name=sft", *QUICK]


def made(output, *flags):
  prepare.main([*FLAGS, *flags, f"--output={output}"])
  return str(output)


def test_a_run_trains_on_the_very_rows(tmp_path, capsys):
  """And data.train need not be there."""
  flags = ["--config.data.train=embedded:eval", "--config.data.holdout=8"]
  output = made(tmp_path / "p", *flags)
  assert "train: written" in capsys.readouterr().out
  made(output, *flags)
  assert "train: is there already" in capsys.readouterr().out
  base = read.parsed(read.load_recipe("configs/debug.py"), [*FLAGS, *flags][1:])
  plain = built(base, tmp_path / "w")
  base.data.train, base.data.prepared = "nowhere.jsonl", output
  found = built(base, tmp_path / "v")
  for part in ("train", "eval"):
    one, other = (getattr(run.data, part) for run in (plain, found))
    assert len(one) and rows.digest(one) == rows.digest(other)


def test_held_out_rows_are_prepared_where_they_are_named(tmp_path):
  output = made(tmp_path / "p")  # embedded, of which embedded:eval is held out
  base = read.parsed(read.load_recipe("configs/debug.py"), FLAGS[1:])
  base.data.prepared = output
  run = built(base, tmp_path / "w")
  own = rows.open_rows(f"{output}/eval")
  assert rows.digest(run.data.eval) == rows.digest(own[:8])


def test_a_tokenizer_that_was_trained_is_kept(tmp_path):
  flags = ["--config.data.tokenizer=bpe:300", "--config.data.train=embedded:eval"]
  output = made(tmp_path / "p", *flags)
  changes = {"data.prepared": output, "data.tokenizer": f"{output}/tokenizer"}
  base = read.parsed(read.load_recipe("configs/debug.py"), FLAGS[1:])
  base.update_from_flattened_dict(changes)
  assert built(base, tmp_path / "w").data.train
  base.data.tokenizer = "bpe:300"
  with pytest.raises(UserError, match="bpe:300 would be trained on data.train"):
    built(base, tmp_path / "v")


def test_two_tokenizers_are_refused(tmp_path):
  changes = {"method.cross_tokenizer": "uld", "method.kd_ratio": 0.6}
  changes |= {"student.model.hidden_size": 32, "data.tokenizer": "bytes"}
  changes |= {"data.prepared": "p"}
  with pytest.raises(UserError, match="data.prepared=p: under method.cross_tokenizer"):
    built(config(**changes), tmp_path)


@pytest.mark.slow
def test_a_finished_run_is_exported_without_them(tmp_path):
  output, workdir = made(tmp_path / "p"), tmp_path / "run"
  call("main", *FLAGS, f"--config.data.prepared={output}", f"--workdir={workdir}")
  shutil.rmtree(output)
  call("export", f"--workdir={workdir}", f"--output={tmp_path / 'student'}")
  assert (tmp_path / "student" / "config.json").exists()
  assert build.build_shapes(read.saved(workdir / "config.json"), Workdir(workdir))
