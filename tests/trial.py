"""A tiny teacher and student, and everything a training step needs around them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from okd_jax import methods
from okd_jax.config.schema import OptimSettings
from okd_jax.data.batch import Batch
from okd_jax.losses import Output, token_weights
from okd_jax.methods import Models, Teacher
from okd_jax.methods.base.knobs import knobs_at
from okd_jax.methods.base.method import told
from okd_jax.models import Decoder, ModelConfig
from okd_jax.models.adapters import Lora
from okd_jax.run import optim
from okd_jax.run.state import init_state
from okd_jax.run.step import train_step

VOCAB = 32
TEACHER = ModelConfig(vocab_size=VOCAB, hidden_size=16, num_layers=3, num_heads=2)
STUDENT = ModelConfig(vocab_size=VOCAB, hidden_size=8, num_layers=2, num_heads=2)
# The defaults of all knobs.
KNOBS = methods.defaults()
# kd on other text than the data's.
SAMPLED = {"distillm", "gkd", "imitkd", "seqkd", "skd"}
OPTIM = OptimSettings(weight_decay=1e-2, schedule="constant")


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
    adapter=Lora(rank=4),  # noqa: B008 (immutable)
    dropout=0.0,
    weight_decay=OPTIM.weight_decay,
    end=None,
    steps=20,
    module="",
    one_row_in=1,
    module_tokens=None,
    **knobs,
  ):
    self.method = methods.build(name, knobs | {"end": end or {}}, module)
    self.student_decoder = Decoder(student, dropout=dropout)
    # Larger weights than usual: a teacher worth distilling has opinions.
    plain = Decoder(TEACHER)
    base = _init(plain, 0)["params"]
    self.frozen = {"teacher": jax.tree.map(lambda x: 8 * x if x.ndim > 1 else x, base)}
    if self.method.several:
      other = jax.tree.map(lambda x: 5 * x, _init(plain, 5)["params"])
      self.frozen = {"a": self.frozen["teacher"], "b": other}
    self.params = {"student": _init(Decoder(student), 1)["params"]}
    self.settings = dataclasses.replace(OPTIM, lr=lr, weight_decay=weight_decay)
    schedule = optim.schedule(self.settings, 100)
    self.optimizers = {"student": optim.build(self.settings, schedule)}
    adapted = {}
    if self.method.adapts:
      decoder = Decoder(TEACHER, adapter)
      adapted = dict.fromkeys(self.frozen, decoder)
      self.params["adapter"] = {
        teacher: adapter.start(tree) or _init(decoder, 2)["adapter"]
        for teacher, tree in self.frozen.items()
      }
      self.optimizers["adapter"] = optim.build(self.settings, schedule, lr_scale)
    for tree, (init, rate) in self.method.trees.items():
      self.params[tree] = init(jax.random.key(4), 2, student.hidden_size)
      self.optimizers[tree] = optax.adam(rate)
    teachers = dict.fromkeys(self.frozen, plain)
    self.models = methods.apply_functions(
      self.student_decoder,
      teachers,
      adapted,
      chunk=5,
      one_row_in=one_row_in,
      module_tokens=module_tokens,
    )
    self.state = init_state(
      self.params, self.optimizers, jax.random.key(3), self.method.carried
    )
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
    now = knobs_at(self.method.knobs, progress) | told(self.method.carried)
    return self.method.loss(self.models, params, self.frozen, batch, key, now)

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
    self.method = methods.build(name, knobs | {"end": end or {}}, module)
    self.gold = gold  # whether gold rows lie beside sampled ones that want them

    def teacher(frozen, adapter, batch, mix=None):
      return _as_output(frozen if adapter is None else adapter)

    def both(frozen, adapter, batch):
      return _as_output(adapter), _as_output(frozen)

    names = ("a", "b") if self.method.several else ("teacher",)
    self.models = Models(
      lambda params, batch, key, mix=None: _as_output(params),
      dict.fromkeys(names, Teacher(teacher, both)),
      chunk,
    )
    self.trees = {
      name: init(jax.random.key(4), 2, VOCAB)
      for name, (init, _) in self.method.trees.items()
    }

  def __call__(self, student, teacher, base, batch, key=None, progress=0.0):
    """(loss, metrics) on a batch of labels and mask."""
    params = {"student": student, "adapter": {"teacher": teacher}} | self.trees
    frozen = {"teacher": teacher if base is None else base}
    if self.method.several:
      frozen = {"a": base, "b": teacher}
    key = jax.random.key(0) if key is None else key
    now = knobs_at(self.method.knobs, progress) | told(self.method.carried)
    batch = self.beside(params, frozen, batch, progress)
    return self.method.loss(self.models, params, frozen, batch, key, now)

  def beside(self, params, frozen, batch, progress=0.0):
    """The batch with its weights, and the same rows wherever others belong."""
    batch = weighted(batch, self.method.weights)
    return with_others(self, params, frozen, batch, self.gold, progress)


def with_others(trial, params, frozen, batch, gold=True, progress=0.0):
  """The batch, what it must know of its writers, and itself as every other batch."""
  plan, rows = trial.method.sequences, batch
  if plan.prepare and batch.partner is None:
    params, frozen = jax.lax.stop_gradient((params, frozen))
    key = jax.random.key(9)
    if not hasattr(trial, "prepare"):  # op by op it takes seconds
      trial.prepare = jax.jit(functools.partial(plan.prepare, trial.models))
    now = knobs_at(trial.method.knobs, progress)
    batch = trial.prepare(params, frozen, batch, key, now)
    batch = weighted(batch, trial.method.weights)
  return batch.replace(
    answers={name: rows for name in plan.beforehand},
    gold=rows if plan.gold and gold else None,
  )


def _as_output(logits):
  return Output(logits, jnp.eye(logits.shape[-1]))


def only_read(name, module="", **knobs):
  """Those of the knobs that the method reads: it refuses the others."""
  left = methods.unread(name, knobs, module)
  return {key: value for key, value in knobs.items() if key not in left}


def make_logits(seed=0, batch=8, length=12, vocab=VOCAB, scale=2.0):
  """(student, teacher, base), all different."""
  keys = jax.random.split(jax.random.key(seed), 3)
  shape = (batch, length, vocab)
  student, teacher = (scale * jax.random.normal(k, shape) for k in keys[:2])
  return student, teacher, teacher + jax.random.normal(keys[2], shape)


def unmeasured(models):
  """Models whose teachers' adapters have no norm: trees of logits are no modules."""
  teachers = {
    name: dataclasses.replace(teacher, adapter_norm=lambda *_: jnp.zeros(()))
    for name, teacher in models.teachers.items()
  }
  return dataclasses.replace(models, teachers=teachers)


def weighted(batch, weights=token_weights):
  """The batch, and the partners of its rows, as a method's loss gets them."""
  partner = None if batch.partner is None else weighted(batch.partner, weights)
  return batch.replace(weights=weights(batch.mask), partner=partner)


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


def grads_and_loss(setup, batch):
  """The step's own gradients, seen through an optimizer that hands them back."""
  optimizers = {name: optax.sgd(1.0) for name in setup.params}
  state = setup.state.replace(
    opt_state={n: t.init(setup.params[n]) for n, t in optimizers.items()}
  )
  keywords = setup.train_step.keywords | {"optimizers": optimizers}
  new, metrics = jax.jit(functools.partial(train_step, **keywords))(
    state, setup.frozen, batch
  )
  return jax.tree.map(jnp.subtract, state.params, new.params), metrics


def make_batch(seed=0, rows=8, length=12):
  """Rows of unequal length with a prompt of 1 to 4 tokens, padded on the right."""
  rng = np.random.default_rng(seed)
  ids = rng.integers(0, VOCAB, (rows, length + 1))
  count = rng.integers(5, length + 1, (rows, 1))  # predictions in the row
  prompt = rng.integers(1, 5, (rows, 1))
  position = np.arange(length)
  real = position < count
  return Batch(
    tokens=jnp.asarray(np.where(real, ids[:, :-1], 0).astype(np.int32)),
    labels=jnp.asarray(np.where(real, ids[:, 1:], 0).astype(np.int32)),
    mask=jnp.asarray((position >= prompt - 1) & real),
    segment_ids=jnp.asarray(real.astype(np.int32)),
  )


def kept_by_layers(loss, *arguments):
  """How many numbers each scan of layers keeps for the backward pass of `loss`.

  Of the first argument's gradient; backward scans keep none.
  """
  program = jax.make_jaxpr(jax.grad(loss))(*arguments).jaxpr
  scans = [eqn for eqn in program.eqns if eqn.primitive.name == "scan"]
  kept = []
  for eqn in scans:
    if eqn.params["reverse"]:
      continue
    body = eqn.params["jaxpr"]
    inner = getattr(body, "jaxpr", body).outvars  # jax 0.12 has no constants beside it
    # What is carried has the shape it has inside; what is kept is stacked over layers.
    pairs = zip(eqn.outvars, inner, strict=True)
    kept.append(sum(v.aval.size for v, w in pairs if v.aval.shape != w.aval.shape))
  return kept
