"""What launch/ asks of others: JobSet, SkyPilot, Docker, and the package's extras.

No cluster, cloud or Docker daemon is asked. JobSets are read by the types that Kubeflow
generates from JobSet's OpenAPI description, which hold the Kubernetes types within too;
SkyPilot's fields are those of its own schema (0.14.1), written here by hand.
"""

import re
import subprocess
import tomllib

import pytest
import yaml
from launching import LAUNCH, ROOT, environment, stub, tool

from okd_jax.config import read

ACTIONS = {"FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"}
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
  "optional-dependencies"
]


@pytest.fixture(scope="module")
def manifests():
  return list(yaml.safe_load_all((LAUNCH / "jobset.yaml").read_text()))


@pytest.fixture(params=["tpu", "gpu"])
def jobset(request, manifests):
  [found] = [
    m
    for m in manifests
    if m["kind"] == "JobSet" and m["metadata"]["labels"]["hardware"] == request.param
  ]
  return found


def job(jobset):
  [replicated] = jobset["spec"]["replicatedJobs"]
  return replicated["template"]["spec"]


def test_jobsets_are_of_their_type(jobset):
  from kubeflow_trainer_api.models import jobset_v1alpha2_job_set as types

  # A field that the type does not know is dropped, one of another type refused.
  assert types.JobsetV1alpha2JobSet.from_dict(jobset).to_dict() == jobset
  assert jobset["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
  spec = job(jobset)
  assert spec["parallelism"] == spec["completions"] > 1
  assert spec["completionMode"] == "Indexed" and spec["backoffLimit"] == 0
  # podFailurePolicy is for pods that are not restarted in place.
  assert spec["template"]["spec"]["restartPolicy"] == "Never"


def test_jobsets_run_what_there_is(jobset, manifests):
  pod = job(jobset)["template"]["spec"]
  [container] = pod["containers"]
  recipe, workdir = container["args"]
  read.read([recipe])
  assert workdir.startswith("--workdir=gs://")
  assert container["resources"]["requests"] == container["resources"]["limits"]
  assert (
    job(jobset)["podFailurePolicy"]["rules"][0]["onExitCodes"]["containerName"]
    == (container["name"])
  )
  accounts = {m["metadata"]["name"] for m in manifests if m["kind"] == "ServiceAccount"}
  assert pod["serviceAccountName"] in accounts | {"default"}


def outcome(jobset, status, evicted=False):
  """What JobSet does after a pod has failed, by Kubernetes' texts (1.31 to 1.37)."""
  reason, message = "BackoffLimitExceeded", "Job has reached the backoff limit"
  for number, rule in enumerate(job(jobset)["podFailurePolicy"]["rules"]):
    end = f"matching {rule['action']} rule at index {number}"
    if status in rule.get("onExitCodes", {}).get("values", []):
      message = f"Container okd for pod ns/okd-0 failed with exit code {status} {end}"
    elif evicted and "onPodConditions" in rule:
      message = f"Pod ns/okd-0 has condition DisruptionTarget {end}"
    else:
      continue
    reason = "PodFailurePolicy"
    break
  for rule in jobset["spec"]["failurePolicy"]["rules"]:
    assert rule["action"] in ACTIONS
    patterns = rule["onJobFailureMessagePatterns"]
    if reason in rule["onJobFailureReasons"] and any(
      re.search(pattern, message) for pattern in patterns
    ):
      return rule["action"]
  return "RestartJobSet"


def test_what_a_jobset_does_after_each_exit_status(jobset):
  assert outcome(jobset, 2) == "FailJobSet"
  assert outcome(jobset, 143) == "RestartJobSetAndIgnoreMaxRestarts"
  assert outcome(jobset, 137, evicted=True) == "RestartJobSetAndIgnoreMaxRestarts"
  for status in (1, 134, 137):
    assert outcome(jobset, status) == "RestartJobSet"
  assert jobset["spec"]["failurePolicy"]["maxRestarts"] > 0


def test_jax_may_ask_for_its_pods(manifests):
  """What jax's detection calls: list of pods, get of the job; nothing else is given."""
  [role] = [m for m in manifests if m["kind"] == "Role"]
  allowed = {(r["resources"][0], *sorted(r["verbs"])) for r in role["rules"]}
  assert allowed == {("pods", "get", "list"), ("jobs", "get")}
  [binding] = [m for m in manifests if m["kind"] == "RoleBinding"]
  assert binding["roleRef"]["name"] == role["metadata"]["name"]


FIELDS = {"name", "resources", "num_nodes", "workdir", "envs", "setup", "run"}
RESOURCES = {
  "accelerators",
  "use_spot",
  "job_recovery",
  "infra",
  "image_id",
  "disk_size",
}
RECOVERY = {"strategy", "max_restarts_on_errors", "recover_on_exit_codes"}


@pytest.mark.parametrize("kind", ["cuda12,gcs", "tpu,gcs"])
def test_skypilot_tells_each_node_of_the_others(tmp_path, kind):
  task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
  assert task.keys() <= FIELDS
  assert task["resources"].keys() <= RESOURCES
  recovery = task["resources"]["job_recovery"]
  assert recovery.keys() <= RECOVERY and recovery["recover_on_exit_codes"] == [143]
  assert all(isinstance(value, str) for value in task["envs"].values())
  read.read([f"--config={task['envs']['CONFIG']}"])
  stub(tmp_path / "okd-venv" / "bin" / "python", 'echo "$*"')
  nodes = {"NODE_IPS": "10.0.0.1\n10.0.0.2", "NUM_NODES": 2, "NODE_RANK": 1}
  changes = {f"SKYPILOT_{name}": value for name, value in nodes.items()}
  changes |= {"HOME": tmp_path, "FLAGS": "--a=1 --b=2", "EXTRAS": kind}
  env = environment(**task["envs"] | changes)
  done = subprocess.run(
    ["bash", "-c", task["run"]], cwd=ROOT, env=env, capture_output=True, text=True
  )
  found = "--coordinator=10.0.0.1:8476 --processes=2 --process=1 "
  assert done.stdout == (
    "-m okd_jax.main --config=gpt2:base --workdir=gs://BUCKET/gpt2-base "
    f"{found * (kind == 'cuda12,gcs')}--a=1 --b=2\n"
  )


def test_images():
  files = sorted(LAUNCH.glob("Dockerfile.*"))
  done = subprocess.run([tool("hadolint"), *files], capture_output=True, text=True)
  assert done.returncode == 0, done.stdout + done.stderr
  bodies = []
  for path in files:
    text = path.read_text()
    for sources in re.findall(r"^COPY (.+) \S+$", text, re.M):
      assert all((ROOT / source).exists() for source in sources.split())
    packages = text.index("uv pip install --system -r pyproject.toml")
    assert packages < text.index("COPY okd_jax")
    assert re.search(r"^USER [1-9]\d*$", text, re.M)
    assert 'ENTRYPOINT ["python", "-m", "okd_jax.main"]' in text
    bodies.append(text[text.index("WORKDIR") :])
  assert bodies[0] == bodies[1] and len(bodies) == 2


def test_extras_and_files_that_are_named_are_there():
  page = (LAUNCH / "README.md").read_text()
  assert {"tpu", "cuda12", "cuda13", "k8s", "gcs"} <= EXTRAS.keys()
  for path in sorted(LAUNCH.iterdir()):
    named = re.findall(r"--extra (\w+)|okd-jax\[([\w,]+)\]", path.read_text())
    for name in ",".join(one or other for one, other in named).split(","):
      assert not name or name in EXTRAS, f"{path} names the extra {name}"
    assert path.name == "README.md" or path.name in page, (
      f"{path.name} is not described"
    )
  assert "launch/README.md" in (ROOT / "README.md").read_text()
