"""Whole runs through the command line, as a user starts, stops and resumes them."""

import functools
import json
import shutil
import signal
import subprocess
import time

import jax
import numpy as np
import pytest
from commands import (
  QUICK,
  ROOT,
  call,
  command,
  environment,
  losses,
  rows,
  same_folder,
  second_half,
  train,
)
from safetensors.numpy import load_file

from okd_jax import METHODS, evaluate, export, generate, main, models, sample, score
from okd_jax.config import read as configuration
from okd_jax.errors import UserError
from okd_jax.run.job import check
from okd_jax.runtime.sharding import make_mesh
from okd_jax.teachers.load import load_whole

# How ml_collections reads a file, until Python 3.12.
pytestmark = pytest.mark.filterwarnings("ignore:.*load_module:DeprecationWarning")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """One uninterrupted OKD run and what it printed."""
  workdir = tmp_path_factory.mktemp("run") / "whole"
  return workdir, train(workdir)


def test_a_run_leaves_what_the_contract_says(finished):
  workdir, done = finished
  names = {"config.json", "metrics.jsonl", "checkpoints", "student", "adapter"}
  assert names | {"report.html"} <= {p.name for p in workdir.iterdir()}
  for name in ("teacher", "student, start", "student, step 6", "ROUGE-L"):
    assert name in done.stdout
  for name in ("student", "metrics.jsonl"):
    assert str(workdir / name) in done.stdout
  assert (
    "step 6/6" in done.stderr and "tokens/s" in done.stderr and "ETA" in done.stderr
  )
  assert json.loads((workdir / "config.json").read_text())["train"]["steps"] == 6
  assert [row["step"] for row in rows(workdir, "eval")] == [0, 3, 6]
  wanted = {"loss", "perplexity", "forward_kl", "top1_agreement", "rougeL"}
  assert wanted | {"adapted_forward_kl"} <= set(rows(workdir, "eval")[-1])


def test_a_run_says_what_it_is_made_of(finished):
  workdir, _ = finished
  about, answers, cost = (
    json.loads((workdir / f"{name}.json").read_text())
    for name in ("about", "sample_answers", "cost")
  )
  student = load_file(workdir / "student" / "model.safetensors")
  assert about["models"]["student"]["parameters"] == sum(
    x.size for x in student.values()
  )
  module = load_file(workdir / "adapter" / "adapter_model.safetensors")
  teacher = about["models"]["teachers"]["teacher"]
  assert teacher["module"] == sum(x.size for x in module.values())
  assert about["data"]["eval"]["rows"] >= about["data"]["eval"]["prompts"] > 0
  assert [part["step"] for part in about["parts"]] == [0]
  assert list(answers["student"]) == ["0", "3", "6"] and set(answers["teachers"])
  judged = about["data"]["eval"]["prompts"]
  assert len(answers["rows"]) == len(answers["student"]["6"]) == min(judged, 5)
  assert cost["peak_bytes"] > 1e7 and cost["seconds"] > 1
  text = (workdir / "report.html").read_text()
  assert "Sample answers" in text and about["data"]["train"]["digest"] in text


def test_killed_and_resumed_is_bit_identical(finished, tmp_path):
  """Guards H3: killed without warning after the first checkpoint, then resumed."""
  whole, _ = finished
  workdir = tmp_path / "killed"
  arguments = ["--config=configs/debug.py", f"--workdir={workdir}", *QUICK]
  process = subprocess.Popen(
    command("main", *arguments),
    cwd=ROOT,
    env=environment(),
    stderr=subprocess.DEVNULL,
    stdout=subprocess.DEVNULL,
  )
  deadline = time.monotonic() + 200
  while not (workdir / "checkpoints" / "2").exists():
    assert process.poll() is None and time.monotonic() < deadline
    time.sleep(0.01)
  process.kill()
  process.wait()
  done = train(workdir)
  assert "resuming at step" in done.stderr
  assert same_folder(whole / "student", workdir / "student")
  assert same_folder(whole / "adapter", workdir / "adapter")
  assert losses(whole) == losses(workdir)
  samples = "sample_answers.json"
  assert (whole / samples).read_bytes() == (workdir / samples).read_bytes()
  one, other = (json.loads((w / "about.json").read_text()) for w in (whole, workdir))
  assert len(other["parts"]) == 1 and str(workdir) in other["parts"][0].pop("command")
  one["parts"][0].pop("command")
  assert one == other


@pytest.mark.slow
def test_moments_in_bfloat16_are_resumed_to_the_last_bit(finished, tmp_path):
  whole, changes = tmp_path / "whole", ["--config.optim.dtype=bfloat16"]
  train(whole, *changes)
  second_half(whole, tmp_path / "cut", *changes)
  exact, rounded = losses(finished[0]), losses(whole)
  assert exact != rounded and exact[1] == rounded[1]
  np.testing.assert_allclose(list(rounded.values()), list(exact.values()), rtol=1e-2)


@pytest.mark.slow
def test_a_module_that_learns_now_and_then_is_resumed_to_the_last_bit(tmp_path):
  """Two programs: figures of the module in its own steps, and the same end."""
  shares = ("rows=0.5", "every=2", "until=0.5")
  changes = [f"--config.adapter.{share}" for share in shares]
  changes += ["--config.method.drift_target=0.001", "--config.adapter.tokens=top:0.5"]
  train(tmp_path / "whole", *changes, "--config.train.log_every=1")
  second_half(
    tmp_path / "whole", tmp_path / "cut", *changes, "--config.train.log_every=1"
  )
  rows_of = rows(tmp_path / "cut", "train")
  learns = {row["step"]: "module_loss" in row for row in rows_of}
  assert learns == {1: True, 2: False, 3: True, 4: False, 5: False, 6: False}
  anchors = [row["method.anchor_weight"] for row in rows_of]
  assert anchors[0] > anchors[1] == anchors[2] != anchors[3] == anchors[4] == anchors[5]


def test_sigterm_saves_and_exits_143(finished, tmp_path):
  whole, _ = finished
  workdir = tmp_path / "stopped"
  # Checkpoints are far apart: only the signal can have saved one.
  far = ["--config.checkpoint.every=1000"]
  process = subprocess.Popen(
    command("main", "--config=configs/debug.py", f"--workdir={workdir}", *QUICK, *far),
    cwd=ROOT,
    env=environment(),
    stderr=subprocess.PIPE,
    text=True,
  )
  for line in process.stderr:
    if "step 1/6" in line:
      process.send_signal(signal.SIGTERM)
      break
  rest = process.stderr.read()
  process.stderr.close()
  assert process.wait(timeout=200) == 143
  assert "the same command goes on" in rest
  train(workdir, *far)
  assert same_folder(whole / "student", workdir / "student")


@pytest.mark.slow
def test_a_profiled_run_is_the_same_run_even_when_stopped(finished, tmp_path):
  """Stopped while it is traced, it leaves the trace and goes on without --profile."""
  whole, _ = finished
  workdir = tmp_path / "profiled"
  process = subprocess.Popen(
    command(
      "main", "--config=configs/debug.py", f"--workdir={workdir}", *QUICK, "--profile"
    ),
    cwd=ROOT,
    env=environment(),
    stderr=subprocess.PIPE,
    text=True,
  )
  for line in process.stderr:
    if "step 3/6" in line:  # the first that is traced
      process.send_signal(signal.SIGTERM)
      break
  rest = process.stderr.read()
  process.stderr.close()
  assert process.wait(timeout=200) == 143
  assert "profile of steps 3 to" in rest and "the same command goes on" in rest
  [trace] = (workdir / "profile").rglob("perfetto_trace.json.gz")
  assert str(trace) in rest
  done = train(workdir)
  assert "resuming at step" in done.stderr and "profile" not in done.stderr
  for name in ("student", "adapter"):
    assert same_folder(whole / name, workdir / name)
  assert losses(whole) == losses(workdir)
  assert (whole / "config.json").read_bytes() == (workdir / "config.json").read_bytes()


@pytest.mark.slow
def test_sigterm_at_an_evaluation_step_loses_no_evaluation(tmp_path):
  """The best checkpoint, and so the exported student, must not depend on a signal."""
  changes = ["--config.eval.best=loss", "--config.train.steps=3"]
  whole = tmp_path / "whole"
  train(whole, *changes)
  workdir = tmp_path / "stopped"
  process = subprocess.Popen(
    command(
      "main", "--config=configs/debug.py", f"--workdir={workdir}", *QUICK, *changes
    ),
    cwd=ROOT,
    env=environment(),
    stderr=subprocess.PIPE,
    text=True,
  )
  for line in process.stderr:
    if "step 3/3" in line:  # its evaluation comes next
      process.send_signal(signal.SIGTERM)
      break
  process.stderr.read()
  process.stderr.close()
  assert process.wait(timeout=200) == 143
  assert not (workdir / "student").exists()
  done = train(workdir, *changes)
  assert "student, step 3" in done.stdout
  assert [row["step"] for row in rows(workdir, "eval")] == [0, 3]
  assert same_folder(whole / "student", workdir / "student")


def test_a_finished_run_is_left_alone(finished):
  workdir, done = finished
  before = (workdir / "metrics.jsonl").read_bytes()
  again = train(workdir)
  assert again.stdout == done.stdout
  assert (workdir / "metrics.jsonl").read_bytes() == before


def test_another_configuration_is_refused(finished):
  workdir, _ = finished
  done = train(workdir, "--config.optim.lr=0.5", status=2)
  assert "optim.lr=0.003 there, 0.5 here" in done.stderr
  assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
  "name",
  sorted({*METHODS} - {"okd"}),
)
def test_every_method_runs(name, tmp_path):
  """Guards H2: shipped commands that do not run."""
  train(tmp_path / name, f"--config.method.name={name}")
  values = losses(tmp_path / name)
  if name in ("sft", "kd", "rlkd", "mixkd"):  # the others' text changes as they learn
    assert values[6] < values[1]
  assert np.isfinite(list(values.values())).all()
  assert (tmp_path / name / "adapter").exists() == (name == "promptkd")
  assert (tmp_path / name / "teacher").exists() == (name == "clda")


@pytest.mark.slow
def test_eight_devices_give_the_losses_of_one(finished, tmp_path):
  workdir, _ = finished
  train(tmp_path / "eight", "--config.mesh.fsdp=4", "--config.mesh.data=2", devices=8)
  np.testing.assert_allclose(
    list(losses(tmp_path / "eight").values()),
    list(losses(workdir).values()),
    rtol=1e-4,
  )


@pytest.mark.slow
def test_export_of_a_chosen_step(finished, tmp_path):
  workdir, _ = finished
  call("export", f"--workdir={workdir}", f"--output={tmp_path / 'six'}", "--step=6")
  assert same_folder(tmp_path / "six", workdir / "student")
  call("export", f"--workdir={workdir}", f"--output={tmp_path / 'four'}", "--step=4")
  merged = tmp_path / "merged"
  call(
    "export", f"--workdir={workdir}", f"--output={tmp_path / 'x'}", f"--merge={merged}"
  )
  whole = models.load(merged)
  tree, adapter = models.load_adapter(workdir / "adapter", whole.config)
  assert whole.config.num_layers == 3 and any(map(np.any, jax.tree.leaves(tree)))
  settings = check(configuration.saved(workdir / "config.json")).settings
  [plain] = load_whole(settings, {"teacher": whole.config}, make_mesh()).values()
  want = adapter.merge(plain, tree)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-6)
  jax.tree.map(close, whole.params, want)
  shutil.rmtree(tmp_path / "x")
  four = load_file(tmp_path / "four" / "model.safetensors")
  six = load_file(tmp_path / "six" / "model.safetensors")
  assert four.keys() == six.keys()
  assert any((four[name] != six[name]).any() for name in six)
  done = call(
    "export", f"--workdir={workdir}", f"--output={tmp_path / 'x'}", "--step=1", status=2
  )
  assert "--step=1" in done.stderr and not (tmp_path / "x").exists()


@pytest.mark.slow
def test_generate_evaluate_and_score_agree(finished, tmp_path):
  workdir, _ = finished
  prompt = "### Instruction:\nExplain abs.\n\n### Response:\n"
  arguments = [f"--model={workdir}", f"--prompt={prompt}", "--max_new_tokens=4"]
  assert call("generate", *arguments).stdout == call("generate", *arguments).stdout
  data, output = tmp_path / "data.jsonl", tmp_path / "out.json"
  references = [["Return the absolute value."], ["one", "two"]]
  data.write_text(
    "".join(
      json.dumps({"instruction": f"Explain {i}.", "input": "", "output": r}) + "\n"
      for i, r in enumerate(references)
    )
  )
  predictions = tmp_path / "predictions.jsonl"
  done = call(
    "evaluate",
    f"--model={workdir}",
    f"--teacher={workdir / 'student'}",
    f"--data={data}",
    f"--predictions={predictions}",
    f"--output={output}",
    "--max_new_tokens=4",
  )
  result = json.loads(output.read_text())
  assert result["n"] == 2 and "perplexity" in done.stdout
  assert abs(result["forward_kl"]) < 1e-6 and result["top1_agreement"] == 100
  scored = tmp_path / "score.json"
  call(
    "score",
    f"--predictions={predictions}",
    f"--references={data}",
    f"--output={scored}",
  )
  score = json.loads(scored.read_text())
  assert score["rougeL"] == pytest.approx(result["rougeL"])
  assert score["n"] == 2


@pytest.mark.slow
def test_stages_run_in_order_and_once(tmp_path):
  """A teacher, its student by layers, and a resumed pipeline that skips both."""
  changes = [
    "--config.stages.teacher.train.steps=2",
    "--config.stages.start.train.steps=2",
    "--config.stages.teacher.student.model.hidden_size=16",
    "--config.stages.teacher.data.tokenizer=bytes",
    *QUICK,
    "--config.optim.warmup_steps=0",
  ]
  arguments = ["--config=configs/quickstart.py", f"--workdir={tmp_path}", *changes]
  done = call("main", *arguments)
  assert done.stderr.index("stage teacher") < done.stderr.index("stage start")
  config = json.loads((tmp_path / "config.json").read_text())
  assert config["teacher"]["path"] == str(tmp_path / "stages" / "teacher")
  again = call("main", *arguments)
  assert again.stderr.count("is finished already") == 3


@pytest.mark.parametrize(
  "changes, words",
  [
    (["--config.optim.lrr=1"], ["lrr", "optim.lr"]),
    (["--config.mesh.data=3"], ["mesh.data=3", "1 devices"]),
    (["--config.data.max_length=4000"], ["4000", "1024"]),
  ],
)
def test_a_bad_configuration_is_one_line_and_status_2(changes, words, tmp_path):
  """No traceback, nothing left behind."""
  done = train(workdir := tmp_path / "run", *changes, status=2)
  [line] = [x for x in done.stderr.splitlines() if x.startswith("error: ")]
  assert all(word in line for word in words), line
  assert "Traceback" not in done.stderr
  assert not (workdir / "checkpoints").exists()


@pytest.mark.parametrize(
  "changes, words",
  [
    (["--config.trian.steps=1"], ["trian", "train"]),
    (["--config.train.steps=many"], ["train.steps", "many"]),
    (["--config.method.name=okdd"], ["method.name", "okd"]),
    (["--config.data.train=/no/where.jsonl"], ["/no/where.jsonl"]),
    (["--config.teacher.model.hidden_size=0"], ["teacher.path"]),
    (["--config.student.layers=9", "--config.student.model.hidden_size=0"], ["9", "3"]),
    (
      ["--config.train.batch_size=7", "--config.train.microbatches=2"],
      ["batch_size=7"],
    ),
    (["--config.eval.best=rouge"], ["eval.best", "rougeL"]),
    (["--config.eval.best=rougeL", "--config.eval.generate=False"], ["eval.best"]),
    (["--config.optim.clip=-1.0"], ["optim.clip=-1.0"]),
    (["--config.optim.lr=nan"], ["optim.lr=nan"]),
    (["--config.optim.dtype=float16"], ["optim.dtype='float16'", "bfloat16"]),
    (["--config.train.seed=-1"], ["train.seed=-1"]),
  ],
)
def test_bad_configurations_say_what_and_where(changes, words, tmp_path):
  """An error that `cli.run` makes one line of, as above; nothing is left behind."""
  workdir = tmp_path / "run"
  with pytest.raises(UserError) as error:
    main.main(["--config=configs/debug.py", f"--workdir={workdir}", *QUICK, *changes])
  assert all(word in str(error.value) for word in words), error.value
  assert not (workdir / "checkpoints").exists()


def test_a_later_stage_is_checked_before_the_first_is_trained(tmp_path):
  changes = ["--config.stages.start.train.steps=-1"]
  arguments = ["--config=configs/quickstart.py", f"--workdir={tmp_path / 'run'}"]
  with pytest.raises(UserError, match=r"stage start: train\.steps=-1"):
    main.main(arguments + changes)
  assert not (tmp_path / "run").exists()


def test_a_config_of_before_a_key_means_its_default(finished):
  """New keys leave old workdirs whole."""
  workdir, done = finished
  path = workdir / "config.json"
  whole = path.read_text()
  older = json.loads(whole)
  del older["optim"]["dtype"], older["data"]["pack"], older["train"]["attention"]
  path.write_text(json.dumps(older))
  try:
    assert json.loads(json.dumps(configuration.saved(path).to_dict())) == json.loads(
      whole
    )
    assert train(workdir).stdout == done.stdout
  finally:
    path.write_text(whole)


@pytest.mark.parametrize(
  "text, words",
  [
    ("", ["empty"]),
    ('{"instruction": "a", "output": "b"}\n{"instr\n', ["data.jsonl:2"]),
    ('{"instruction": "a", "output": ""}\n', ["data.jsonl:1"]),
  ],
)
def test_bad_data_names_file_and_line(text, words, tmp_path):
  data = tmp_path / "data.jsonl"
  data.write_text(text)
  done = train(tmp_path / "run", f"--config.data.train={data}", status=2)
  assert all(word in done.stderr for word in words) and "Traceback" not in done.stderr


def test_plain_text_trains_without_an_evaluation_file(tmp_path):
  text = tmp_path / "text.txt"
  text.write_text("All happy families are alike. " * 200)
  changes = ["--config.data.holdout=8", f"--config.data.train={text}"]
  train(tmp_path / "run", *changes)
  assert rows(tmp_path / "run", "eval")[-1]["loss"] > 0


def test_unknown_keys_of_a_file_or_a_stage_are_refused(tmp_path):
  """Guards H1: a typo in a recipe must not pass in silence."""
  for line in ("c.train.stesp = 5", "c.stages.one = {'optim': {'learning_rate': 3.0}}"):
    path = tmp_path / "recipe.py"
    path.write_text(
      "from configs import debug\n"
      f"def get_config():\n  c = debug.get_config()\n  {line}\n  return c\n"
    )
    with pytest.raises(UserError, match="stesp|learning_rate"):
      main.main([f"--config={path}", f"--workdir={tmp_path / 'run'}"])


def test_a_workdir_that_is_a_file(tmp_path):
  (tmp_path / "file").write_text("")
  done = train(tmp_path / "file", status=2)
  assert "Traceback" not in done.stderr and "error: " in done.stderr


def test_all_rows_too_long(tmp_path):
  data = tmp_path / "data.jsonl"
  row = json.dumps({"instruction": "long " * 40, "output": "b"})
  data.write_text(f"{row}\n" * 12)
  changes = ["--config.data.overlong_prompt=drop", "--config.data.holdout=2"]
  done = train(tmp_path / "run", f"--config.data.train={data}", *changes, status=2)
  assert "data.max_prompt_length=40" in done.stderr and "Traceback" not in done.stderr


def test_help_names_every_key():
  done = call("main", "--help")
  assert "--config.optim.lr" in done.stdout and "teacher_kl_weight" in done.stdout
  assert "--profile adds profile/" in done.stdout


@pytest.mark.parametrize("module", [evaluate, export, generate, sample, score])
def test_every_command_has_help(module, capsys):
  with pytest.raises(SystemExit) as left:
    module.main(["--help"])
  assert left.value.code == 0 and "--help" in capsys.readouterr().out
