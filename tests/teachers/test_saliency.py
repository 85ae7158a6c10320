"""Which blocks of a teacher matter least: the measure and the choice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trial import TEACHER, Setup, make_batch

from okd_jax.models import Decoder, output
from okd_jax.runtime import sharding
from okd_jax.teachers import saliency

EVERY = (0, 1, 2)


def measure(frozen, batches, **mesh):
  mesh = sharding.make_mesh(**mesh)
  return saliency.block_saliency(Decoder(TEACHER), frozen, batches, mesh, 5)


def rows(seed):
  return jax.tree.map(np.asarray, make_batch(seed))


def test_saliency_is_the_formula():
  """METHODS 5.4: mean |theta dCE/dtheta|, by dense logits and one gradient."""
  frozen, batches = Setup("clda").frozen["teacher"], [rows(0), rows(1)]
  both = jax.tree.map(lambda *rows: np.concatenate(rows), *batches)

  def ce(layers):
    out = output(Decoder(TEACHER), {"params": frozen | {"layers": layers}}, both)
    logits = jax.nn.log_softmax(out.logits())
    nll = -jnp.take_along_axis(logits, both.labels[..., None], -1)[..., 0]
    return jnp.where(both.mask, nll, 0).sum() / both.mask.sum()

  grads = jax.grad(ce)(frozen["layers"])
  want = []
  for block in EVERY:
    products = [
      np.abs(np.float64(x[block]) * np.float64(g[block])).ravel()
      for x, g in zip(*map(jax.tree.leaves, (frozen["layers"], grads)), strict=True)
    ]
    want.append(np.concatenate(products).mean())
  np.testing.assert_allclose(measure(frozen, batches), want, rtol=1e-4)
  # One number of it by finite differences: all of a norm's scale at once.
  scale, step = frozen["layers"]["mlp_norm"]["scale"], 2e-3

  def along(sign):
    new = scale.at[1].multiply(1 + sign * step)
    layers = frozen["layers"] | {"mlp_norm": {"scale": new}}
    return float(ce(layers))

  slope = (along(1) - along(-1)) / (2 * step)
  inner = (scale[1] * grads["mlp_norm"]["scale"][1]).sum()
  np.testing.assert_allclose(slope, inner, rtol=1e-2)


def test_saliency_depends_on_no_batch_size_and_no_mesh():
  """Guards C2, C3, B5: unequal rows, rows that count for nothing, eight devices."""
  frozen, whole = Setup("clda").frozen["teacher"], rows(0)
  empty = jax.tree.map(np.zeros_like, whole)
  halves = []
  for first in (0, 4):
    half = jax.tree.map(lambda x: x[first : first + 4], whole)  # noqa: B023
    nothing = jax.tree.map(lambda x: x[:4], empty)
    halves.append(jax.tree.map(lambda *x: np.concatenate(x), half, nothing))
  want = measure(frozen, [whole])
  np.testing.assert_allclose(measure(frozen, [*halves, empty]), want, rtol=1e-4)
  mesh = sharding.make_mesh(2, 2, 2)
  split = jax.device_put(frozen, sharding.shardings(frozen, mesh))
  got = measure(split, [whole], data=2, fsdp=2, tensor=2)
  np.testing.assert_allclose(got, want, rtol=1e-4)


@pytest.mark.parametrize("dead", EVERY)
def test_a_dead_block_is_chosen(dead):
  """METHODS 5.4: what adds nothing to the residual stream is salient in nothing."""
  frozen = Setup("clda").frozen["teacher"]
  layers = jax.tree.map(lambda x: x, frozen["layers"])
  for part, name in (("attention", "out"), ("mlp", "down")):
    layer = layers[part][name]
    layers[part][name] = jax.tree.map(lambda x: x.at[dead].set(0), layer)
  values = measure(frozen | {"layers": layers}, [rows(0)])
  assert values[dead] == 0 and np.delete(values, dead).min() > 1e-6
  assert saliency.choose(values, 0.25).blocks == (dead,)


@pytest.mark.parametrize(
  "values, share, blocks",
  [
    ([4, 3, 2, 1], 0.25, (3,)),
    ([4, 3, 2, 1], 0.5, (2, 3)),
    ([1, 4, 2, 3], 0.5, (0, 2)),
    ([4, 3, 2, 1], 1.0, (0, 1, 2, 3)),
    ([4, 3, 2, 1], 1e-9, (3,)),
    ([1, 1, 1, 1], 0.5, (0, 1)),  # ties: the lowest
    ([3, 2, 1], 0.5, (1, 2)),  # 1.5 blocks are two
  ],
)
def test_the_least_salient_share_is_chosen(values, share, blocks):
  assert saliency.choose(values, share).blocks == blocks
