"""Commands run as a user runs them, and what they leave behind."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
EXPORTED = ("student", "adapter", "teacher", "student_adapter")
CACHE = ROOT / ".pytest_cache" / "xla"
QUICK = [
  "--config.train.steps=6",
  "--config.checkpoint.every=2",
  "--config.eval.every=3",
  "--config.eval.limit=8",
  "--config.eval.generate_limit=2",
  "--config.eval.max_new_tokens=4",
  "--config.data.max_length=48",
  "--config.data.max_prompt_length=40",
  "--config.data.overlong_prompt=truncate",
  "--config.train.log_every=1",
]


def environment(devices=1, compiles=False):
  """A user's own: one device unless asked for, programs cached between runs.

  compiles: name every program that is compiled in stderr.
  """
  env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
  if devices > 1:
    env["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
  env["JAX_LOG_COMPILES"] = str(int(compiles))
  return env | {"JAX_COMPILATION_CACHE_DIR": str(CACHE)}


def command(module, *arguments):
  return [sys.executable, "-m", f"okd_jax.{module}", *map(str, arguments)]


def call(module, *arguments, devices=1, compiles=False, status=0, timeout=300):
  done = subprocess.run(
    command(module, *arguments),
    cwd=ROOT,
    env=environment(devices, compiles),
    capture_output=True,
    text=True,
    timeout=timeout,
  )
  assert done.returncode == status, done.stderr[-3000:]
  return done


def train(workdir, *changes, **options):
  return call(
    "main",
    "--config=configs/debug.py",
    f"--workdir={workdir}",
    *QUICK,
    *changes,
    **options,
  )


def second_half(whole, cut, *changes):
  """A finished run of QUICK, cut back to step 4 in another folder, gone on with there.

  Asserts that it ends as the whole one did, to the last bit.
  """
  shutil.copytree(whole, cut)
  exported = [name for name in EXPORTED if (whole / name).exists()]
  for name in ("checkpoints/6", *exported):
    shutil.rmtree(cut / name)
  (cut / "report.html").unlink()
  done = train(cut, *changes)
  assert "resuming at step 4" in done.stderr
  assert losses(whole) == losses(cut)
  for name in exported:
    assert same_folder(whole / name, cut / name)
  return done


def rows(workdir, kind):
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [row for row in map(json.loads, lines) if row["kind"] == kind]


def losses(workdir):
  return {row["step"]: row["loss"] for row in rows(workdir, "train")}


def same_folder(one, two, but=()):
  """Whether two folders hold the same files with the same bytes.

  But for the place of an adapter's base model, which may lie beside it.

  but: names of files that are not compared.
  """

  def files(folder):
    found = (p for p in folder.rglob("*") if p.is_file() and p.name not in but)
    return sorted(p.relative_to(folder) for p in found)

  def contents(path):
    if path.name != "adapter_config.json":
      return path.read_bytes()
    return json.loads(path.read_text()) | {"base_model_name_or_path": None}

  names = files(one)
  assert names == files(two)
  return all(contents(one / n) == contents(two / n) for n in names)


def free_port():
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    return probe.getsockname()[1]


def start_several(workdir, *changes, processes=2, devices=1, last=()):
  """The processes of one debug run, started and not waited for.

  last: flags of the last one alone.
  """
  coordinator = f"--coordinator=localhost:{free_port()}"
  arguments = ["--config=configs/debug.py", f"--workdir={workdir}", *QUICK, *changes]
  return [
    subprocess.Popen(
      command(
        "main",
        *arguments,
        coordinator,
        f"--processes={processes}",
        f"--process={number}",
        *(last if number == processes - 1 else ()),
      ),
      cwd=ROOT,
      env=environment(devices),
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for number in range(processes)
  ]


def ended(processes, timeout=300):
  """[(exit status, stdout, stderr)] of processes, once all of them have ended."""
  try:
    texts = [process.communicate(timeout=timeout) for process in processes]
  finally:
    for process in processes:
      process.kill()
  return [(p.returncode, *text) for p, text in zip(processes, texts, strict=True)]


def train_several(workdir, *changes, **options):
  """A debug run by several processes; [(stdout, stderr)] of each."""
  found = ended(start_several(workdir, *changes, **options))
  for status, _, stderr in found:
    assert status == 0, stderr[-3000:]
  return [texts for _, *texts in found]
