"""Processes of one run, on one machine."""

import subprocess
import sys

import pytest
from commands import ROOT, ended, environment, free_port

LATE = """
import sys, time
import jax, numpy as np
from okd_jax.runtime import distributed, sharding
number = int(sys.argv[1])
with distributed.joined("localhost:PORT", 2, number):
  mesh = sharding.make_mesh(2, 2, 1)
  for _ in range(2):
    distributed.connect(mesh)
  time.sleep(35 * number)
  whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  rows = sharding.put_batch(np.full((2, 1), 1 + number), mesh)
  print(jax.jit(lambda x: x.sum(), out_shardings=whole)(rows))
"""


@pytest.mark.slow
def test_a_process_may_compile_for_longer_than_gloo_waits(tmp_path):
  """Where a group's first collective came 30 s late, all processes were lost."""
  script = tmp_path / "late.py"
  script.write_text(LATE.replace("PORT", str(free_port())))
  started = [
    subprocess.Popen(
      [sys.executable, script, str(number)],
      cwd=ROOT,
      env=environment(2) | {"PYTHONPATH": str(ROOT)},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for number in range(2)
  ]
  for status, stdout, stderr in ended(started):
    assert status == 0, stderr[-3000:]
    assert stdout.split()[-1] == "6"
