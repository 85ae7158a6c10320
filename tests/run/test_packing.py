"""Several texts in a row: losses, gradients and runs as in rows of their own."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import call, losses, second_half, train
from small import built, config, step_of
from small import kept as kept_trunk
from trial import Setup, make_batch, weighted

from okd_jax import METHODS
from okd_jax.data import each_alone, pack, train_loader
from okd_jax.data.batch import Batch
from okd_jax.errors import UserError
from okd_jax.models.adapters import Blocks, Prefix, Prompt
from okd_jax.run.batches import Batches
from okd_jax.run.stored import write as write_store

slow = pytest.mark.slow
LONG = {"data.max_length": 256}
PACK = LONG | {"data.pack": True}


def packed(batch, length):
  """The rows of a batch, without their padding, in fewer rows of another length."""
  real = np.asarray(batch.segment_ids) > 0
  rows = pack(real.sum(1), length)
  given = batch.rows
  out = {k: np.zeros((len(rows), length), v.dtype) for k, v in given.items()}
  for i, texts in enumerate(rows):
    start = 0
    for segment, text in enumerate(texts, 1):
      stop = start + real[text].sum()
      for name, values in given.items():
        out[name][i, start:stop] = np.asarray(values)[text][real[text]]
      out["segment_ids"][i, start:stop] = segment
      start = stop
  return Batch.of(jax.tree.map(jnp.asarray, out))


@pytest.mark.parametrize(
  "name, options",
  [
    ("sft", {}),
    ("kd", {"top_k": 4}),
    pytest.param("okd", {"anchor_weight": 0.3}, marks=slow),
    pytest.param("okd", {"adapter": Prefix(length=3)}, marks=slow),
    pytest.param("okd", {"adapter": Prompt(length=3)}, marks=slow),
    pytest.param("clda", {"adapter": Blocks(blocks=(1,))}, marks=slow),
    pytest.param("rlkd", {}, marks=slow),
    pytest.param("ensemble", {"weighting": "gated"}, marks=slow),
  ],
)
def test_same_loss_and_gradients(name, options):
  """Guards B6: neither attention nor positions nor means know of the neighbours.

  maxtext's offline teacher attended across documents.
  """
  trial, alone = Setup(name, **options), make_batch()
  together = packed(alone, 28)
  assert len(together.tokens) < len(alone.tokens)
  assert int(together.segment_ids.max()) > 1
  value = jax.jit(jax.value_and_grad(trial.loss, has_aux=True))
  want, got = (value(trial.params, weighted(batch)) for batch in (alone, together))
  chex.assert_trees_all_close(got, want, rtol=2e-4, atol=2e-5)
  # Rows as wholes are something else, where a text sees those before it.
  blind = together.replace(segment_ids=jnp.minimum(together.segment_ids, 1))
  with pytest.raises(AssertionError):
    other = value(trial.params, weighted(blind))
    chex.assert_trees_all_close(other, want, rtol=2e-3, atol=2e-4)


def first_steps(run, count=2):
  """(metrics of the last step, parameters), as in the loop of a run."""
  size, length = run.settings.train.batch_size, run.settings.data.max_length
  loader = train_loader(
    run.data.train,
    batch_size=size,
    length=length,
    pad_id=0,
    seed=0,
    packs=run.data.packs,
  )
  with jax.set_mesh(run.mesh):
    kept = kept_trunk(run)
    sampler, state = Batches(run, {}, kept), run.init()
    step = step_of(run, 1)
    for i in range(count):
      batch, _ = sampler.batch(i, state.params, next(loader))
      state, values = step(state, run.cast.frozen, batch)
  return values, state.params


@slow
def test_a_stored_teacher_of_unpacked_rows(tmp_path):
  """What is stored belongs to texts: rows may hold however many of them."""
  live = built(config(**PACK), tmp_path)
  assert max(map(len, live.data.packs)) > 1
  alone = built(config(**LONG), tmp_path)
  write_store(alone, tmp_path / "all", 0, "float32")
  store = {"teacher.cache": str(tmp_path / "all")}
  stored = built(config(**PACK | store), tmp_path)
  chex.assert_trees_all_close(
    first_steps(stored)[0], first_steps(live)[0], rtol=1e-4, atol=1e-5
  )


@slow
def test_a_kept_trunk_of_packed_rows(tmp_path):
  okd = PACK | {"method.name": "okd", "adapter.layers": 1}
  whole = built(config(**okd), tmp_path)
  kept = built(config(**okd | {"teacher.trunk": "memory"}), tmp_path)
  values, want = first_steps(kept)[0], first_steps(whole)[0]
  assert abs(float(values["loss"] / want["loss"]) - 1) < 2e-5


def test_an_epoch_is_fewer_rows(tmp_path):
  epoch = {"train.steps": 0, "train.epochs": 1.0}
  alone, together = (
    built(config(**epoch | changes), tmp_path) for changes in (LONG, PACK)
  )
  assert list(alone.data.packs) == list(each_alone(alone.data.train))
  texts = sorted(i for row in together.data.packs for i in row)
  assert texts == list(range(len(together.data.train)))
  size = together.settings.train.batch_size
  assert together.plan.steps == -(-len(together.data.packs) // size) < alone.plan.steps


@pytest.mark.parametrize("name", METHODS)
def test_who_takes_packed_rows(name, tmp_path):
  """Refused before anything is loaded, or trained in the test above or like one."""
  refused = {"distillm", "distillm2", "fdistill", "gkd", "imitkd", "minillm", "mixkd"}
  refused |= {"promptkd", "seqkd", "skd"}
  settings = config(**PACK | {"method.name": name, "teacher.path": "/nowhere"})
  settings.teacher.model.hidden_size = 0
  wrong = r"data\.pack: .*; set data\.pack=False" if name in refused else "/nowhere"
  with pytest.raises(UserError, match=wrong):
    built(settings, tmp_path)


@pytest.mark.parametrize(
  "changes",
  [
    {"method.weighting": "gated", "method.gate_per": "example"},
    {"method.weighting": "reinforced"},
  ],
)
def test_ensembles_that_look_at_whole_rows(changes, tmp_path):
  settings = config(**PACK | {"method.name": "ensemble"} | changes)
  with pytest.raises(UserError, match="looks at rows as wholes"):
    built(settings, tmp_path)


@slow
def test_a_resumed_run_of_packed_rows(tmp_path):
  """Bit for bit; and its rows are full."""
  changes = "--config.data.pack=True", "--config.data.max_length=256"
  done = train(tmp_path / "whole", *changes)
  assert " rows of 256 tokens, " in done.stderr
  second_half(tmp_path / "whole", tmp_path / "cut", *changes)
  assert losses(tmp_path / "whole")
  call(
    "main", "--config=configs/debug.py", "--workdir=x", "--config.data.pack=2", status=2
  )
