"""Figures of single tokens: what several models say at each position of some texts."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree, Shaped

from okd_jax.data import PAD_ID, Example, eval_batches
from okd_jax.data.batch import Batch
from okd_jax.losses import per_token
from okd_jax.models import output
from okd_jax.text.source import Side

_MULTIPLE = 32  # rows are as wide as the longest text, rounded up: few programs

Logits = Mapping[str, Float[Array, "B C V"]]
Values = dict[str, Shaped[Array, "B C ..."]]


def at_positions(
  sides: Mapping[str, Side],
  examples: Sequence[Example],
  function: Callable[[Logits, Int[Array, "B C"]], Values],
  *,
  batch_size: int = 8,
  chunk: int = 0,
  shown: Callable[[Iterable], Iterable] = iter,
) -> tuple[dict[str, Shaped[np.ndarray, "N L ..."]], Bool[np.ndarray, "N L"]]:
  """A function of all models' logits at every position of every text.

  Args:
    sides: the models, by name; of sizes of vocabulary the smallest counts.
    examples: N texts; position t of a row is where token t + 1 is predicted.
    function: (logits by name, the next tokens) -> figures [B, C, …] by name.
    batch_size: rows at once.
    chunk: positions whose logits are in memory at once; 0 is what fits.
    shown: wraps the batches, for a progress bar.

  Returns:
    The figures in host memory, and which positions predict a token of the response.
  """
  width = max(len(example.tokens) for example in examples)
  width = -(-width // _MULTIPLE) * _MULTIPLE
  step = _compiled(sides, function, chunk)
  variables = {name: side.variables for name, side in sides.items()}
  found, masks = [], []
  batches = eval_batches(examples, batch_size=batch_size, length=width, pad_id=PAD_ID)
  for rows in shown(list(batches)):
    real = rows["row"] >= 0
    values = jax.device_get(step(variables, Batch.of(rows)))
    found.append({name: value[real] for name, value in values.items()})
    masks.append(rows["mask"][real])
  names = found[0]
  values = {name: np.concatenate([each[name] for each in found]) for name in names}
  return values, np.concatenate(masks)


def _compiled(sides: Mapping[str, Side], function: Callable, chunk: int) -> Callable:
  decoders = {name: side.decoder for name, side in sides.items()}

  def step(variables: Mapping[str, PyTree], batch: Batch) -> Values:
    outputs = {n: output(d, variables[n], batch) for n, d in decoders.items()}
    size = min(out.head.shape[0] for out in outputs.values())
    outputs = {n: out.first_ids(size) for n, out in outputs.items()}
    return per_token(function, outputs, batch.labels, chunk)

  return jax.jit(step)
