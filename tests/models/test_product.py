"""`project` is x @ kernel, whichever side learns."""

import chex
import jax
import jax.numpy as jnp
import pytest

from okd_jax.models.product import project


def matmul(x, kernel):
  return x @ kernel


def draw(*shape):
  return jax.random.normal(jax.random.key(len(shape)), shape)


@pytest.mark.parametrize("leading", [(), (5,), (2, 5), (2, 3, 5)])
def test_value_and_gradients_are_those_of_a_product(leading):
  x, kernel, dy = draw(*leading, 7), draw(7, 4), draw(*leading, 4)
  want, pull = jax.vjp(matmul, x, kernel)
  got, own = jax.vjp(project, x, kernel)
  chex.assert_trees_all_equal(got, want)
  # Sums over the leading axes are made in any order: a rounding of their terms, of 1.
  chex.assert_trees_all_close(own(dy), pull(dy), rtol=1e-6, atol=1e-6)


def test_gradients_keep_the_dtype():
  x, kernel = draw(2, 5, 7).astype(jnp.bfloat16), draw(7, 4).astype(jnp.bfloat16)
  grads = jax.grad(lambda *a: project(*a).sum(), (0, 1))(x, kernel)
  assert grads[0].dtype == grads[1].dtype == jnp.bfloat16


@pytest.mark.parametrize("side", [0, 1])
def test_only_what_the_backward_pass_needs_is_kept(side):
  """A frozen kernel costs no copy of its inputs: of the two one side is kept."""
  x, kernel = draw(2, 5, 7), draw(7, 4)
  _, pull = jax.vjp(lambda a: project(*((a, kernel), (x, a))[side]), (x, kernel)[side])
  kept = [leaf.shape for leaf in jax.tree.leaves(pull) if leaf.size > 1]
  assert kept == [(kernel, x)[side].shape]


def test_in_a_scan_over_layers_and_under_vmap():
  kernels, x = draw(3, 7, 7), draw(2, 5, 7)

  def loss(product, kernels):
    step = jax.checkpoint(lambda h, k: (jnp.tanh(product(h, k)), None))
    return (jax.lax.scan(step, x, kernels)[0] ** 2).sum()

  want, got = (jax.grad(lambda k, f=f: loss(f, k))(kernels) for f in (matmul, project))
  chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-5)
  want, got = (jax.vmap(f, (None, 0))(x, kernels) for f in (matmul, project))
  chex.assert_trees_all_close(got, want, rtol=1e-6)
