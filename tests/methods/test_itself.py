"""teacher.path=student: one set of weights, that teaches with a module or a hint."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import call, losses, same_folder
from hints import HINTS, batches, data
from small import built, config, step_of

from okd_jax.errors import UserError
from okd_jax.models import output
from okd_jax.run.batches import Batches
from okd_jax.run.evaluator import Evaluator

ITSELF = {"teacher.path": "student", "teacher.model.hidden_size": 0}
LORA = {"student.adapter.kind": "lora", "student.adapter.rank": 2}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  return data(tmp_path_factory.mktemp("data") / "hints.jsonl")


def own(source, **changes):
  return config(**HINTS | ITSELF | {"data.train": source} | changes)


def stepped(run, count=2):
  with jax.set_mesh(run.mesh):
    state, sampler, step = run.init(), Batches(run, {}), step_of(run)
    found = []
    for i, rows in enumerate(batches(run, count)):
      batch, _ = sampler.batch(i, state.params, rows)
      state, values = step(state, run.cast.frozen, batch)
      found.append(jax.device_get(values))
  return jax.device_get(state.params), found


def test_there_is_one_set_of_weights(source, tmp_path):
  """The teacher of each step is the student before it, hinted."""
  run = built(own(source), tmp_path)
  assert run.cast.frozen == {} and set(run.cast.teachers) == {"teacher"}
  [rows] = batches(run)
  with jax.set_mesh(run.mesh):
    state = run.init()
    batch, _ = Batches(run, {}).batch(0, state.params, rows)
    variables = {"params": state.params["student"]}
    said = output(run.cast.teachers["teacher"], variables, batch, as_teacher=True)
    nll = -jax.nn.log_softmax(said.logits())
    nll = jnp.take_along_axis(nll, batch.labels[..., None], -1)[..., 0]
    wanted = float((nll * batch.mask).sum() / batch.mask.sum())
    _, values = step_of(run)(state, run.cast.frozen, batch)
  np.testing.assert_allclose(values["teacher_nll"], wanted, rtol=1e-5)
  assert float(values["forward_kl"]) > 0  # the hint is another prompt


def test_no_gradient_goes_through_the_teacher(source, tmp_path):
  """As if it were another model with the same weights, its module apart."""
  run = built(own(source, **{"method.name": "okd"}), tmp_path)
  [rows] = batches(run)
  models = run.plan.models
  with jax.set_mesh(run.mesh):
    params = run.init().params
    batch, _ = Batches(run, {}).batch(0, params, rows)
    batch = batch.replace(weights=run.method.weights(batch.mask))

    def loss(tree, frozen):
      seen = (tree, frozen) if frozen else models.seen(tree, {})
      return run.method.loss(models, *seen, batch, None, dict(run.method.knobs))[0]

    itself = jax.grad(loss)(params, {})
    apart = jax.grad(loss)(params, {"teacher": params["student"]})
  chex.assert_trees_all_close(itself, apart, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_under_lora_the_teacher_is_the_base(source, tmp_path):
  """What is trained of the student is not the teacher's: that stays as it began."""
  run = built(own(source, **LORA), tmp_path)
  assert set(run.cast.frozen) == {"student"}
  params, _ = stepped(run, 3)
  base = run.cast.teacher_params("teacher", params)
  assert base is run.cast.frozen["student"]
  moved = [np.abs(x).max() for x in jax.tree.leaves(params["student"])]
  assert max(moved) > 0
  with jax.set_mesh(run.mesh):
    first = Evaluator(run).teachers(run.init().params)["teacher"]["loss"]
    last = Evaluator(run).teachers(params)["teacher"]["loss"]
  assert first == last


@pytest.mark.parametrize("changes", [{}, pytest.param(LORA, marks=pytest.mark.slow)])
def test_with_a_module_it_learns_as_any_teacher_does(changes, source, tmp_path):
  run = built(own(source, **{"method.name": "okd"} | changes), tmp_path)
  start = jax.device_get(run.init().params["adapter"])
  params, values = stepped(run)
  assert all(v["finite"] == 1 for v in values)
  chex.assert_trees_all_equal_shapes(params["adapter"], start)
  change = jax.tree.map(lambda a, b: np.abs(a - b).max(), params["adapter"], start)
  assert max(jax.tree.leaves(change)) > 0


@pytest.mark.parametrize(
  ("changes", "text"),
  [
    ({"teacher.dtype": "int8"}, "teacher.dtype=int8: under teacher.path=student"),
    ({"student.frozen": "embed"}, "student.frozen cannot be told from the teacher"),
    (
      {"student.layers": 1, "student.model.hidden_size": 0},
      "take from another model",
    ),
    ({"method.name": "clda"}, "the teacher's blocks are the student's"),
  ],
)
def test_what_it_cannot_be(changes, text, source, tmp_path):
  with pytest.raises(UserError, match=text):
    built(own(source, **changes), tmp_path)


def test_a_teacher_that_says_what_the_student_says_is_refused(tmp_path):
  plain = data(tmp_path / "plain.jsonl", hint="")
  with pytest.raises(UserError, match="the teacher says what the student says"):
    built(own(plain), tmp_path)
  built(own(plain, **{"method.name": "okd"}), tmp_path / "okd")


@pytest.mark.slow
@pytest.mark.parametrize("lora", [(), ("--config.student.adapter.kind=lora",)])
def test_a_whole_run_is_killed_and_goes_on(lora, source, tmp_path):
  """Ends as an undisturbed one does, with an adapter that PEFT's base is named for."""
  flags = [
    "--config=configs/debug.py",
    f"--config.data.train={source}",
    "--config.data.holdout=8",
    "--config.method.name=okd",
    "--config.teacher.path=student",
    "--config.teacher.model.hidden_size=0",
    "--config.data.max_length=48",
    "--config.data.max_prompt_length=24",
    "--config.data.max_teacher_length=80",
    "--config.eval.max_new_tokens=4",
    "--config.checkpoint.every=2",
    *lora,
  ]
  constant = "--config.optim.schedule=constant"
  one, two = tmp_path / "one", tmp_path / "two"
  call("main", *flags, constant, f"--workdir={one}", "--config.train.steps=6")
  call("main", *flags, constant, f"--workdir={two}", "--config.train.steps=4")
  call("main", *flags, constant, f"--workdir={two}", "--config.train.steps=6")
  assert losses(one) == losses(two) and same_folder(one / "student", two / "student")
  assert same_folder(one / "adapter", two / "adapter")
  assert json.loads((one / "adapter" / "adapter_config.json").read_text())
