"""The scripts of launch/: what shellcheck says, what they call and how they end."""

import os
import signal
import subprocess
import time

import pytest
import yaml
from launching import LAUNCH, ROOT, bash, environment, stub, tool

SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
# A run: says how it was called, lasts $ROUNDS tenths of a second or until SIGTERM.
RUN = """
trap 'echo saved; exit 143' TERM
printf '<%s>' "$@"; echo
echo "cuda=${CUDA_VISIBLE_DEVICES:-} xla=${XLA_FLAGS:-}" >&2
call="$*" number=${call##*--process=}
if [[ ${number%% *} == "${WRONG:-none}" ]]; then exit 3; fi
for ((i = 0; i < ${ROUNDS:-0}; i++)); do sleep 0.1; done
"""


@pytest.fixture
def python(tmp_path):
  return stub(tmp_path / "bin" / "python", RUN)


def test_shellcheck_has_nothing_to_say(tmp_path):
  task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
  parts = [stub(tmp_path / part, task[part]) for part in ("setup", "run")]
  for script in SCRIPTS:
    assert os.access(script, os.X_OK) or script.suffix == ".sbatch", script
    bash("-n", script)
  done = subprocess.run(
    [tool("shellcheck"), *SCRIPTS, *parts], capture_output=True, text=True
  )
  assert done.returncode == 0, done.stdout


def processes(*arguments, status=0, **changes):
  script = LAUNCH / "local_processes.sh"
  return bash(script, *arguments, env=environment(**changes), status=status)


def test_each_process_is_told_of_the_others(python):
  done = processes(2, "debug", "w", "--config.a=b c", PYTHON=python, PORT=4321)
  flags = (
    "<-m><okd_jax.main><--config=debug><--workdir=w><--coordinator=127.0.0.1:4321>"
    "<--processes=2><--process={0}><--config.a=b c>"
  )
  assert sorted(done.stdout.splitlines()) == [
    f"[{i}] {flags.format(i)}" for i in range(2)
  ]
  assert sorted(done.stderr.splitlines()) == ["[0] cuda= xla=", "[1] cuda= xla="]


def test_devices_are_shared(python):
  done = processes(2, "debug", "w", PYTHON=python, CUDA_VISIBLE_DEVICES="4,5,6,7")
  assert sorted(done.stderr.splitlines()) == ["[0] cuda=4,5 xla=", "[1] cuda=6,7 xla="]
  gpus = environment(python.parent, PYTHON=python)
  stub(python.parent / "nvidia-smi", "seq 0 2")
  done = bash(LAUNCH / "local_processes.sh", 2, "debug", "w", env=gpus, status=2)
  assert done.stderr.startswith("error: 2 processes cannot share 3 GPUs evenly")
  done = processes(1, "debug", "w", PYTHON=python, DEVICES=3)
  assert "device_count=3" in done.stderr
  assert "usage" in processes("debug", "w", status=2).stderr


def test_one_that_fails_takes_the_others_down(python):
  done = processes(
    3, "debug", "w", PYTHON=python, WRONG=1, ROUNDS=300, GRACE=20, status=3
  )
  assert {"[0] saved", "[2] saved"} <= set(done.stdout.splitlines())
  assert "rminated" not in done.stderr
  stub(python, RUN.replace("trap 'echo saved; exit 143'", "trap ''"))
  done = processes(
    2, "debug", "w", PYTHON=python, WRONG=1, ROUNDS=300, GRACE=1, status=3
  )
  last = done.stderr.splitlines()[-1]
  assert last == "error: 1 of 2 processes did not end within 1 s"


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_all(python, sign):
  """To the script and its group, as a terminal and `timeout` send it: still one."""
  script = subprocess.Popen(
    ["bash", LAUNCH / "local_processes.sh", "2", "debug", "w"],
    env=environment(PYTHON=python, ROUNDS=300),
    stdout=subprocess.PIPE,
    text=True,
    start_new_session=True,
  )
  first = [script.stdout.readline() for _ in range(2)]
  assert len(first) == 2
  script.send_signal(sign)
  os.killpg(script.pid, sign)
  rest, _ = script.communicate(timeout=20)
  assert sorted(rest.splitlines()) == ["[0] saved", "[1] saved"]
  assert script.returncode == 143


def test_slurm_queues_a_run_that_saved_again(tmp_path):
  calls = tmp_path / "calls"
  programs = tmp_path / "bin"
  stub(programs / "srun", f'echo "srun $*" >>{calls}; exit $STATUS')
  stub(programs / "scontrol", f'echo "scontrol $*" >>{calls}')
  for status in (0, 2, 143):
    env = environment(programs, STATUS=status, SLURM_JOB_ID=7)
    bash(LAUNCH / "slurm.sbatch", "debug", "w", "--a", env=env, status=status)
  run = "srun --kill-on-bad-exit=0 --wait=0 launch/local.sh debug w --a"
  assert calls.read_text().splitlines() == [run, run, run, "scontrol requeue 7"]


def test_slurm_outlives_a_signal(tmp_path):
  stub(tmp_path / "srun", "echo on; sleep 1; exit 143")
  stub(tmp_path / "scontrol", "echo queued again")
  script = subprocess.Popen(
    ["bash", LAUNCH / "slurm.sbatch", "debug", "w"],
    env=environment(tmp_path, SLURM_JOB_ID=7),
    stdout=subprocess.PIPE,
    text=True,
  )
  assert script.stdout.readline() == "on\n"
  script.terminate()
  rest, _ = script.communicate(timeout=20)
  assert rest == "queued again\n" and script.returncode == 143


RUNS = ("debug", "gs://bucket/run", "--config.data.template=it's {x}")


def shown(*arguments, **changes):
  """The commands of tpu_vm.sh, without this machine's paths."""
  env = environment(DRY_RUN=1, TMPDIR="/tmp", **changes)
  return bash(LAUNCH / "tpu_vm.sh", *arguments, env=env).stdout.replace(
    str(ROOT), "CHECKOUT"
  )


def test_the_commands_for_tpu_vms():
  """Golden text: tests/launch/tpu_vm.txt; read what changed, then write it anew."""
  commands = [["create"], ["install"], ["run", *RUNS], ["logs"], ["stop"], ["delete"]]
  parts = [f"== {command[0]}\n{shown(*command)}" for command in commands]
  on_demand = {
    "SPOT": 0,
    "PROJECT": "p",
    "RUN_ENV": "A=1",
    "NAME": "n",
    "TYPE": "v6e-8",
  }
  for command in [["create"], ["run", *RUNS], ["delete"]]:
    parts.append(f"== {command[0]}, on demand\n{shown(*command, **on_demand)}")
  golden = LAUNCH.parent / "tests" / "launch" / "tpu_vm.txt"
  assert "".join(parts) == golden.read_text()
  again = ["create", "install", "run"]
  assert shown("resume", *RUNS).splitlines()[2:] == [
    line
    for command in again
    for line in shown(command, *(RUNS if command == "run" else ())).splitlines()
  ]


def test_wrong_use_of_tpu_vms():
  for arguments in (["run", "debug", "runs/x"], ["run"], ["resume"], ["start"], []):
    done = bash(LAUNCH / "tpu_vm.sh", *arguments, status=2)
    assert done.stderr.startswith("error: ")


@pytest.fixture
def worker(tmp_path, python):
  """A TPU VM: gcloud runs what is for the workers in another home. Its environment."""
  home = tmp_path / "home"
  (home / "okd-venv" / "bin").mkdir(parents=True)
  (home / "okd-venv" / "bin" / "python").symlink_to(python)
  (home / "okd-jax").symlink_to(ROOT)
  gcloud = f"""
cd {home}
echo "$3 $4" >>calls
case "$4 $*" in
  *"uv pip install"*) ;;
  ssh*)
    for word; do
      if [[ $word == --command=* ]]; then bash -c "${{word#--command=}}"; exit; fi
    done
    ;;
  describe*) cat state ;;
  create*) echo ACTIVE >state ;;
esac
"""
  stub(python.parent / "gcloud", gcloud)
  env = environment(python.parent, HOME=home, ROUNDS=300, TMPDIR=tmp_path)
  yield home, env
  bash(LAUNCH / "tpu_vm.sh", "stop", env=env)


def lines(path, until):
  """A file's lines once the last one is `until`."""
  for _ in range(100):
    found = path.read_text().splitlines() if path.exists() else []
    if found and found[-1] == until:
      return found
    time.sleep(0.1)
  raise AssertionError(found)


def test_a_run_on_a_tpu_vm(worker):
  """Started, not twice, stopped; gone on with on a slice that was made anew."""
  home, env = worker
  script = LAUNCH / "tpu_vm.sh"
  bash(script, "run", *RUNS, env=env)
  begun = lines(home / "okd.log", "cuda= xla=")
  assert begun[0] == (
    "<-m><okd_jax.main><--config=debug><--workdir=gs://bucket/run>"
    "<--config.data.template=it's {x}>"
  )
  assert "going on" in bash(script, "run", *RUNS, env=env, status=1).stdout
  bash(script, "stop", env=env)
  assert lines(home / "okd.log", "exit status 143")[-2] == "saved"
  assert bash(script, "stop", env=env).stdout == "no run here\n"
  (home / "calls").unlink()
  (home / "state").write_text("SUSPENDED\n")
  bash(script, "resume", *RUNS, env=env | {"ROUNDS": "0"})
  assert lines(home / "okd.log", "exit status 0")[-3] == begun[0]
  slice_, node = "queued-resources ", "tpu-vm "
  assert (home / "calls").read_text().splitlines() == [
    slice_ + "describe",
    slice_ + "delete",
    slice_ + "create",
    slice_ + "describe",
    node + "scp",
    node + "ssh",
    node + "ssh",
  ]
