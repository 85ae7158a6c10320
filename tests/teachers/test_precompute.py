"""What a teacher gives for rows is computed batch by batch, and can be cut anywhere."""

import jax.numpy as jnp
import numpy as np
import pytest

from okd_jax.data import Example
from okd_jax.runtime import sharding
from okd_jax.teachers import precompute, store

COUNT, LENGTH = 150, 6


class Stop(Exception):
  pass


def fill(kept, heard=iter):
  """Each token plus the scalar 1, eight rows a batch."""
  rows = [Example(np.arange(n, n + 5), 2, ("a",), f"row {n}") for n in range(COUNT)]
  precompute.fill(
    rows,
    kept,
    lambda one, batch: {"hidden": (batch.tokens + one)[..., None]},
    "mask",
    frozen=jnp.int32(1),
    mesh=sharding.make_mesh(),
    length=LENGTH,
    batch_size=8,
    heard=heard,
  )


def test_a_stop_is_heard_between_two_batches(tmp_path):
  """Whole groups of batches stay, the rest is computed by whoever comes next."""
  kept = store.begin(tmp_path / "s", COUNT, {})
  passed = []

  def heard(starts):
    for start in starts:
      if start == 80:  # the second group begins at 64
        raise Stop
      passed.append(start)
      yield start

  with pytest.raises(Stop):
    fill(kept, heard)
  assert passed == list(range(0, 80, 8))
  again = store.Store(tmp_path / "s", COUNT, {})
  assert again.missing() == list(range(64, COUNT))
  passed.clear()
  fill(again, lambda starts: passed.extend(starts := list(starts)) or starts)
  assert passed == list(range(64, COUNT, 8)) and not again.missing()
  whole = store.begin(tmp_path / "whole", COUNT, {})
  fill(whole)
  for row in range(0, COUNT, 7):
    np.testing.assert_array_equal(whole.row(row)["hidden"], again.row(row)["hidden"])
