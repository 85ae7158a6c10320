"""A teacher that reads another prompt: compared on the answer, token by token."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from hints import HINTS, TEACHER, batches, data
from hypothesis import given
from hypothesis import strategies as st
from small import built, config, step_of

from okd_jax import METHODS
from okd_jax.data import Example, pack_row, train_loader
from okd_jax.data.batch import Batch
from okd_jax.data.pack import whole_row
from okd_jax.errors import UserError
from okd_jax.models import output
from okd_jax.run.batches import Batches
from okd_jax.run.evaluator import Evaluator
from okd_jax.run.stored import write as write_store


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  return data(tmp_path_factory.mktemp("data") / "hints.jsonl")


def hinted(source, **changes):
  return config(**HINTS | {"data.train": source} | changes)


# Rows

TEXTS = st.lists(
  st.tuples(
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
    st.none() | st.lists(st.integers(1, 9), min_size=1, max_size=6),
    st.lists(st.integers(1, 9), min_size=1, max_size=5),
  ),
  min_size=1,
  max_size=3,
)


@given(TEXTS)
def test_both_predict_the_same_token_of_the_same_answer(texts):
  """By value: label and what was given of the answer; the prompts differ."""
  examples = []
  for prompt, own, answer in texts:
    tokens = np.array(prompt + answer, np.int32)
    own = None if own is None else np.array(own, np.int32)
    examples.append(Example(tokens, len(prompt), (), "f:1", teacher_prompt=own))
  row = whole_row(examples, 40, 0, 50)
  plain = pack_row(examples, 40, 0)
  assert all(np.array_equal(row[name], plain[name]) for name in plain)
  at = row["align"][row["mask"]]
  teacher = pack_row([e.for_teacher() for e in examples], 50, 0)
  assert np.array_equal(row["teacher_tokens"], teacher["tokens"])
  assert np.array_equal(teacher["labels"][at], row["labels"][row["mask"]])
  assert np.array_equal(row["teacher_segments"][at], row["segment_ids"][row["mask"]])
  assert len({*at.tolist()}) == len(at) == sum(len(answer) for *_, answer in texts)


def test_by_hand():
  example = Example(
    np.array([1, 2, 7, 8], np.int32),
    2,
    (),
    "f:1",
    teacher_prompt=np.array([3, 4, 5], np.int32),
  )
  row = whole_row([example], 5, 0, 6)
  assert row["mask"].tolist() == [False, True, True, False, False]
  assert row["teacher_tokens"].tolist() == [3, 4, 5, 7, 0, 0]
  assert row["align"].tolist() == [0, 2, 3, 0, 0]


# Losses


def alone(run, name, which):
  """float64 logits of a model at the tokens of each answer, one row at a time."""
  decoder = run.cast.student if name == "student" else run.cast.teachers["teacher"]
  params = run.init().params["student"]
  variables = {"params": params if name == "student" else run.cast.frozen["teacher"]}
  found = []
  for example in which:
    own = example if name == "student" else example.for_teacher()
    row = Batch.of({k: v[None] for k, v in pack_row([own], TEACHER, 0).items()})
    logits = output(decoder, variables, jax.tree.map(jnp.asarray, row)).logits()[0]
    found.append(np.asarray(logits, np.float64)[np.asarray(row.mask[0])])
  return np.concatenate(found)


def test_the_loss_is_that_of_each_model_alone(source, tmp_path):
  run = built(hinted(source), tmp_path)
  [rows] = batches(run)
  with jax.set_mesh(run.mesh):
    state = run.init()
    batch, _ = Batches(run, {}).batch(0, state.params, rows)
    _, values = step_of(run)(state, run.cast.frozen, batch)
  which = [run.data.train[int(i)] for i in rows["row"]]
  student, teacher = (alone(run, name, which) for name in ("student", "teacher"))
  wanted = oracle.forward_kl(teacher, student).mean()
  np.testing.assert_allclose(values["forward_kl"], wanted, rtol=1e-4)
  labels = np.concatenate([e.response for e in which])
  nll = oracle.cross_entropy(teacher, labels).mean()
  np.testing.assert_allclose(values["teacher_nll"], nll, rtol=1e-4)


def first_steps(run, count=2):
  with jax.set_mesh(run.mesh):
    state, sampler, step = run.init(), None, step_of(run)
    sampler = Batches(run, {})
    for i, rows in enumerate(batches(run, count)):
      batch, _ = sampler.batch(i, state.params, rows)
      state, values = step(state, run.cast.frozen, batch)
  return jax.device_get(state.params), jax.device_get(values)


@pytest.mark.parametrize("name", ["okd", pytest.param("kd", marks=pytest.mark.slow)])
def test_its_own_prompt_said_twice_changes_nothing(name, tmp_path):
  """The same prompts, written out as the teacher's: the same training."""
  lines = [{"prompt": f"{i} + {i} = ", "completion": str(2 * i)} for i in range(40)]
  plain, twice = tmp_path / "plain.jsonl", tmp_path / "twice.jsonl"
  plain.write_text("".join(json.dumps(line) + "\n" for line in lines))
  twice.write_text(
    "".join(
      json.dumps(line | {"teacher_prompt": line["prompt"]}) + "\n" for line in lines
    )
  )
  runs = [
    built(hinted(str(path), **{"method.name": name}), tmp_path / path.stem)
    for path in (plain, twice)
  ]
  assert [run.data.teacher_length for run in runs] == [0, TEACHER]
  (params, values), (same, also) = map(first_steps, runs)
  chex.assert_trees_all_close(values, also, rtol=1e-4, atol=1e-6)
  chex.assert_trees_all_close(params, same, atol=2e-4)


def test_gradients_reach_student_and_module_through_the_gather(source, tmp_path):
  """Differences of each tree's own part of okd's loss, along its gradient."""
  run = built(hinted(source, **{"method.name": "okd"}), tmp_path)
  [rows] = batches(run)
  key = jax.random.key(0)

  def random(tree, scale):
    leaves, kind = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    drawn = [
      scale * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(kind, drawn)

  with jax.set_mesh(run.mesh):
    params = jax.device_get(run.init().params)
    batch, _ = Batches(run, {}).batch(0, params, rows)
    batch = batch.replace(weights=run.method.weights(batch.mask))
    params["adapter"] = random(params["adapter"], 0.1)

    def parts(tree):
      """(the student's loss, the module's)."""
      total, told = run.method.loss(
        run.plan.models, tree, run.cast.frozen, batch, None, dict(run.method.knobs)
      )
      return total - told["module_loss"], told["module_loss"]

    grads = jax.jit(jax.grad(lambda tree: sum(parts(tree))))(params)
    for part, name in enumerate(("student", "adapter")):
      size = optax.tree.norm(grads[name])  # along the gradient, by its own length
      way = jax.tree.map(lambda g, size=size: g / size, grads[name])

      @jax.jit
      def moved(by, part=part, name=name, way=way):
        tree = jax.tree.map(lambda x, d: x + by * d, params[name], way)
        return parts({**params, name: tree})[part]

      eps = 1e-2
      found = (moved(eps) - moved(-eps)) / (2 * eps)
      assert size > 1e-3
      np.testing.assert_allclose(found, size, rtol=1e-2)


@pytest.mark.slow
def test_a_stored_teacher_is_the_live_one(source, tmp_path):
  run = built(hinted(source), tmp_path / "live")
  write_store(run, tmp_path / "store", 0, "float32")
  store = hinted(source, **{"teacher.cache": str(tmp_path / "store")})
  stored = built(store, tmp_path / "stored")
  assert not stored.cast.teachers
  (params, wanted), (same, got) = first_steps(run), first_steps(stored)
  shared = {k: got[k] for k in ("loss", "forward_kl", "teacher_nll", "top1_agreement")}
  chex.assert_trees_all_close(shared, {k: wanted[k] for k in shared}, rtol=2e-5)
  chex.assert_trees_all_close(params["student"], same["student"], atol=2e-4)
  scores = []
  for each in (run, stored):
    with jax.set_mesh(each.mesh):
      evaluator = Evaluator(each)
      scores.append(evaluator(each.init().params))
      own = evaluator.teachers()["teacher"]["loss"]  # by itself it reads the hint, too
    np.testing.assert_allclose(own, scores[-1]["teacher_loss"], rtol=1e-4)
  chex.assert_trees_all_close(
    scores[1], {k: scores[0][k] for k in scores[1]}, rtol=2e-5
  )
  other = data(tmp_path / "other.jsonl", hint="It may be {}, or not. ")
  store.data.train = other
  with pytest.raises(UserError, match="made from something else .data="):
    built(store, tmp_path / "again")


# Methods

REFUSED = {"skd", "mixkd", "sft"}


QUICK = {"okd", "gkd", "minillm", "ensemble"} | REFUSED


@pytest.mark.parametrize(
  "name",
  [
    pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow])
    for name in sorted(METHODS)
  ],
)
def test_every_method_takes_it_or_says_why_not(name, source, tmp_path):
  changes = {"method.name": name}
  if name == "minillm":
    with pytest.raises(UserError, match="set method.teacher_mix=0"):
      built(hinted(source, **changes), tmp_path)
    changes["method.teacher_mix"] = 0.0
  if name in REFUSED:
    with pytest.raises(UserError, match="a prompt for the teacher alone .* but"):
      built(hinted(source, **changes), tmp_path)
    return
  run = built(hinted(source, **changes), tmp_path)
  assert run.data.teacher_length == TEACHER


def answers_of(rows):
  """The trained tokens of each row."""
  return [x[m].tolist() for x, m in zip(rows["labels"], rows["mask"], strict=True)]


@pytest.mark.parametrize(
  "changes",
  [
    {"method.name": "gkd", "method.sampled_share": 1.0},
    {"method.name": "gkd", "method.sampled_share": 1.0, "method.replay": True},
    pytest.param(
      {"method.name": "minillm", "method.teacher_mix": 0.0}, marks=pytest.mark.slow
    ),
    pytest.param(
      {"method.name": "promptkd", "adapter.length": 2}, marks=pytest.mark.slow
    ),
  ],
)
def test_sampled_answers_come_after_both_prompts(changes, source, tmp_path):
  """The student writes after its own prompt; the teacher reads that after the hint."""
  run = built(hinted(source, **changes), tmp_path)
  [rows] = batches(run)
  with jax.set_mesh(run.mesh):
    state = run.init()
    batch, _ = Batches(run, {}).batch(0, state.params, rows)
    got = jax.device_get(batch.rows)
    _, values = step_of(run)(state, run.cast.frozen, batch)
  assert np.isfinite(float(values["loss"])) and float(values["finite"]) == 1
  if "method.replay" in changes:  # which draws them in another order
    return
  for i, row in enumerate(rows["row"]):
    example = run.data.train[int(row)]
    own, size = example.for_teacher(), len(example.prompt)
    assert got["tokens"][i][:size].tolist() == example.prompt.tolist()
    assert got["teacher_tokens"][i][: len(own.prompt)].tolist() == own.prompt.tolist()
    at = got["align"][i][got["mask"][i]]
    answer = answers_of(got)[i]
    assert at.tolist() == [len(own.prompt) - 1 + k for k in range(len(answer))]
    assert got["teacher_tokens"][i][at[1:]].tolist() == answer[:-1]


def test_packed_rows_hold_the_same_texts_for_both(source, tmp_path):
  changes = {"data.pack": True, "data.max_length": 96, "data.max_teacher_length": 0}
  run = built(hinted(source, **changes), tmp_path)
  assert max(map(len, run.data.packs)) > 1
  loader = train_loader(
    run.data.train,
    batch_size=4,
    length=96,
    pad_id=0,
    seed=0,
    packs=run.data.packs,
    teacher_length=run.data.teacher_length,
  )
  rows = next(loader)
  for i in range(4):
    at = rows["align"][i][rows["mask"][i]]
    ids = rows["teacher_segments"][i][at]
    assert np.array_equal(ids, rows["segment_ids"][i][rows["mask"][i]])
  narrow = {"data.pack": True, "data.max_length": 32, "data.max_teacher_length": 96}
  with pytest.raises(UserError, match="cannot hold the teacher's"):
    built(hinted(source, **narrow), tmp_path / "x")


# Templates


def test_a_template_of_the_teachers_own(tmp_path):
  """{output} is the row's own answer: a worked solution in the teacher's prompt."""
  path = tmp_path / "a.jsonl"
  lines = [{"instruction": f"Add {i}.", "output": f"{i}!"} for i in range(20)]
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  templates = {
    "data.template": "{instruction}>",
    "data.teacher_template": "({output}) {instruction}>",
  }
  run = built(hinted(str(path), **templates), tmp_path)
  example, tokenizer = run.data.train[3], run.data.tokenizer
  said = tokenizer.decode(example.response).removesuffix(tokenizer.eos_token)
  asked = tokenizer.decode(example.prompt)
  assert tokenizer.decode(example.teacher_prompt) == f"({said}) {asked}"


@pytest.mark.parametrize(
  ("template", "text"),
  [
    ("{instruction} {hint}", "data.teacher_template='{instruction} {hint}' uses hint"),
    ("no place", "data.teacher_template='no place' is no template"),
    ("{{ instruction", "data.teacher_template: not valid jinja2"),
  ],
)
def test_templates_that_cannot_be_used(template, text, source, tmp_path):
  with pytest.raises(UserError) as caught:
    built(hinted(source, **{"data.teacher_template": template}), tmp_path)
  assert text in str(caught.value)
