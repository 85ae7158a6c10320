"""Sampled batches: who writes when, and that they are batches like any other."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small import built

from configs import debug
from okd_jax import methods
from okd_jax.data import pad_row, train_loader
from okd_jax.data.batch import ROW, Batch
from okd_jax.errors import UserError
from okd_jax.losses import token_weights
from okd_jax.methods.base.knobs import Linear, knobs_at
from okd_jax.methods.base.sequences import Replay
from okd_jax.run import batches as sampler
from okd_jax.run import beforehand
from okd_jax.run.batches import Batches
from okd_jax.run.replay import Buffer, Share
from okd_jax.runtime.workdir import Workdir, part
from okd_jax.text import rollout

LENGTH, ROWS = 96, 8
KINDS = {name: (3, np.bool_ if name == "mask" else np.int32) for name in ROW}
SHARED = ("gkd", "imitkd", "skd", "distillm")  # who samples in a share of the steps


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A tiny run on the embedded data, built as any run is."""
  config = debug.get_config()
  config.method.name = "gkd"
  config.method.sampled_share = 1.0
  config.data.train = "embedded:eval"
  config.data.holdout = 8
  config.data.max_length = LENGTH
  config.data.max_prompt_length = 80
  config.train.steps = 20
  return built(config, tmp_path_factory.mktemp("run"))


def plan(run, name="gkd", **knobs):
  """The run with the sequences of another method, or other knobs."""
  method = methods.build(
    name, {"sampled_share": 1.0} | knobs if name in SHARED else knobs
  )
  return dataclasses.replace(run, job=dataclasses.replace(run.job, method=method))


def few_rows(run, rows):
  data = dataclasses.replace(run.data, train=run.data.train[rows])
  return dataclasses.replace(run, data=data)


def loader(run):
  return train_loader(run.data.train, batch_size=ROWS, length=LENGTH, pad_id=0, seed=0)


@pytest.fixture(scope="module")
def params(run):
  return run.init().params


def batch_of(run, params, step=0, **more):
  return Batches(run, more.pop("answers", {})).batch(step, params, next(loader(run)))


def equal(a, b):
  rows = (x.rows if isinstance(x, Batch) else x for x in (a, b))
  one, other = ({name: row[name] for name in ROW} for row in rows)
  return all(np.array_equal(one[name], other[name]) for name in ROW)


def test_sampled_rows_are_rows_like_any_other(run, params):
  """Guards B4: DLM's labels are unshifted and EOS is lost; RLKD, SKD skip a token."""
  gold = next(loader(run))
  batch, figures = batch_of(run, params)
  assert figures["sampled"] == 1 and not equal(batch, gold)
  for i, row in enumerate(gold["row"]):
    example = run.data.train[row]
    tokens = np.array(batch.tokens[i])
    labels, mask = np.array(batch.labels[i]), np.array(batch.mask[i])
    prompt = example.prompt_length
    answer = labels[mask]
    assert mask.argmax() == prompt - 1  # the first response token is predicted
    assert 0 < len(answer) <= LENGTH - 80
    text = np.concatenate([example.tokens[:prompt], answer])
    again = pad_row(dataclasses.replace(example, tokens=text), LENGTH, 0)
    for name, values in (("tokens", tokens), ("labels", labels), ("mask", mask)):
      np.testing.assert_array_equal(again[name], values)


def test_the_loss_knows_nothing_of_the_sampling(run):
  """Guards F4: TRL#5731 trained with the sampling temperature."""
  frozen = run.cast.frozen
  params, rows = run.init().params, next(loader(run))
  rows = jax.tree.map(jnp.asarray, Batch.of(rows))
  rows = rows.replace(weights=token_weights(rows.mask))
  losses = []
  for t, p, k in ((1.0, 1.0, 0), (0.3, 0.5, 4)):
    own = plan(run, sample_temperature=t, sample_top_p=p, sample_top_k=k).method
    now = knobs_at(own.knobs, 0.0)
    key = jax.random.key(0)
    losses.append(own.loss(run.plan.models, params, frozen, rows, key, now)[0])
  assert losses[0] == losses[1]


def test_same_step_same_text(run, params):
  """Guards G3: all follows from the seed and the step."""
  one, _ = batch_of(run, params, 3)
  again, _ = batch_of(run, params, 3)
  other, _ = batch_of(run, params, 4)
  assert equal(one, again) and not equal(one, other)


def test_the_share_of_sampled_steps(run, params):
  """METHODS 4.2: lambda 0 is all gold, 1 all sampled, and between them a coin."""
  gold = next(loader(run))
  batch, figures = batch_of(plan(run, sampled_share=0.0), params)
  assert equal(batch, gold) and figures["sampled"] == 0
  half = Batches(plan(run, sampled_share=0.5), {})
  seen = [half.batch(step, params, gold)[1]["sampled"] for step in range(12)]
  again = [half.batch(step, params, gold)[1]["sampled"] for step in range(12)]
  assert 0 < sum(seen) < 12 and seen == again
  own = plan(run, "imitkd", sampled_share=None, end={"sampled_share": 0.0})
  assert own.method.sequences.share == Linear(1.0, 0.0)  # from the method's own start
  moving = plan(run, sampled_share=0.0, end={"sampled_share": 1.0})
  assert Batches(moving, {}).batch(0, params, gold)[1]["sampled"] == 0
  assert Batches(moving, {}).batch(19, params, gold)[1]["sampled"] == 1


def test_gold_lies_beside_where_it_is_wanted(run, params):
  gold = next(loader(run))
  batch, _ = batch_of(plan(run, gold_weight=0.2), params)
  assert equal(batch.gold, gold) and not equal(batch, gold)
  assert batch_of(run, params)[0].gold is None


@pytest.mark.parametrize("name", ["skd", "minillm"])
def test_what_both_models_write(run, params, name):
  """Their batches are complete, and a batch for several updates is written once."""
  other = plan(run, name, **({"teacher_mix": 0.5} if name == "minillm" else {}))
  writer = Batches(other, {})
  gold = next(loader(run))
  first, figures = writer.batch(0, params, gold)
  assert figures["sampled"] == 1 and figures["sampled_length"] > 0
  second, figures = writer.batch(1, params, gold)
  if name == "minillm":
    assert figures == {} and equal(first, second)
    assert {"old", "weight", "advantage", "reward"} == set(first.facts)
    fifth, _ = writer.batch(4, params, gold)
    assert not equal(first, fifth)
    # A resumed run goes on with the batch that it holds.
    resumed = Batches(other, {})
    assert jax.tree.structure(resumed.state()) == jax.tree.structure(writer.state())
    resumed.restore(writer.state())
    assert equal(resumed.batch(5, params, gold)[0], fifth)
  else:
    assert not equal(first, second)


def test_replayed_rows_are_those_that_were_written(run, params):
  writer = Batches(plan(run, replay=True, replay_capacity=20), {})
  data, seen = loader(run), set()
  for step in range(4):
    batch, figures = writer.batch(step, params, next(data))
    assert 0 <= figures["replay_age"] <= step
    seen |= {np.array(row).tobytes() for row in batch.tokens}
  state = writer.state()
  resumed = Batches(plan(run, replay=True, replay_capacity=20), {})
  resumed.restore(state)
  gold = next(data)
  assert equal(writer.batch(4, params, gold)[0], resumed.batch(4, params, gold)[0])


def test_answers_beforehand_are_resumed(run, tmp_path):
  """One a prompt, in order; a file cut off anywhere ends up the same."""
  run = plan(run, "seqkd")
  run = few_rows(run, slice(40))
  workdir = Workdir(tmp_path)
  path = workdir.samples("teacher")
  whole = beforehand.answers_of(run, "teacher", workdir)
  text = path.read_bytes()
  assert len(whole) == 40 == text.count(b"\n")
  for example, own in zip(whole, run.data.train, strict=True):
    prompt = own.prompt_length
    assert example.prompt_length == prompt < len(example.tokens)
    np.testing.assert_array_equal(example.tokens[:prompt], own.tokens[:prompt])
  lines = text.splitlines(keepends=True)
  path.unlink()
  part(path).write_bytes(b"".join(lines[:35]) + lines[35][:3])
  again = beforehand.answers_of(run, "teacher", workdir)
  assert path.read_bytes() == text
  assert all(
    np.array_equal(a.tokens, b.tokens) for a, b in zip(whole, again, strict=True)
  )


def test_answers_to_other_prompts_are_refused(run, tmp_path):
  """Data that changed between two starts must not meet the old answers."""
  run = plan(run, "seqkd")
  workdir = Workdir(tmp_path)
  path = workdir.samples("teacher")
  few = few_rows(run, slice(4))
  beforehand.answers_of(few, "teacher", workdir)
  other = few_rows(run, slice(4, 8))
  with pytest.raises(UserError, match="something else .prompts="):
    beforehand.answers_of(other, "teacher", workdir)
  path.write_text("[1, 2\n")
  with pytest.raises(UserError, match="damaged"):
    beforehand.answers_of(few, "teacher", workdir)


def test_keys_of_sampling_are_their_own(run, params):
  """Neither the models' first weights nor dropout share a key with sampled text."""
  seed = jax.random.key(run.settings.train.seed)
  born = [*jax.random.split(seed, 3), jax.random.fold_in(seed, 1)]
  drawn = [Batches(run, {})._key(step) for step in range(8)]
  keys = np.stack([jax.random.key_data(key) for key in [*born, *drawn]])
  assert len(np.unique(keys, axis=0)) == len({*map(bytes, keys)}) >= 11


def test_the_step_before_is_not_sampling(run, params, monkeypatch):
  """The clock of sampling starts when the parameters are there."""
  slow = jax.jit(lambda x: jax.lax.fori_loop(0, 300, lambda i, y: y @ y / 400, x))
  late = params | {
    "student": jax.tree.map(
      lambda p: p + 0 * slow(jnp.ones((400, 400)))[0, 0], params["student"]
    )
  }
  ready = []

  def generate(source, variables, *args, **kwargs):
    ready.append(all(leaf.is_ready() for leaf in jax.tree.leaves(variables)))
    return rollout.generate(source, variables, *args, **kwargs)

  monkeypatch.setattr(sampler, "generate", generate)
  _, figures = batch_of(run, late)
  assert ready == [True]
  assert "waited_s" not in figures and figures["sampling_s"] > 0


@settings(max_examples=30, deadline=None)
@given(capacity=st.integers(1, 9), pushes=st.lists(st.integers(1, 4), max_size=8))
def test_the_buffer_keeps_the_newest(capacity, pushes):
  """METHODS 4.5: first in first out, never more than its capacity."""
  buffer, written = Buffer(capacity, KINDS), []
  for step, count in enumerate(pushes):
    count = min(count, capacity)
    ids = np.arange(len(written), len(written) + count)
    rows = {name: np.repeat(ids[:, None], 3, axis=1) for name in ROW}
    rows["mask"] = rows["mask"] > -1
    buffer.push(rows, step)
    written += [(i, step) for i in ids]
  kept = dict(written[-capacity:])
  assert len(buffer) == len(kept)
  assert buffer.full == (len(kept) == capacity)
  if kept:
    copy = Buffer(capacity, KINDS)
    copy.restore(buffer.state())
    rows, steps = copy.draw(len(kept), np.random.default_rng(0))
    found = dict(zip(rows["tokens"][:, 0].tolist(), steps.tolist(), strict=True))
    assert found == kept
    many, _ = buffer.draw(3 * capacity, np.random.default_rng(0))
    assert set(many["tokens"][:, 0]) <= set(kept)


def test_the_adaptive_share_moves_only_by_its_rule():
  """METHODS 4.5: +.1 where the loss is .1 above its reference, which then moves."""
  share = Share(Replay(10, True, "decreasing", 0.1))
  for loss, phi in ((2.0, 0.0), (2.05, 0.0), (1.5, 0.0), (2.1, 0.1), (2.15, 0.1)):
    share.observe(loss)
    assert share.phi == phi
  copy = Share(Replay(10, True))
  copy.restore(share.state())
  for other in (share, copy):
    other.observe(2.3)
    assert other.phi == 0.2
  for _ in range(30):
    share.observe(share._reference + 1)
  assert share.phi == 1.0
  for ratio, at in (
    ("decreasing", (1, 0)),
    ("constant", (0.5, 0.5)),
    ("increasing", (0, 1)),
  ):
    share._replay = Replay(10, True, ratio)
    assert (share.fresh(0.0), share.fresh(1.0)) == at


def test_distillm_at_phi_zero_is_all_gold(run, params):
  batch, figures = batch_of(plan(run, "distillm"), params)
  assert equal(batch, next(loader(run))) and figures["sampled"] == 0
