"""A tiny teacher and student, and everything a training step needs around them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from configs import default
from okd_jax import methods
from okd_jax.losses import Output, token_weights
from okd_jax.models import Decoder, ModelConfig
from okd_jax.models.adapters import AdapterConfig, take_blocks
from okd_jax.run import optim
from okd_jax.run.step import init_state, train_step

VOCAB = 32
TEACHER = ModelConfig(vocab_size=VOCAB, hidden_size=16, num_layers=3, num_heads=2)
STUDENT = ModelConfig(vocab_size=VOCAB, hidden_size=8, num_layers=2, num_heads=2)
# The defaults of the recipes.
KNOBS = {
  k: v for k, v in default.get_config().method.items() if k not in ("name", "end")
}
# kd on other text than the data's.
SAMPLED = {"distillm", "gkd", "imitkd", "seqkd", "skd"}
OPTIM = dict(b1=0.9, b2=0.999, eps=1e-8, weight_decay=1e-2, clip=1.0)


class Setup:
  """One method on the tiny models; `step` is its (unsharded) training step."""

  def __init__(
    self,
    name="okd",
    *,
    lr=1e-2,
    lr_scale=1.0,
    microbatches=1,
    student=STUDENT,
    adapter=AdapterConfig(rank=4),  # noqa: B008 (immutable)
    dropout=0.0,
    weight_decay=OPTIM["weight_decay"],
    end=None,
    steps=20,
    module="",
    **knobs,
  ):
    self.method = methods.build(name, KNOBS | knobs | {"end": end or {}}, module)
    teacher_decoder = Decoder(TEACHER)
    adapted_decoder = Decoder(TEACHER, adapter)
    self.student_decoder = Decoder(student, dropout=dropout)
    # Larger weights than usual: a teacher worth distilling has opinions.
    base = _init(teacher_decoder, 0)["params"]
    self.frozen = jax.tree.map(lambda x: 8 * x if x.ndim > 1 else x, base)
    self.params = {"student": _init(Decoder(student), 1)["params"]}
    options = OPTIM | {"weight_decay": weight_decay}
    schedule = optim.schedule("constant", lr, 100, 0, 0.0)
    self.optimizers = {"student": optim.build(schedule, **options)}
    if self.method.teacher == "adapted":
      self.params["adapter"] = _init(adapted_decoder, 2)["adapter"]
      if adapter.kind == "blocks":
        own = take_blocks(self.frozen["layers"], adapter)
        self.params["adapter"] = {"layers": own}
      self.optimizers["adapter"] = optim.build(schedule, lr_scale=lr_scale, **options)

    decoders = {"teacher": teacher_decoder, "adapted": adapted_decoder}
    if self.method.teacher == "several":
      decoders = {"teacher:a": teacher_decoder, "teacher:b": teacher_decoder}
      other = jax.tree.map(lambda x: 5 * x, _init(teacher_decoder, 5)["params"])
      self.frozen = {"a": self.frozen, "b": other}
    for tree, (init, rate) in self.method.trees.items():
      self.params[tree] = init(jax.random.key(4), 2, student.hidden_size)
      self.optimizers[tree] = optax.adam(rate)
    self.models = methods.apply_functions(
      decoders | {"student": self.student_decoder}, chunk=5
    )
    self.state = init_state(self.params, self.optimizers, jax.random.key(3))
    self.train_step = functools.partial(
      train_step,
      method=self.method,
      models=self.models,
      optimizers=self.optimizers,
      microbatches=microbatches,
      steps=steps,
    )
    self.step = jax.jit(self.train_step)

  def loss(self, params, batch, key=None, progress=0.0):
    """The method's own loss, on a batch that has its weights."""
    key = jax.random.key(0) if key is None else key
    knobs = self.method.knobs_at(progress)
    return self.method.loss(self.models, params, self.frozen, batch, key, knobs)

  def train(self, steps, seed=0):
    """(final state, losses) after so many steps, each on a batch of its own."""
    state, losses = self.state, []
    for i in range(steps):
      batch = make_batch(seed + i)
      batch = with_others(self, state.params, self.frozen, batch)
      state, metrics = self.step(state, self.frozen, batch)
      losses.append(float(metrics["loss"]))
    return state, losses


class LogitTrial:
  """A method on models whose parameters are their logits: no decoder in the way.

  student, teacher (adapted, where the method adapts) and base, the frozen one, are
  [B, L, V]. A plain method sees `base` as its teacher, unless that is None. One of
  several has `base` as teacher 'a', `teacher` as 'b'; `trees` is what else it trains.
  """

  def __init__(self, name, *, chunk=5, end=None, module="", gold=True, **knobs):
    self.method = methods.build(name, KNOBS | knobs | {"end": end or {}}, module)
    self.gold = gold  # whether gold rows lie beside sampled ones that want them

    def teacher(frozen, adapter, batch, mix=None):
      return _as_output(frozen if adapter is None else adapter)

    self.models = methods.Models(
      lambda params, batch, key, mix=None: _as_output(params),
      teacher,
      lambda frozen, adapter, batch: (_as_output(adapter), _as_output(frozen)),
      chunk,
    )
    self.models = dataclasses.replace(
      self.models, named={"a": self.models, "b": self.models}
    )
    self.trees = {
      name: init(jax.random.key(4), 2, VOCAB)
      for name, (init, _) in self.method.trees.items()
    }

  def __call__(self, student, teacher, base, batch, key=None, progress=0.0):
    """(loss, metrics) on a batch of labels and mask."""
    params = {"student": student, "adapter": teacher} | self.trees
    frozen = teacher if base is None else base
    if self.method.teacher == "several":
      frozen = {"a": base, "b": teacher}
    key = jax.random.key(0) if key is None else key
    knobs = self.method.knobs_at(progress)
    batch = self.beside(params, frozen, batch)
    return self.method.loss(self.models, params, frozen, batch, key, knobs)

  def beside(self, params, frozen, batch):
    """The batch with its weights, and the same rows wherever others belong."""
    batch = {k: batch[k] for k in ("labels", "mask", "segment_ids", "tokens")}
    batch["weights"] = self.method.weights(batch["mask"])
    return with_others(self, params, frozen, batch, self.gold)


def with_others(trial, params, frozen, batch, gold=True):
  """The batch, what it must know of its writers, and itself as every other batch."""
  plan = trial.method.sequences
  others = {name: batch for name in plan.beforehand}
  if plan.gold and gold:
    others["gold"] = batch
  if plan.prepare:
    params, frozen = jax.lax.stop_gradient((params, frozen))
    key = jax.random.key(9)
    if not hasattr(trial, "prepare"):  # op by op it takes seconds
      trial.prepare = jax.jit(functools.partial(plan.prepare, trial.models))
    batch = trial.prepare(params, frozen, batch, key)
  return batch | others


def _as_output(logits):
  return Output(logits, jnp.eye(logits.shape[-1]))


def make_logits(seed=0, batch=8, length=12, vocab=VOCAB, scale=2.0):
  """(student, teacher, base), all different."""
  keys = jax.random.split(jax.random.key(seed), 3)
  shape = (batch, length, vocab)
  student, teacher = (scale * jax.random.normal(k, shape) for k in keys[:2])
  return student, teacher, teacher + jax.random.normal(keys[2], shape)


def weighted(batch):
  """The batch as a method's loss gets it."""
  return batch | {"weights": token_weights(batch["mask"])}


def gradients(setup, batch=None, params=None):
  """The loss's gradient in every tree of `params`."""
  batch = weighted(make_batch() if batch is None else batch)
  params = setup.params if params is None else params
  return jax.jit(jax.grad(lambda p: setup.loss(p, batch)[0]))(params)


def total(tree):
  """The sum of all absolute values."""
  return sum(float(jnp.abs(leaf).sum()) for leaf in jax.tree.leaves(tree))


def _init(decoder, seed):
  """Fresh copies, since a step donates what it is given."""
  return jax.tree.map(jnp.copy, _first(decoder, seed))


@functools.cache
def _first(decoder, seed):
  tokens = jnp.zeros((1, 1), jnp.int32)
  return jax.jit(decoder.init)(jax.random.key(seed), tokens)


def make_batch(seed=0, rows=8, length=12):
  """Rows of unequal length with a prompt of 1 to 4 tokens, padded on the right."""
  rng = np.random.default_rng(seed)
  ids = rng.integers(0, VOCAB, (rows, length + 1))
  count = rng.integers(5, length + 1, (rows, 1))  # predictions in the row
  prompt = rng.integers(1, 5, (rows, 1))
  position = np.arange(length)
  real = position < count
  batch = {
    "tokens": np.where(real, ids[:, :-1], 0).astype(np.int32),
    "labels": np.where(real, ids[:, 1:], 0).astype(np.int32),
    "mask": (position >= prompt - 1) & real,
    "segment_ids": real.astype(np.int32),
  }
  return {name: jnp.asarray(value) for name, value in batch.items()}


def kept_by_layers(loss, *arguments):
  """How many numbers each scan of layers keeps for the backward pass of `loss`.

  Of the first argument's gradient; backward scans keep none.
  """
  program = jax.make_jaxpr(jax.grad(loss))(*arguments).jaxpr
  scans = [eqn for eqn in program.eqns if eqn.primitive.name == "scan"]
  return [
    sum(var.aval.size for var in eqn.outvars[eqn.params["num_carry"] :])
    for eqn in scans
    if not eqn.params["reverse"]
  ]
