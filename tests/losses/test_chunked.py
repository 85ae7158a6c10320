"""The chunked loss: dense values and gradients, without [B, L, V] in memory."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from okd_jax.bench.collectives import collectives
from okd_jax.losses import (
  Output,
  Part,
  cross_entropy,
  forward_kl,
  jensen_shannon,
  per_token,
  reverse_kl,
  sums_of_parts,
  token_weights,
  weighted_sums,
)
from okd_jax.losses.layout import partition
from okd_jax.losses.outputs import fitting_chunk
from okd_jax.runtime import sharding

BATCH, LENGTH, VOCAB = 3, 10, 31
LOSSES = {"forward": forward_kl, "reverse": reverse_kl, "jsd": jensen_shannon}


def make(seed=0, dtype=jnp.float32):
  keys = jax.random.split(jax.random.key(seed), 6)
  outputs = {
    name: Output(
      jax.random.normal(a, (BATCH, LENGTH, width)).astype(dtype),
      jax.random.normal(b, (VOCAB, width)).astype(dtype),
    )
    for name, width, a, b in (
      ("student", 8, keys[0], keys[1]),
      ("teacher", 6, keys[2], keys[3]),
    )
  }
  labels = jax.random.randint(keys[4], (BATCH, LENGTH), 0, VOCAB)
  mask = jax.random.bernoulli(keys[5], 0.6, (BATCH, LENGTH))
  return outputs, labels, mask


def test_parts_add_up_under_one_head():
  """Sums and gradients are those of each part alone, metrics of one part its own."""
  outputs, labels, mask = make()
  others, more_labels, more_mask = make(1)
  weights = [token_weights(mask), 0.5 * token_weights(more_mask)]

  def student_alone(logits, labels):
    return cross_entropy(logits["student"], labels), {"ce": labels * 1.0}

  def taught(logits, labels):
    loss = forward_kl(logits["teacher"], logits["student"])
    return loss, {"ce": loss, "kl": loss}

  def parts_of(outputs, hidden):
    rows = {"student": outputs["student"].replace(hidden=hidden)}
    return [
      Part(taught, outputs, labels, weights[0]),
      Part(student_alone, rows, more_labels, weights[1]),
    ]

  def joined(outputs, hidden):
    return sums_of_parts(parts_of(outputs, hidden), chunk=4)

  def apart(outputs, hidden):
    found = [weighted_sums(*part, chunk=4) for part in parts_of(outputs, hidden)]
    (loss, metrics), (more, theirs) = found
    return loss + more, metrics | {"ce": metrics["ce"] + theirs["ce"]}

  hidden = others["student"].hidden
  for function in (joined, apart):
    value = jax.value_and_grad(function, argnums=(0, 1), has_aux=True)
    found = jax.jit(value)(outputs, hidden), function(outputs, hidden)
    if function is joined:
      wanted = found
  chex.assert_trees_all_close(found, wanted, rtol=1e-5, atol=1e-6)
  assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(found[0][1]))


def both_sides(divergence):
  """A loss that trains both models, as OKD does."""
  stop = jax.lax.stop_gradient

  def token_loss(logits, labels):
    student, teacher = logits["student"], logits["teacher"]
    loss = divergence(stop(teacher), student) + 0.25 * divergence(
      stop(student), teacher
    )
    ce = cross_entropy(teacher, labels)
    return loss + 0.75 * ce, {"ce": ce}

  return token_loss


def dense(token_loss, outputs, labels, weights):
  logits = {name: output.logits() for name, output in outputs.items()}
  loss, metrics = token_loss(logits, labels)
  return (loss * weights).sum(), {k: (v * weights).sum() for k, v in metrics.items()}


def grads_of(function, token_loss, outputs, labels, weights, *rest):
  return jax.jit(
    jax.value_and_grad(
      lambda o: function(token_loss, o, labels, weights, *rest), has_aux=True
    )
  )(outputs)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 7, 9, 10, 11, 64])
def test_equals_the_dense_form(name, chunk):
  """Guards D1: every chunk size, non-divisors and sizes beyond the length."""
  outputs, labels, mask = make()
  weights = token_weights(mask)
  loss = both_sides(LOSSES[name])
  want = grads_of(dense, loss, outputs, labels, weights)
  got = grads_of(weighted_sums, loss, outputs, labels, weights, chunk)
  chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  ("vocab", "rows", "chunk"),
  [(50257, 8, 8), (50257, 4, 16), (512, 16, 512), (128256, 64, 1), (1 << 24, 1, 1)],
)
def test_a_chunk_that_fits(vocab, rows, chunk):
  """float32 logits of one model in 16 MiB of a CPU, at least a position a row."""
  head = jax.ShapeDtypeStruct((vocab, 2), jnp.float32)
  outputs = {"student": Output(None, head)}
  assert fitting_chunk(outputs, rows) == chunk
  mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  with jax.set_mesh(mesh):
    assert fitting_chunk(outputs, 4 * rows) == chunk


def sharded(shape, vocab):
  """The program of a loss and all its gradients, for so many devices."""
  mesh = sharding.make_mesh(*shape)
  rows = jax.NamedSharding(mesh, sharding.BATCH)
  head = jax.NamedSharding(mesh, sharding.spec("head", (vocab, 16), mesh))

  def loss(student, kernel, teacher, labels):
    outputs = {"student": Output(student, kernel), "teacher": Output(teacher, kernel)}
    weights = token_weights(labels > 0)
    return weighted_sums(both_sides(forward_kl), outputs, labels, weights, 8)[0]

  hidden = jax.ShapeDtypeStruct((8, 32, 16), jnp.float32)
  arguments = (
    hidden,
    jax.ShapeDtypeStruct((vocab, 16), jnp.float32),
    hidden,
    jax.ShapeDtypeStruct((8, 32), jnp.int32),
  )
  where = {
    "in_shardings": (rows, head, rows, rows),
    "out_shardings": (rows, head, rows),
  }
  with jax.set_mesh(mesh):
    gradients = jax.jit(jax.grad(loss, (0, 1, 2)), **where)
    return gradients.lower(*arguments).compile()


@pytest.mark.parametrize(
  "shape",
  [(8, 1, 1), (1, 8, 1), (2, 2, 2), (2, 1, 4)],
  ids=lambda s: "x".join(map(str, s)),
)
def test_no_chunk_waits_for_another_device(shape):
  """Before them all for two numbers and the head, after them for the gradients.

  Under tensor each chunk asks for some numbers of each position, and never for logits,
  even where the vocabulary comes out uneven.
  """
  found = collectives(sharded(shape, 65).as_text())
  of_rows = 8 * 8 // (shape[0] * shape[1]) * 4  # bytes of a number for each position
  inside = [each for each in found if each.in_loop]
  assert all(each.kind == "all-reduce" for each in inside)
  assert all(each.bytes <= 5 * of_rows for each in inside)
  assert bool(inside) == (shape[2] > 1)
  # How many tokens, the most chunks, both heads' gradients; under tensor both states'.
  states = 2 * 4 * 16 * 8 * 32 // (shape[0] * shape[1])
  once = [4, 4, 2 * 4 * 16 * -(-65 // shape[2])] + [states] * (shape[2] > 1)
  assert sorted(once) == sorted(
    each.bytes for each in found if each.kind == "all-reduce" and not each.in_loop
  )


@pytest.mark.parametrize("vocab", [64, 65])
def test_tensor_divides_the_logits(vocab):
  """Of a vocabulary of 50257, too, no device computes all logits."""
  one, four = (
    sharded(shape, vocab).cost_analysis()["flops"] for shape in ((2, 4, 1), (2, 1, 4))
  )
  # Four times the positions of a chunk, and a quarter of the vocabulary.
  assert 0.9 < four / one < 1.3


@settings(max_examples=40, deadline=None)
@given(st.lists(st.booleans(), min_size=12, max_size=12))
def test_a_partition_is_a_stable_sort(bits):
  first = np.array(bits).reshape(2, 6)
  order, places = partition(first)
  np.testing.assert_array_equal(order, np.argsort(~first, axis=1, stable=True))
  np.testing.assert_array_equal(places, np.argsort(order, axis=1))


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 999), chunk=st.integers(1, 12), valid=st.integers(0, 10))
def test_chunks_without_a_valid_token(seed, chunk, valid):
  """Guards B5, D1: axolotl gives NaN where its dense form gives .158; DLM NaN."""
  outputs, labels, _ = make(seed)
  mask = jnp.broadcast_to(jnp.arange(LENGTH) < valid, (BATCH, LENGTH))
  weights = token_weights(mask)
  loss = both_sides(forward_kl)
  want = grads_of(dense, loss, outputs, labels, weights)
  got = grads_of(weighted_sums, loss, outputs, labels, weights, chunk)
  chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-5)
  chex.assert_tree_all_finite(got)


@pytest.mark.parametrize("junk", [1e30, np.inf, np.nan])
def test_masked_positions_add_exactly_nothing(junk):
  """Guards B2, B5: NaN, infinities and absent labels there change no bit (axolotl)."""
  outputs, labels, mask = make()
  weights = token_weights(mask)
  loss = both_sides(forward_kl)
  poisoned = {
    name: output.replace(hidden=jnp.where(mask[..., None], output.hidden, junk))
    for name, output in outputs.items()
  }
  absent = jnp.where(mask, labels, -100)
  clean = grads_of(weighted_sums, loss, outputs, labels, weights, 4)
  dirty = grads_of(weighted_sums, loss, poisoned, absent, weights, 4)
  chex.assert_trees_all_equal(clean, dirty)
  chex.assert_tree_all_finite(dirty)
  for name in outputs:
    hidden = dirty[1][name].hidden
    np.testing.assert_array_equal(jnp.where(mask[..., None], 0, hidden), 0)


def test_who_is_not_differentiated_costs_no_gradient():
  """Guards F1: the frozen teacher's hidden states and head get no gradient at all."""
  outputs, labels, mask = make()
  weights = token_weights(mask)

  def matmuls(*names):
    def loss(trained):
      merged = outputs | trained
      return weighted_sums(both_sides(forward_kl), merged, labels, weights, 4)[0]

    trained = {name: outputs[name] for name in names}
    return str(jax.make_jaxpr(jax.grad(loss))(trained)).count("dot_general")

  # Two for the logits, two more for each model that is trained.
  assert matmuls("student") == 4
  assert matmuls("student", "teacher") == 6


def test_shared_head_accumulates_in_float32():
  """Guards D2: Liger added up bfloat16 weight gradients chunk by chunk."""
  outputs, labels, mask = make(dtype=jnp.bfloat16)
  weights = jnp.ones_like(mask, jnp.float32)
  exact = jax.tree.map(lambda x: x.astype(jnp.float32), outputs)
  loss = both_sides(forward_kl)
  got = grads_of(weighted_sums, loss, outputs, labels, weights, 1)[1]
  want = grads_of(dense, loss, exact, labels, weights)[1]
  for name in outputs:
    head = want[name].head
    assert got[name].head.dtype == jnp.bfloat16
    # One rounding of the result, and those of the bfloat16 factors; not one a chunk.
    error = jnp.abs(got[name].head.astype(jnp.float32) - head).max()
    assert error < 2**-7 * jnp.abs(head).max()


def test_no_array_holds_all_logits():
  """Guards D3: two float32 logits [B, L, V] at once (maxtext, tunix)."""
  batch, length, width, vocab = 2, 64, 8, 4096
  hidden = jnp.ones((batch, length, width))
  head = jnp.ones((vocab, width))
  labels = jnp.zeros((batch, length), jnp.int32)
  weights = jnp.ones((batch, length))

  def temporaries(chunk):
    def loss(hidden, head):
      outputs = {"student": Output(hidden, head), "teacher": Output(hidden + 1, head)}
      return weighted_sums(both_sides(forward_kl), outputs, labels, weights, chunk)[0]

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(hidden, head).compile()
    program = compiled.as_text()
    whole = (f"[{batch * length},{vocab}]", f"[{batch},{length},{vocab}]")
    assert (chunk == length) == any(shape in program for shape in whole)
    return compiled.memory_analysis().temp_size_in_bytes

  all_logits = 4 * batch * length * vocab
  assert temporaries(length) > 2 * all_logits
  assert temporaries(4) < all_logits


def test_loss_scales_with_its_cotangent():
  outputs, labels, mask = make()
  weights = token_weights(mask)

  def loss(o, factor):
    return factor * weighted_sums(both_sides(forward_kl), o, labels, weights, 4)[0]

  once, thrice = jax.grad(loss)(outputs, 1.0), jax.grad(loss)(outputs, 3.0)
  chex.assert_trees_all_close(thrice, jax.tree.map(lambda g: 3 * g, once), rtol=1e-6)


def test_a_cap_is_a_part_of_the_model():
  """Values, gradients and figures are those of capped logits."""
  model_cap = 0.7
  outputs, labels, mask = make()
  weights = token_weights(mask)
  capped = {**outputs, "student": outputs["student"].replace(cap=model_cap)}

  def loss_of(outputs):
    def token_loss(z, labels):
      return forward_kl(jax.lax.stop_gradient(z["teacher"]), z["student"]), {
        "largest": jnp.abs(z["student"]).max(-1)
      }

    return weighted_sums(token_loss, outputs, labels, weights, 4)

  def dense(outputs):
    logits = {name: output.logits() for name, output in outputs.items()}
    return jnp.sum(forward_kl(logits["teacher"], logits["student"]) * weights)

  (loss, figures), grads = jax.value_and_grad(
    lambda own: loss_of({**capped, "student": own}), has_aux=True
  )(capped["student"])
  want, dense_grads = jax.value_and_grad(lambda own: dense({**capped, "student": own}))(
    capped["student"]
  )
  chex.assert_trees_all_close((loss, grads), (want, dense_grads), rtol=1e-4, atol=1e-6)
  assert figures["largest"] <= model_cap < jnp.abs(outputs["student"].logits()).max()
  some = per_token(lambda z, _: jnp.abs(z["student"]).max(-1), capped, labels, 4)
  assert some.max() <= model_cap
