"""Stored teachers: at K = V the live one, below it a bound, and never another's."""

import json
import shutil

import chex
import jax
import numpy as np
import pytest
from commands import QUICK, call, losses, rows, train
from small import built, config, step_of

from okd_jax import METHODS, methods
from okd_jax.data import train_loader
from okd_jax.errors import UserError
from okd_jax.run.batches import Batches
from okd_jax.run.evaluator import Evaluator
from okd_jax.run.stored import write as write_store


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("stored")


@pytest.fixture(scope="module")
def live(folder):
  return built(config(), folder)


@pytest.fixture(scope="module")
def whole(live, folder):
  """The whole vocabulary, in float32."""
  write_store(live, folder / "whole", 0, "float32")
  return folder / "whole"


def steps(run, count=3):
  """(losses, the trained student) of the first steps."""
  loader = train_loader(run.data.train, batch_size=8, length=96, pad_id=0, seed=0)
  with jax.set_mesh(run.mesh):
    sampler, state = Batches(run, {}), run.init()
    step = step_of(run, 2)
    metrics = []
    for i in range(count):
      batch, _ = sampler.batch(i, state.params, next(loader))
      state, values = step(state, run.cast.frozen, batch)
      metrics.append(values)
  return metrics, state.params["student"]


@pytest.mark.parametrize("name", ["kd", pytest.param("srkl", marks=pytest.mark.slow)])
def test_the_whole_vocabulary_is_the_live_teacher(name, whole, folder):
  """Same losses, same student; the order of the vocabulary is all that differs."""
  wanted, student = steps(built(config(**{"method.name": name}), folder))
  stored = config(**{"method.name": name, "teacher.cache": str(whole)})
  run = built(stored, folder)
  assert not run.cast.frozen and not run.cast.teachers
  got, same = steps(run)
  shared = {k: v for k, v in wanted[-1].items() if k in got[-1]}
  assert {"loss", "forward_kl", "teacher_nll", "top1_agreement"} <= set(shared)
  chex.assert_trees_all_close(
    {k: got[-1][k] for k in shared}, shared, rtol=2e-5, atol=1e-6
  )
  # Adam divides by the gradient's size: where that is rounding, so is the step.
  chex.assert_trees_all_close(same, student, atol=2e-4)


def test_evaluation_is_that_beside_the_live_teacher(live, whole, folder):
  """The teacher's own loss, and a fresh student's distances to it on held-out rows."""
  run = built(config(**{"teacher.cache": str(whole)}), folder)
  found = []
  for each in (live, run):
    with jax.set_mesh(each.mesh):
      evaluator = Evaluator(each)
      found.append((evaluator(each.init().params), evaluator.teachers()["teacher"]))
  (wanted, teacher), (got, said) = found
  assert {"forward_kl", "reverse_kl", "top1_agreement", "teacher_loss"} < set(got)
  chex.assert_trees_all_close(got, {k: wanted[k] for k in got}, rtol=2e-5)
  chex.assert_trees_all_close(said, {k: teacher[k] for k in said}, rtol=2e-5)


def test_a_store_without_the_held_out_rows_is_refused(whole, folder):
  copy = folder / "without"
  shutil.copytree(whole / "train", copy / "train")
  with pytest.raises(UserError, match="without/eval"):
    built(config(**{"teacher.cache": str(copy)}), folder)
  with pytest.raises(UserError, match="eval was made from something else .data="):
    built(config(**{"teacher.cache": str(whole), "eval.limit": 4}), folder)


def test_a_store_for_a_larger_vocabulary_is_refused(whole, folder):
  """Its tokens would be looked up where the student has none."""
  copy = folder / "wide"
  shutil.copytree(whole, copy)
  about = json.loads((copy / "train" / "made_from.json").read_text())
  wide = json.dumps(about | {"vocab_size": about["vocab_size"] + 16})
  (copy / "train" / "made_from.json").write_text(wide)
  with pytest.raises(UserError, match="written for a student of .* tokens"):
    built(config(**{"teacher.cache": str(copy)}), folder)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("flags", "words"),
  [
    (["--config.method.name=ensemble"], "the words of one teacher"),
    (["--config.teacher.model.hidden_size=0"], "needs teacher.path"),
    (["--config.teacher.cache=there"], "name it by --output"),
  ],
)
def test_whose_words_are_not_stored(flags, words, tmp_path):
  where = f"--output={tmp_path / 'store'}"
  done = call("cache_teacher", "--config=configs/debug.py", *flags, where, status=2)
  assert words in done.stderr and not (tmp_path / "store").exists()


def test_at_another_temperature_no_kl_is_measured(live, folder):
  """What is stored is the distribution at T; the KL is that at 1."""
  warm = config(**{"method.temperature": 2.0})
  run = built(warm, folder)
  write_store(run, folder / "warm", 4, "float32")
  warm.teacher.cache = str(folder / "warm")
  run = built(warm, folder)
  with jax.set_mesh(run.mesh):
    scores = Evaluator(run)(run.init().params)
  assert "top1_agreement" in scores and "forward_kl" not in scores
  warm.eval.best = "forward_kl"
  with pytest.raises(UserError, match="not measured in this run"):
    built(warm, folder)


@pytest.mark.slow
def test_fewer_tokens_are_a_bound_from_below(live, whole, folder):
  """Guards A7: the divergence of buckets rises with K and ends at the whole one."""
  del live
  values = []
  for k in (2, 16, 64):
    run = built(config(), folder)
    write_store(run, folder / f"k{k}", k, "float32")
    run = built(config(**{"teacher.cache": str(folder / f"k{k}")}), folder)
    values.append(float(steps(run, 1)[0][0]["divergence"]))
  full = built(config(**{"teacher.cache": str(whole)}), folder)
  values.append(float(steps(full, 1)[0][0]["divergence"]))
  assert 0 < values[0] < values[1] < values[2] < values[3]


def test_an_interrupted_store_ends_up_the_same(live, whole, folder):
  kept = write_store(live, folder / "cut", 0, "float32")
  names = sorted(path.relative_to(whole) for path in whole.glob("*/0*"))
  assert {name.parent.name for name in names} == {"train", "eval"}
  (folder / "cut" / names[-1]).unlink()
  again = write_store(live, folder / "cut", 0, "float32")
  for part in ("train", "eval"):
    assert kept[part].missing() == again[part].missing() == []
  for name in names:
    assert (folder / "cut" / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"method.temperature": 2.0}, "temperature=1.0 there, 2.0 here"),
    ({"data.template": "{instruction}\n"}, "data=.* there, .* here"),
    ({"teacher.model.num_layers": 1}, "teacher=.random, seed 0.*num_layers=3"),
    ({"train.seed": 5}, "teacher=.random, seed 0.* there, .random, seed 5"),
  ],
)
def test_a_foreign_store_is_refused(changes, words, whole, folder):
  with pytest.raises(UserError, match="was made from something else.*" + words):
    built(config(**changes | {"teacher.cache": str(whole)}), folder)


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"method.name": "okd"}, "needs the teacher itself"),
    ({"method.name": "gkd"}, "needs the teacher itself"),
    ({"method.name": "sft"}, "no use for a teacher"),
    ({"adapter.kind": "lora"}, "needs the teacher itself"),
    ({"method.top_k": 4}, "without method.top_k"),
    ({"method.end.temperature": 2.0}, "has one temperature"),
  ],
)
def test_what_a_stored_teacher_cannot_do(changes, words, whole, folder):
  with pytest.raises(UserError, match=words):
    built(config(**changes | {"teacher.cache": str(whole)}), folder)


def test_who_takes_a_stored_teacher(live):
  """Exactly distillation by a divergence on the data's own rows."""
  knobs = config().method.to_dict()
  taking = {
    name
    for name in METHODS
    if (m := methods.build(name, knobs)).takes_stored
    and not (m.sequences.sampled or m.sequences.beforehand)
  }
  assert taking == {"kd", "rkd", "jsd", "tvd", "akl", "skl", "srkl"}


@pytest.mark.slow
def test_the_commands(tmp_path):
  """Stored, then trained from; and an adapted teacher is one like any other."""
  run = tmp_path / "run"
  train(run)
  base = [*QUICK, "--config.teacher.model.hidden_size=0"]
  base += [f"--config.teacher.path={run / 'student'}", "--config.method.name=kd"]
  common = ["--config=configs/debug.py", *base]
  call("cache_teacher", *common, f"--output={tmp_path / 's'}", "--k=0")
  train(tmp_path / "live", *base)
  cache = f"--config.teacher.cache={tmp_path / 's'}"
  train(tmp_path / "stored", *base, cache)
  np.testing.assert_allclose(
    list(losses(tmp_path / "stored").values()),
    list(losses(tmp_path / "live").values()),
    atol=2e-3,  # stored in float16
  )
  kl = [rows(tmp_path / name, "eval")[-1]["forward_kl"] for name in ("live", "stored")]
  assert kl[0] > 0 and abs(kl[0] - kl[1]) < 2e-3
