"""A tiny teacher and student, and everything a training step needs around them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from okd_jax import methods, models, optim
from okd_jax.adapters import AdapterConfig
from okd_jax.models import Decoder, ModelConfig
from okd_jax.step import init_state, train_step

VOCAB = 32
TEACHER = ModelConfig(vocab_size=VOCAB, hidden_size=16, num_layers=3, num_heads=2)
STUDENT = ModelConfig(vocab_size=VOCAB, hidden_size=8, num_layers=2, num_heads=2)
KNOBS = {
  "kd_ratio": 1.0,
  "temperature": 1.0,
  "divergence": "forward_kl",
  "teacher_divergence": "forward_kl",
  "beta": 0.5,
  "teacher_kl_weight": 0.25,
  "student_kl_weight": 1.0,
  "update": "simultaneous",
}
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
    **knobs,
  ):
    self.method = methods.build(name, KNOBS | knobs)
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
      self.optimizers["adapter"] = optim.build(schedule, lr_scale=lr_scale, **options)

    def teacher(frozen, modules, batch):
      if modules is None:
        return models.output(teacher_decoder, {"params": frozen}, batch)
      variables = {"params": frozen, "adapter": modules}
      return models.output(adapted_decoder, variables, batch)

    self.models = methods.Models(
      lambda params, batch, key: models.output(
        self.student_decoder, {"params": params}, batch, key
      ),
      teacher,
      chunk=5,
    )
    self.state = init_state(self.params, self.optimizers, jax.random.key(3))
    self.train_step = functools.partial(
      train_step,
      method=self.method,
      models=self.models,
      optimizers=self.optimizers,
      microbatches=microbatches,
    )
    self.step = jax.jit(self.train_step)

  def loss(self, params, batch):
    return self.method.loss(self.models, params, self.frozen, batch, jax.random.key(0))

  def train(self, steps, seed=0):
    """(final state, losses) after so many steps, each on a batch of its own."""
    state, losses = self.state, []
    for i in range(steps):
      state, metrics = self.step(state, self.frozen, make_batch(seed + i))
      losses.append(float(metrics["loss"]))
    return state, losses


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
