"""Blocks of the teacher that learn: which are chosen, and that nothing else moves."""

import dataclasses
import functools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import losses, second_half, train
from trial import (
  KNOBS,
  TEACHER,
  LogitTrial,
  Setup,
  gradients,
  make_batch,
  make_logits,
  only_read,
)

from configs import debug
from okd_jax import methods, models
from okd_jax.data import train_loader
from okd_jax.errors import UserError
from okd_jax.models import Decoder, output
from okd_jax.models.adapters import Blocks
from okd_jax.run.batches import Batches
from okd_jax.run.build import build
from okd_jax.runtime.workdir import Workdir
from okd_jax.teachers import saliency

EVERY = (0, 1, 2)
some = pytest.mark.parametrize(
  "blocks",
  [
    (0, 2),
    pytest.param((1,), marks=pytest.mark.slow),
    pytest.param(EVERY, marks=pytest.mark.slow),
  ],
)


def own(*blocks):
  return Blocks(blocks)


def moved(tree, seed=0):
  """The tree, every number of it changed."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype("f"), tree)


def close(a, b):
  chex.assert_trees_all_close(a, b, atol=3e-5, rtol=1e-5)


@pytest.mark.parametrize("knobs", [{}, {"anchor_weight": 0.4, "gold_weight": 0.2}])
def test_the_losses_are_okds(knobs):
  """METHODS 5.4: OKD's, both of them, with another module."""
  logits, batch = make_logits(), make_batch()
  trials = LogitTrial("clda", **knobs), LogitTrial("okd", **knobs)
  one, other = (
    jax.value_and_grad(lambda x, t=t: t(*x, batch)[0])(logits) for t in trials
  )
  chex.assert_trees_all_equal(one, other)
  assert methods.used_knobs("clda") == methods.used_knobs("okd")
  assert [t.method.adapter for t in trials] == ["blocks", "lora"]


@some
def test_exactly_the_chosen_blocks_change(blocks):
  """The issue's must show; guards F1."""
  trial = Setup("clda", adapter=own(*blocks))
  before = jax.tree.map(np.array, trial.frozen)
  state, _ = trial.train(3)
  chex.assert_trees_all_equal(trial.frozen, before)
  frozen, adapter = trial.frozen["teacher"], state.params["adapter"]["teacher"]
  pair = before["teacher"]["layers"], own(*blocks).merge(frozen, adapter)["layers"]
  for old, new in zip(*map(jax.tree.leaves, pair), strict=True):
    assert old.dtype == new.dtype
    same = [(old[i] == new[i]).all() for i in EVERY]
    assert same == [i not in blocks for i in EVERY]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@some
def test_it_starts_as_the_plain_teacher(blocks, dtype):
  """METHODS 2.5 (a), exactly: the same weights, the same hidden states, norm 0."""
  trial, batch = Setup("clda", adapter=own(*blocks)), make_batch()
  frozen = jax.tree.map(lambda x: x.astype(dtype), trial.frozen["teacher"])
  adapter = own(*blocks).start(frozen)
  assert {x.dtype for x in jax.tree.leaves(adapter)} == {jnp.dtype("float32")}
  chex.assert_trees_all_equal(own(*blocks).merge(frozen, adapter), frozen)
  adapted, plain = (
    jax.jit(trial.models.teacher)({"teacher": frozen}, modules, batch)
    for modules in ({"teacher": adapter}, None)
  )
  np.testing.assert_array_equal(adapted.hidden, plain.hidden)
  norm = trial.models.teachers["teacher"].adapter_norm
  assert norm(frozen, adapter) == 0
  changed = jax.tree.map(lambda x: x + 0.5, adapter)
  count = sum(x.size for x in jax.tree.leaves(adapter))
  got = norm(frozen, changed)
  np.testing.assert_allclose(got, 0.5 * count**0.5, rtol=1e-5)


@some
def test_the_adapted_teacher_is_the_one_with_these_layers_replaced(blocks):
  """Also in part, with the plain one, and from any layer on."""
  trial, batch = Setup("clda", adapter=own(*blocks)), make_batch()
  frozen = trial.frozen["teacher"]
  adapter = moved(trial.params["adapter"]["teacher"])
  plain, adapted = Decoder(TEACHER), Decoder(TEACHER, own(*blocks))
  whole = {"params": own(*blocks).merge(frozen, adapter)}
  variables = {"params": frozen, "adapter": adapter}
  want = output(plain, whole, batch)
  adapters = {"teacher": adapter}
  both = trial.models.both(trial.frozen, adapters, batch)
  close(both[0], want)
  close(both[1], output(plain, {"params": frozen}, batch))
  close(trial.models.teacher(trial.frozen, adapters, batch), want)
  for cut in range(len(EVERY) + 1):
    below = output(adapted, variables, batch, stop=cut).hidden
    close(below, output(plain, whole, batch, stop=cut).hidden)
    close(output(adapted, variables, batch, hidden=below, start=cut), want)


@functools.cache
def whole_gradient():
  """The module's gradient where all layers of a plain decoder are the module."""
  trial = Setup("clda", adapter=own(*EVERY))

  def teacher(frozen, adapter, batch, mix=None):
    return output(Decoder(TEACHER), {"params": frozen | adapter}, batch, mix=mix)

  teachers = {"teacher": methods.Teacher(teacher)}
  trial.models = dataclasses.replace(trial.models, teachers=teachers)
  layers = {"layers": trial.frozen["teacher"]["layers"]}
  params = trial.params | {"adapter": {"teacher": layers}}
  return gradients(trial, params=params)


@some
def test_its_gradient_is_that_of_a_teacher_trained_whole(blocks):
  """METHODS 5.4: all blocks (share 1) are the whole stack; fewer are its rows."""
  got, want = gradients(Setup("clda", adapter=own(*blocks))), whole_gradient()
  rows = jax.tree.map(lambda x: x[np.array(blocks)], want["adapter"])
  close(got["adapter"], rows)
  close(got["student"], want["student"])
  assert all(jnp.abs(g).max() > 1e-6 for g in jax.tree.leaves(got["adapter"]))


def test_no_gradient_of_a_frozen_block_is_computed():
  """A weight gradient has its kernel's shape: one for each run of trained layers.

  Of this shape there are two kernels, the MLP's gate and up.
  """
  kernel = f"{TEACHER.hidden_size},{TEACHER.mlp_size}"
  counts = []
  for blocks in ((2,), (1,), (0, 2), EVERY):
    trial = Setup("clda", adapter=own(*blocks))
    text = str(
      jax.make_jaxpr(trial.train_step)(trial.state, trial.frozen, make_batch())
    )
    counts.append(text.count(f"f32[{kernel}] = dot_general"))
  assert counts == [2, 2, 4, 2]


def test_any_methods_teacher_may_have_such_blocks():
  """kd with blocks is clda, as kd with LoRA is okd."""
  wrapped, clda = (
    Setup("kd", module="blocks", adapter=own(0, 2)),
    Setup("clda", adapter=own(0, 2)),
  )
  close(gradients(wrapped), gradients(clda))
  assert wrapped.method.updates == (("student", "adapter"),)


def configure(**changes):
  config = debug.get_config()
  config.method.name = "clda"
  config.data.train = "embedded:eval"
  config.data.holdout = 8
  config.adapter.share = 0.34
  config.update_from_flattened_dict(changes)
  return config


LARGE = {"mesh.fsdp": 4, "teacher.dtype": "bfloat16", "teacher.model.num_layers": 6}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """On eight devices, the teacher split four ways and in bfloat16."""
  return build(configure(**LARGE), Workdir(tmp_path_factory.mktemp("run")))


def test_a_run_starts_from_the_chosen_blocks(run):
  choice, adapter = run.cast.choice, run.cast.adapter
  values = np.array(choice.saliency)
  assert choice.blocks == tuple(sorted(np.argsort(values)[:2]))
  assert adapter.blocks == choice.blocks and len(values) == 6
  state = run.init()
  assert jax.tree.structure(state) == jax.tree.structure(run.plan.abstract)
  own, frozen = state.params["adapter"]["teacher"], run.cast.frozen["teacher"]
  chex.assert_trees_all_equal(own, adapter.start(frozen))
  kernel = own["layers"]["mlp"]["up"]["kernel"]
  assert kernel.dtype == jnp.float32
  assert kernel.sharding.spec == jax.P(None, "fsdp", "tensor")
  assert set(state.params) == {"student", "adapter"}


def test_a_resumed_run_keeps_its_choice(run, tmp_path):
  """Another choice would not fit the checkpoint's blocks."""
  config, choice, workdir = configure(**LARGE), run.cast.choice, Workdir(tmp_path)
  other = tuple(i for i in range(6) if i not in choice.blocks)[:2]
  kept = saliency.Choice(0.34, other, choice.saliency)
  saliency.write(workdir.blocks, kept)
  again = build(config, workdir).cast
  assert again.choice == kept and again.adapter.blocks == other
  (tmp_path / "blocks.json").write_text('{"share": 0.34')
  with pytest.raises(UserError, match="blocks.json is damaged"):
    build(config, workdir)


@pytest.mark.parametrize(
  "name", [pytest.param("skd", marks=pytest.mark.slow), "minillm"]
)
def test_such_a_teacher_writes(run, name):
  """Mixtures and interleaving, from a cache: the adapted teacher, once it differs."""
  knobs = {"sampled_share": 1.0, "max_new_tokens": 6}
  knobs |= {"teacher_mix": 0.9, "teacher_temperature": 1.0, "accept_top": 1}
  method = methods.build(name, KNOBS | only_read(name, **knobs), "blocks")
  parts = dataclasses.replace(run, job=dataclasses.replace(run.job, method=method))
  params = run.init().params
  far = {"adapter": jax.tree.map(lambda x: x + 1.0, params["adapter"])}
  texts = []
  for own in (params, params | far):
    loader = train_loader(run.data.train, batch_size=8, length=128, pad_id=0, seed=0)
    batch, figures = Batches(parts, {}).batch(0, own, next(loader))
    assert figures["sampled"] == 1
    texts.append(np.asarray(batch.tokens))
  assert (texts[0] != texts[1]).any()


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"adapter.share": 0.0}, "adapter.share=0.0 must be above 0 and at most 1"),
    ({"adapter.share": 1.5}, "adapter.share=1.5 must be above 0"),
    ({"adapter.share": float("nan")}, "adapter.share=nan must be above 0"),
    ({"adapter.layers": 1}, "adapter.layers=1 does not go with adapter.kind='blocks'"),
    ({"adapter.text": "Hi!"}, "the teacher's adapter is 'blocks'"),
  ],
)
def test_what_a_run_refuses(changes, message, tmp_path):
  with pytest.raises(UserError) as error:
    build(configure(**changes), Workdir(tmp_path))
  assert message in str(error.value)


def test_what_is_refused_elsewhere(tmp_path):
  for blocks in ((), (1, 0), (1, 1)):
    with pytest.raises(UserError, match="ascending, each once"):
      own(*blocks)
  with pytest.raises(UserError, match="not all among the teacher's 3 layers"):
    own(3).check(TEACHER)
  with pytest.raises(UserError, match="each a whole number from 0"):
    own(-1, 0)
  with pytest.raises(UserError, match="saliency is not finite"):
    saliency.choose([1.0, float("nan")], 0.5)
  with pytest.raises(UserError, match="adapter.kind=blocks: sft here has no teacher"):
    methods.build("sft", KNOBS, "blocks")
  with pytest.raises(UserError, match="no PEFT adapter"):
    models.save_adapter(tmp_path / "a", {}, own(0), TEACHER, "base")


@pytest.mark.slow
def test_a_whole_run_and_its_second_half(tmp_path):
  """Guards H3: choice, blocks and moments come back; the exported teacher is whole."""
  whole, cut = tmp_path / "whole", tmp_path / "cut"
  parts = build(configure(), Workdir(tmp_path))
  base, shape = parts.cast.frozen["teacher"], parts.outline.teachers["teacher"]
  models.save(tmp_path / "base", base, shape, parts.data.tokenizer)
  flags = ["--config.method.name=clda", "--config.adapter.share=0.5"]
  flags += ["--config.teacher.model.hidden_size=0"]
  flags += [f"--config.teacher.path={tmp_path / 'base'}"]
  done = train(whole, *flags)
  assert "are to learn; saliency by block" in done.stderr
  assert f"teacher  {whole / 'teacher'}" in done.stdout
  assert "adapted teacher" in done.stdout and not (whole / "adapter").exists()
  assert "folder teacher holds" in (whole / "report.html").read_text()
  old, new = (
    models.load(path).params for path in (tmp_path / "base", whole / "teacher")
  )
  chosen = json.loads((whole / "blocks.json").read_text())["blocks"]
  assert len(chosen) == 2
  for name in set(new) - {"layers"}:
    chex.assert_trees_all_equal(new[name], old[name])
  pairs = map(jax.tree.leaves, (new["layers"], old["layers"]))
  for after, before in zip(*pairs, strict=True):
    same = [bool((after[i] == before[i]).all()) for i in EVERY]
    assert same == [i not in chosen for i in EVERY]
  assert "are to learn" not in second_half(whole, cut, *flags).stderr


@pytest.mark.slow
def test_eight_devices_give_the_losses_of_one(tmp_path):
  flags = ["--config.method.name=kd", "--config.adapter.kind=blocks"]
  train(tmp_path / "one", *flags)
  train(
    tmp_path / "eight",
    *flags,
    "--config.mesh.fsdp=4",
    "--config.mesh.data=2",
    devices=8,
  )
  one, eight = (losses(tmp_path / name) for name in ("one", "eight"))
  np.testing.assert_allclose(list(eight.values()), list(one.values()), rtol=1e-4)
  choices = [
    json.loads((tmp_path / name / "blocks.json").read_text())["blocks"]
    for name in ("one", "eight")
  ]
  assert choices[0] == choices[1]
