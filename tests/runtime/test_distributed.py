"""How processes find each other; real ones are in tests/run/test_processes.py."""

import importlib.util
import os
import signal
import subprocess
import sys

import jax
import pytest
from commands import ROOT, ended, environment, free_port

from okd_jax.errors import UserError
from okd_jax.runtime import distributed

SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "2"}
MPI = {"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:3", "OMPI_COMM_WORLD_SIZE": "4"}


@pytest.mark.parametrize(
  "environment, found",
  [
    ({}, ""),
    (SLURM, "SLURM"),
    (SLURM | {"SLURM_NTASKS": "1"}, ""),
    ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}, ""),  # no srun: a shell in a job
    (MPI, "Open MPI"),
    (MPI | {"OMPI_COMM_WORLD_SIZE": "1"}, ""),
    ({"TPU_WORKER_HOSTNAMES": "a,b"}, "TPU"),
    ({"TPU_WORKER_HOSTNAMES": "localhost"}, ""),
    ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, ""),  # any pod has it
  ],
)
def test_what_the_environment_says(environment, found, monkeypatch):
  monkeypatch.setattr(distributed, "_on_tpu_vm", lambda: False)
  assert distributed.detected(environment) == found


def test_an_indexed_job_needs_the_package_that_jax_asks(monkeypatch):
  pod = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}
  monkeypatch.setattr(distributed, "_on_tpu_vm", lambda: False)
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(UserError, match=r"pip install okd-jax\[k8s\]"):
    distributed.detected(pod)
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
  assert distributed.detected(pod) == "Kubernetes"


@pytest.mark.parametrize(
  "given",
  [
    ("", 2, 0),
    ("host", 2, 0),
    (":80", 2, 0),
    ("host:0", 2, 0),
    ("host:x", 2, 0),
    ("host:80", 2, 2),
    ("host:80", 2, -1),
    ("host:80", 0, 0),
  ],
)
def test_arguments_that_do_not_fit(given):
  with pytest.raises(UserError, match="--coordinator=.* --processes=.* --process="):
    with distributed.joined(*given):
      raise AssertionError("nobody can be joined")


def test_alone_nothing_is_joined(monkeypatch):
  monkeypatch.setattr(os, "environ", SLURM)
  monkeypatch.setattr(jax.distributed, "initialize", None)
  with distributed.joined(processes=1):
    assert distributed.found() == "8 devices (cpu)"


def test_how_runs_end_together():
  stopped = SystemExit(128 + signal.SIGTERM)
  assert distributed._agreed(stopped) and distributed._agreed(SystemExit(0))
  assert not distributed._agreed(SystemExit(2))
  assert distributed._status(stopped) == 143 and distributed._status(None) == 0
  assert distributed._status(UserError("no")) == 2
  assert distributed._status(ZeroDivisionError()) == 1


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
