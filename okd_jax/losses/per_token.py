"""Figures at every position, without ever holding [B, L, V]."""

from collections.abc import Callable, Mapping

import jax
from jaxtyping import Array, PyTree, Shaped

from okd_jax.losses.heads import in_shares, logits_of, place
from okd_jax.losses.layout import Hidden, Labels, Name, cut, join
from okd_jax.losses.outputs import (
  Logits,
  Output,
  fitting_chunk,
  of_capped,
)

_Labels = PyTree[Shaped[Array, "B C ..."]]


def per_token(
  function: Callable[[Logits, _Labels], PyTree[Array]],
  outputs: Mapping[Name, Output],
  labels: Labels,
  chunk: int,
) -> PyTree[Shaped[Array, "B L ..."]]:
  """A function of the logits at every position, chunk by chunk; not differentiated.

  Args:
    function: (logits by model [B, C, V], labels [B, C]) -> any tree of [B, C, …].
    outputs: hidden states and head of each model, by name.
    labels: any tree of arrays [B, L, …].
    chunk: positions of a row that have their logits in memory at once; 0 is
      `fitting_chunk`.

  Returns:
    The tree of the function's values at all positions [B, L, …].

  Source: as `weighted_sums`.

  >>> import jax.numpy as jnp
  >>> outputs = {"student": Output(jnp.array([[[1.0], [2.0]]]), jnp.array([[3.0]]))}
  >>> first = lambda logits, labels: logits["student"][..., 0] + labels
  >>> print(per_token(first, outputs, jnp.array([[0.5, 0.25]]), chunk=1))
  [[3.5  6.25]]
  """
  rows, length = jax.tree.leaves(labels)[0].shape[:2]
  chunk = chunk or fitting_chunk(outputs, rows)
  outputs = jax.lax.stop_gradient(dict(outputs))
  function = of_capped(function, outputs)
  states = {name: output.hidden for name, output in outputs.items()}
  heads = place({name: output.head for name, output in outputs.items()}, states)

  def body(_: None, inputs: tuple[Hidden, _Labels]) -> tuple[None, PyTree[Array]]:
    hidden, labels = inputs
    return None, function(logits_of(hidden, heads), labels)

  pieces = jax.tree.map(lambda x: cut(x, min(chunk, length)), (states, labels))
  _, values = jax.lax.scan(in_shares(body), None, pieces)
  return jax.tree.map(lambda x: join(x, length), values)
