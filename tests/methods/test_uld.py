"""ULD: a teacher with another tokenizer, from the distance to a whole run."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from commands import call, losses, rows
from trial import KNOBS, LogitTrial, make_batch

from configs import default
from okd_jax import evaluate, methods, models
from okd_jax.config.stages import stages
from okd_jax.data import (
  make_tokenizer,
  pad_row,
  pair,
  prepare,
  train_loader,
)
from okd_jax.data.batch import Batch
from okd_jax.data.pairing import cleaned
from okd_jax.data.rows import of
from okd_jax.data.sources import Record
from okd_jax.errors import UserError
from okd_jax.losses import align, sorted_distance
from okd_jax.methods.base.knobs import Linear, knobs_at
from okd_jax.models import output
from okd_jax.run.batches import Batches
from okd_jax.run.build import build
from okd_jax.run.evaluator import Evaluator
from okd_jax.runtime.workdir import Workdir

ULD = {"cross_tokenizer": "uld"}


def normal(seed, *shape, scale=2.0):
  return scale * jax.random.normal(jax.random.key(seed), shape)


def uld(teacher, student, temperature=1.0):
  """The paper's sum, one position and one rank at a time."""
  teacher, student = np.asarray(teacher, float), np.asarray(student, float)
  value = np.zeros(teacher.shape[:-1])
  for at in np.ndindex(value.shape):
    p = sorted(oracle.softmax(teacher[at], temperature), reverse=True)
    q = sorted(oracle.softmax(student[at], temperature), reverse=True)
    for i in range(max(len(p), len(q))):
      a, b = (x[i] if i < len(x) else 0.0 for x in (p, q))
      value[at] += abs(a - b)
  return temperature**2 * value


# The distance


@pytest.mark.parametrize("sizes", [(7, 7), (5, 11), (11, 5), (1, 4)])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_distance_is_the_papers(sizes, temperature):
  teacher, student = normal(0, 3, 4, sizes[0]), normal(1, 3, 4, sizes[1])
  got = sorted_distance(teacher, student, temperature)
  assert got.shape == (3, 4) and got.dtype == jnp.float32
  np.testing.assert_allclose(got, uld(teacher, student, temperature), rtol=1e-5)


def test_golden_values():
  """(.4 .3 .2 .1) and (.25 .25 .5): .1 + .05 + .05 + .1 by hand."""
  p, q = jnp.log(jnp.array([0.1, 0.4, 0.2, 0.3])), jnp.log(jnp.array([0.25, 0.5, 0.25]))
  np.testing.assert_allclose(sorted_distance(p, q), 0.1 + 0.05 + 0.05 + 0.1, rtol=1e-6)


def test_which_token_is_which_does_not_matter():
  logits = normal(0, 5, 9)
  shuffled = logits[:, jax.random.permutation(jax.random.key(1), 9)]
  assert jnp.abs(sorted_distance(logits, shuffled)).max() < 1e-6
  unused = jnp.pad(logits, [(0, 0), (0, 4)], constant_values=-jnp.inf)
  assert jnp.abs(sorted_distance(unused, shuffled)).max() < 1e-6


def test_it_is_2_at_most():
  sure, unsure = jnp.zeros(4000).at[7].set(100.0), jnp.zeros(4000)
  np.testing.assert_allclose(sorted_distance(sure, unsure), 2, rtol=1e-3)


def test_low_precision_is_summed_in_float32():
  teacher, student = (normal(i, 4, 300).astype(jnp.bfloat16) for i in range(2))
  got = sorted_distance(teacher, student)
  want = uld(teacher.astype(jnp.float32), student.astype(jnp.float32))
  np.testing.assert_allclose(got, want, rtol=1e-5)


def test_its_gradient_is_the_students_alone():
  teacher, student = normal(0, 3, 5), normal(1, 3, 8)
  ours, theirs = jax.grad(lambda s, t: sorted_distance(t, s, 2.0).sum(), (0, 1))(
    student, teacher
  )
  want = oracle.gradient(lambda s: uld(teacher, s, 2.0), student)
  np.testing.assert_allclose(ours, want, rtol=1e-4, atol=1e-6)
  assert not theirs.any()


def test_its_gradient_is_finite_where_a_token_has_no_probability():
  student = normal(0, 6).at[2].set(-jnp.inf)
  grad = jax.grad(lambda s: sorted_distance(normal(1, 9), s))(student)
  assert jnp.isfinite(grad).all() and grad[2] == 0
  same = jax.grad(lambda s: sorted_distance(student, s))(student)
  assert jnp.abs(same).max() < 1e-6


# Which of the teacher's tokens


def test_answer_tokens_are_aligned_by_number():
  ours = np.array([[0, 0, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0], [0, 1, 1, 1, 1, 0]], bool)
  theirs = np.array([[0, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1], [0] * 6], bool)
  index, aligned = align(jnp.asarray(ours), jnp.asarray(theirs))
  pairs = [
    [(t, int(index[row, t])) for t in range(6) if aligned[row, t]] for row in range(3)
  ]
  assert pairs == [[(2, 1), (3, 2)], [(0, 2), (1, 3)], []]


class Trial(LogitTrial):
  """ULD on logits; the teacher's rows have their own mask and vocabulary."""

  def __init__(self, chunk=5, **knobs):
    super().__init__("kd", chunk=chunk, **(ULD | knobs))

  def __call__(self, student, teacher, batch, theirs):
    params, frozen = {"student": student}, {"teacher": teacher}
    batch = self.beside(params, frozen, batch).replace(other_tokens=theirs)
    now = knobs_at(self.method.knobs, 0.0)
    return self.method.loss(self.models, params, frozen, batch, None, now)


@pytest.fixture(scope="module")
def case():
  """(student's logits, teacher's, student's rows, teacher's rows), counts differ."""
  batch, theirs = make_batch(0, rows=6), make_batch(1, rows=6)
  counts = [np.asarray(b.mask.sum(-1)) for b in (batch, theirs)]
  assert (counts[0] > counts[1]).any() and (counts[0] < counts[1]).any()
  return normal(2, 6, 12, 32), normal(3, 6, 12, 21), batch, theirs


def plain(student, teacher, batch, theirs, ratio, gold=0.0):
  """The loss by lists of answer tokens: row by row, up to the shorter answer."""
  distance, nll, pairs = 0.0, 0.0, 0
  for row in range(len(student)):
    ours = np.flatnonzero(batch.mask[row])
    other = np.flatnonzero(theirs.mask[row])
    nll += oracle.cross_entropy(
      np.asarray(student)[row, ours], np.asarray(batch.labels)[row, ours]
    ).sum()
    for s, t in zip(ours, other, strict=False):
      distance += uld(teacher[row, t], student[row, s])
      pairs += 1
  count = float(batch.mask.sum())
  value = (ratio * distance + (1 - ratio + gold) * nll) / count
  return value, distance / count, pairs / count


@pytest.mark.parametrize("knobs", [(0.6, 0.0), (1.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
def test_the_loss_is_the_papers(case, knobs):
  """CE + lambda ULD over the first min(T_teacher, T_student) answer tokens."""
  loss, metrics = Trial(kd_ratio=knobs[0], gold_weight=knobs[1])(*case)
  want, distance, share = plain(*case, *knobs)
  np.testing.assert_allclose(loss, want, rtol=1e-5)
  np.testing.assert_allclose(metrics["divergence"], distance, rtol=1e-5)
  np.testing.assert_allclose(metrics["aligned"], share, rtol=1e-6)
  assert 0 < share < 1


@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_chunked_is_dense(case, chunk):
  """The gradient, too: of the student's logits, and none of the teacher's."""
  trial, (student, teacher, batch, theirs) = Trial(chunk, kd_ratio=0.6), case
  grad, none = jax.grad(lambda x: trial(*x, batch, theirs)[0])((student, teacher))
  index, aligned = align(batch.mask, theirs.mask)

  def dense(student):
    rows = jnp.take_along_axis(teacher, index[..., None], axis=1)
    d = jnp.where(aligned, sorted_distance(rows, student), 0)
    log_q = jax.nn.log_softmax(student)
    ce = -jnp.take_along_axis(log_q, batch.labels[..., None], axis=-1)[..., 0]
    mask = batch.mask
    return jnp.where(mask, 0.6 * d + 0.4 * ce, 0).sum() / mask.sum()

  np.testing.assert_allclose(grad, jax.grad(dense)(student), rtol=1e-4, atol=1e-7)
  assert not none.any()


def test_what_is_masked_adds_nothing(case):
  """Whatever prompts, padding and tokens beyond the shorter answer hold, even NaN."""
  student, teacher, batch, theirs = case
  trial = Trial(kd_ratio=0.6)
  used = np.zeros(theirs.mask.shape, bool)
  index, aligned = align(batch.mask, theirs.mask)
  for row, t in zip(*np.nonzero(aligned), strict=True):
    used[row, index[row, t]] = True
  other = jnp.where(used[..., None], teacher, jnp.nan)
  noisy = jnp.where(batch.mask[..., None], student, jnp.nan)
  value = jax.value_and_grad(lambda s, t: trial(s, t, batch, theirs)[0])
  (want, grad), (got, same) = value(student, teacher), value(noisy, other)
  assert got == want
  np.testing.assert_array_equal(same, grad)


def test_microbatches_add_up(case):
  """The weights are the whole batch's, so parts of it are plain sums."""
  student, teacher, batch, theirs = case
  trial = Trial(kd_ratio=0.6)
  weights = trial.method.weights(batch.mask)
  whole = batch.replace(weights=weights, other_tokens=theirs)
  now = knobs_at(trial.method.knobs, 0.0)

  def part(rows):
    q, p, piece = jax.tree.map(lambda x: x[rows], (student, teacher, whole))
    params, frozen = {"student": q}, {"teacher": p}
    return trial.method.loss(trial.models, params, frozen, piece, None, now)[0]

  total = part(slice(0, 2)) + part(slice(2, 6))
  np.testing.assert_allclose(total, part(slice(0, 6)), rtol=1e-6)


# Rows in pairs


RECORDS = [
  Record("instruction", f"a:{i}", prompt=f"Say {i}", references=(f"{text} {i}.",))
  for i, text in enumerate(["It is", "x" * 60, "and so on and so on", "ü" * 30, "yes"])
]
BYTES = make_tokenizer("bytes", RECORDS)
PIECES = make_tokenizer("bpe:300", RECORDS)


def test_rows_of_one_record_are_paired():
  """Whatever either tokenizer drops: 'ü' has two bytes but one piece."""
  limits = dict(max_length=90, max_prompt_length=60, overlong_row="drop")
  one, two = (prepare(RECORDS, t, **limits)[0] for t in (BYTES, PIECES))
  assert [e.where for e in one] != [e.where for e in two]
  ours, theirs = pair(of(one), of(two))
  assert [e.where for e in ours] == [e.where for e in theirs]
  assert [e.where for e in ours] == ["a:0", "a:2", "a:4"]
  for a, b in zip(ours, theirs, strict=True):
    texts = [
      t.decode(e.tokens[e.prompt_length :]) for t, e in ((BYTES, a), (PIECES, b))
    ]
    assert texts[0] == texts[1]
  assert any(len(a.tokens) != len(b.tokens) for a, b in zip(ours, theirs, strict=True))


def test_records_of_one_place_are_not_mixed_up():
  """Paired by record: neither a place in the list nor a name need be unique."""
  records = [dataclasses.replace(r, where="same") for r in RECORDS]
  limits = dict(max_length=90, max_prompt_length=60, overlong_row="drop")
  ours, theirs = pair(*(of(prepare(records, t, **limits)[0]) for t in (BYTES, PIECES)))
  assert all(a.references == b.references for a, b in zip(ours, theirs, strict=True))
  assert len(ours) == 3


def test_nobodys_end_token_is_text():
  other = make_tokenizer("bytes", RECORDS)
  other.add_special_tokens({"eos_token": "</s>"})
  record = dataclasses.replace(RECORDS[0], references=("It is 0.</s><|endoftext|>",))
  clean = cleaned(record, [BYTES, other])
  assert clean.references == ("It is 0.",)
  ours, theirs = (of(prepare([clean], t)[0]) for t in (BYTES, other))
  assert len(pair(ours, theirs)[0]) == 1


def test_what_cannot_be_paired():
  with pytest.raises(UserError, match="a:9: .* text without a prompt"):
    cleaned(Record("text", "a:9", text="words"), [BYTES])
  ours, theirs = (of(prepare(RECORDS[:2], t)[0]) for t in (BYTES, PIECES))
  with pytest.raises(UserError, match="no record fits"):
    pair(ours[:1], theirs[1:])


# Settings


@pytest.mark.parametrize(
  "name, knobs, module, text",
  [
    ("kd", {"cross_tokenizer": "dskd"}, "", "'dskd' is unknown, use uld"),
    ("okd", ULD, "", "method.name=okd must be kd"),
    ("gkd", ULD, "", "method.name=gkd must be kd"),
    ("rkd", ULD, "", "method.name=rkd must be kd"),
    ("sft", ULD, "", "method.name=sft must be kd"),
    ("kd", ULD | {"divergence": "reverse_kl"}, "", "divergence=reverse_kl must be emp"),
    ("kd", ULD | {"top_k": 8}, "", "method.top_k=8 must be 0"),
    ("kd", ULD, "lora", "adapter.kind=lora must be empty"),
    ("kd", ULD | {"kd_ratio": 2.0}, "", "method.kd_ratio=2.0 must lie between 0 and 1"),
    ("kd", ULD | {"end": {"beta": 0.3}}, "", "method.end.beta: here kd reads no such"),
  ],
)
def test_what_it_does_not_go_with(name, knobs, module, text):
  with pytest.raises(UserError, match=text):
    methods.build(name, KNOBS | knobs, module)


def test_a_share_of_1_is_warned_of(caplog):
  methods.build("kd", KNOBS | ULD)
  assert "leaves no cross-entropy" in caplog.text and "kd_ratio=0.6" in caplog.text
  caplog.clear()
  methods.build("kd", KNOBS | ULD | {"kd_ratio": 0.6})
  methods.build("kd", KNOBS | ULD | {"gold_weight": 1.0})
  moving = methods.build("kd", KNOBS | ULD | {"end": {"kd_ratio": 0.5}})
  assert not caplog.text and isinstance(moving.knobs["kd_ratio"], Linear)


# A run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A tiny teacher of bytes, and data whose answers are short and long."""
  folder = tmp_path_factory.mktemp("uld")
  config = models.preset(
    "gpt2",
    vocab_size=len(BYTES),
    hidden_size=16,
    num_layers=1,
    num_heads=2,
    eos_ids=(BYTES.eos_token_id,),
  )
  # Larger weights than usual: a teacher that is sure of something.
  params = jax.tree.map(
    lambda x: 8 * x if x.ndim > 1 else x, models.init(config, jax.random.key(0))
  )
  models.save(folder / "teacher", params, config, BYTES)
  lines = [
    {"instruction": f"Say {i}", "output": f"It is {i}." + " and so on" * (i % 3)}
    for i in range(24)
  ]
  data = folder / "data.jsonl"
  data.write_text("".join(json.dumps(line) + "\n" for line in lines))
  return folder


def configured(folder):
  config = default.get_config()
  config.teacher.path = str(folder / "teacher")
  config.student.model.hidden_size = 16
  config.student.model.num_layers = 1
  config.data.tokenizer = "bpe:280"
  config.data.train = str(folder / "data.jsonl")
  config.data.max_length = 96
  config.data.max_prompt_length = 60
  config.data.holdout = 4
  config.method.name = "kd"
  config.method.cross_tokenizer = "uld"
  config.method.kd_ratio = 0.6
  config.train.batch_size = 8
  config.train.steps = 4
  config.eval.generate_limit = 2
  config.eval.max_new_tokens = 4
  return config


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
  return build(configured(folder), Workdir(tmp_path_factory.mktemp("run")))


def test_both_rows_of_a_batch_say_the_same(run):
  loader = train_loader(run.data.train, batch_size=8, length=96, pad_id=0, seed=0)
  gold = next(loader)
  batch = Batches(run, {}).batch(0, run.plan.abstract.params, gold)[0]
  theirs = batch.other_tokens
  assert len(jax.tree.leaves(theirs)) == len(theirs.rows) == 4
  different = 0
  for row in range(8):
    texts = []
    for rows_, tokenizer in ((batch, run.data.tokenizer), (theirs, BYTES)):
      mask = np.asarray(rows_.mask[row])
      ids = np.asarray(rows_.labels[row])[mask]
      texts.append(tokenizer.decode(ids))
    assert texts[0] == texts[1]
    different += int(batch.mask[row].sum() != theirs.mask[row].sum())
  assert different == 8


def test_each_model_is_judged_in_its_own_tokens(run):
  evaluator = Evaluator(run)
  with jax.set_mesh(run.mesh):
    teacher, student = evaluator.teachers()["teacher"], evaluator(run.init().params)
  assert set(teacher) == {"own_token_loss", "rougeL", "exact_match"}
  assert set(student) == {"loss", "perplexity", "rougeL", "exact_match"}
  decoder, total, count = run.cast.teachers["teacher"], 0.0, 0
  variables = {"params": run.cast.frozen["teacher"]}
  for example in run.data.other.eval:
    row = pad_row(example, 96, 0)
    batch = jax.tree.map(lambda x: jnp.asarray(x)[None], Batch.of(row))
    logits = output(decoder, variables, batch).logits()[0]
    nll = oracle.cross_entropy(logits, row["labels"])
    total, count = total + nll[row["mask"]].sum(), count + row["mask"].sum()
  np.testing.assert_allclose(teacher["own_token_loss"], total / count, rtol=1e-4)


@pytest.mark.parametrize(
  "change, text",
  [
    (dict(method={"cross_tokenizer": ""}), "method.cross_tokenizer=uld"),
    (dict(eval={"best": "forward_kl"}), "'forward_kl' is not measured in this run"),
    (dict(data={"tokenizer": ""}), "a new student needs a tokenizer"),
    (
      dict(student={"layers": 1, "model": {"hidden_size": 0}}),
      "student.layers or width takes the teacher's embeddings",
    ),
    (dict(data={"max_prompt_length": 30}), "prompts are longer|no record fits"),
  ],
)
def test_what_a_run_refuses(folder, tmp_path, change, text):
  config = configured(folder)
  config.update(change)
  if not config.method.cross_tokenizer:  # a student that brings its own tokens
    tokenizer = make_tokenizer("bpe:270", RECORDS)
    own = models.preset(
      "llama", vocab_size=270, hidden_size=16, num_layers=1, num_heads=2
    )
    models.save(tmp_path / "s", models.init(own, jax.random.key(0)), own, tokenizer)
    config.student.path, config.student.model.hidden_size = str(tmp_path / "s"), 0
    config.data.tokenizer = ""
  with pytest.raises(UserError, match=text):
    build(config, Workdir(tmp_path / "run"))


def test_two_vocabularies_are_not_compared_token_by_token(folder, tmp_path):
  config = models.preset(
    "llama", vocab_size=len(PIECES), hidden_size=16, num_layers=1, num_heads=2
  )
  models.save(tmp_path, models.init(config, jax.random.key(0)), config, PIECES)
  paths = [f"--model={tmp_path}", f"--teacher={folder / 'teacher'}"]
  with pytest.raises(UserError, match="differ in .* leave out --teacher"):
    evaluate.main([*paths, f"--data={folder / 'data.jsonl'}"])


def test_stages_of_another_method_share_one_vocabulary(folder, tmp_path):
  config = configured(folder)
  config.stages.start = {"method": {"name": "sft"}}
  found = {
    part.name: part.config.method.cross_tokenizer for part in stages(config, tmp_path)
  }
  assert found == {"start": "", "": "uld"}


@pytest.mark.slow
def test_a_whole_run_with_two_tokenizers(folder, tmp_path):
  """Its loss falls, its tables render, and the student keeps its own tokenizer."""
  workdir = tmp_path / "run"
  command = [
    "main",
    "--config=configs/default.py",
    f"--config.teacher.path={folder / 'teacher'}",
    f"--config.data.train={folder / 'data.jsonl'}",
    "--config.student.model.hidden_size=16",
    "--config.data.tokenizer=bpe:280",
    "--config.data.max_length=96",
    "--config.data.max_prompt_length=60",
    "--config.data.holdout=4",
    "--config.method.name=kd",
    "--config.method.cross_tokenizer=uld",
    "--config.method.kd_ratio=0.6",
    "--config.train.steps=30",
    "--config.train.batch_size=4",
    "--config.train.microbatches=2",
    "--config.train.log_every=1",
    "--config.optim.lr=1e-2",
    "--config.eval.best=loss",
    "--config.eval.max_new_tokens=4",
    "--config.checkpoint.every=12",
  ]
  done = call(*command, f"--workdir={workdir}")
  train = rows(workdir, "train")
  assert train[-1]["loss"] < 0.8 * train[0]["loss"]
  assert train[-1]["divergence"] < train[0]["divergence"] and train[0]["aligned"] > 0.5
  before, after = rows(workdir, "eval")
  assert after["loss"] < 0.8 * before["loss"]
  assert "teacher" in done.stdout and "KL(" not in done.stdout
  assert "The teacher reads other tokens" in (workdir / "report.html").read_text()
  assert len(models.load(workdir / "student").tokenizer) == 280
  # Cut back to step 24, it goes on with the same pairs of rows.
  cut = tmp_path / "cut"
  shutil.copytree(workdir, cut)
  for name in ("checkpoints/30", "student"):
    shutil.rmtree(cut / name)
  (cut / "report.html").unlink()
  done = call(*command, f"--workdir={cut}")
  assert "resuming at step 24" in done.stderr and losses(workdir) == losses(cut)
