"""Prompts without answers: data for every method that writes its own."""

import json

import jax
import numpy as np
import pytest
from commands import QUICK, call, losses, rows, same_folder
from small import built, config

from okd_jax import METHODS
from okd_jax.data import train_loader
from okd_jax.errors import UserError
from okd_jax.run import beforehand
from okd_jax.run.batches import Batches
from okd_jax.runtime.workdir import Workdir

WRITERS = {
  "gkd": {"method.sampled_share": 1.0},
  "imitkd": {"method.sampled_share": 1.0},
  "skd": {"method.sampled_share": 1.0},
  "minillm": {},
  "promptkd": {},
  "seqkd": {},
  "fdistill": {},
  "distillm2": {},
}
SHAPE = {
  "data.max_length": 32,
  "data.max_prompt_length": 16,
  "data.holdout": 4,
  "train.steps": 3,
  "eval.batch_size": 4,
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  path = tmp_path_factory.mktemp("data") / "prompts.jsonl"
  path.write_text(
    "".join(json.dumps({"prompt": f"{i} + 1 ="}) + "\n" for i in range(24))
  )
  return str(path)


def alone(source, **changes):
  return config(**SHAPE | {"data.train": source} | changes)


@pytest.mark.parametrize(
  "name",
  [
    pytest.param(
      name, marks=[] if name in {"gkd", "distillm2", "okd"} else [pytest.mark.slow]
    )
    for name in sorted(METHODS)
  ],
)
def test_who_writes_takes_prompts_alone_and_nobody_else(name, source, tmp_path):
  changes = {"method.name": name} | WRITERS.get(name, {})
  if name in WRITERS:
    run = built(alone(source, **changes), tmp_path)
    assert all(example.bare for example in run.data.train)
  else:
    with pytest.raises(UserError, match="prompts.jsonl:1: key 'completion' is missing"):
      built(alone(source, **changes), tmp_path)


@pytest.mark.parametrize(
  "changes", [{"method.sampled_share": 0.5}, {"method.gold_weight": 0.1}]
)
def test_a_method_that_also_reads_answers_needs_them(changes, source, tmp_path):
  changes = {"method.name": "gkd", "method.sampled_share": 1.0} | changes
  with pytest.raises(UserError, match="key 'completion' is missing"):
    built(alone(source, **changes), tmp_path)


def test_held_out_prompts_are_answered_by_the_teacher(source, tmp_path):
  """Greedily, once; the answers are read again."""
  changes = {"method.name": "gkd", "method.sampled_share": 1.0}
  run = built(alone(source, **changes), tmp_path)
  assert all(example.bare for example in run.data.eval)
  with jax.set_mesh(run.mesh):
    found = beforehand.with_answers(run, Workdir(tmp_path))
    again = beforehand.with_answers(run, Workdir(tmp_path))
  assert run.data.eval[0].bare and not any(e.bare for e in found.data.eval)
  for one, two, asked in zip(
    found.data.eval, again.data.eval, run.data.eval, strict=True
  ):
    assert np.array_equal(one.tokens, two.tokens) and len(one.references) == 1
    assert np.array_equal(one.prompt, asked.prompt) and len(one.response) > 0
  assert (tmp_path / "samples" / "held_out.jsonl").exists()


@pytest.mark.parametrize("name", ["gkd", pytest.param("seqkd", marks=pytest.mark.slow)])
def test_what_is_trained_are_the_sampled_answers(name, source, tmp_path):
  run = built(alone(source, **{"method.name": name} | WRITERS[name]), tmp_path)
  with jax.set_mesh(run.mesh):
    answers = beforehand.answers(run, Workdir(tmp_path))
    loader = train_loader(run.data.train, batch_size=8, length=32, pad_id=0, seed=0)
    batch, _ = Batches(run, answers).batch(0, run.init().params, next(loader))
  mask = np.asarray(batch.mask)
  assert mask.any(axis=1).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gkd", "minillm", "distillm2"])
def test_a_whole_run(name, source, tmp_path):
  """By the command; killed after a checkpoint it ends as the undisturbed one."""
  flags = [f"--config.method.name={name}", f"--config.data.train={source}"]
  flags += [f"--config.{key}={value}" for key, value in WRITERS[name].items()]
  base = ["--config=configs/debug.py", *QUICK, *flags, "--config.data.holdout=4"]
  base += ["--config.optim.schedule=constant"]
  whole, cut = tmp_path / "whole", tmp_path / "cut"
  call("main", *base, f"--workdir={whole}")
  call("main", *base, f"--workdir={cut}", "--config.train.steps=4")
  call("main", *base, f"--workdir={cut}")
  assert losses(whole) == losses(cut) and same_folder(
    whole / "student", cut / "student"
  )
  assert {"loss", "forward_kl", "rougeL"} <= set(rows(whole, "eval")[-1])
