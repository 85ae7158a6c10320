"""`python -m okd_jax.plan`: parser, arithmetic, search, and the TPU's own compiler."""

import importlib.util
import json
import sys

import jax
import pytest

from okd_jax import models, plan
from okd_jax.bench import plan_text, planning
from okd_jax.bench.layouts import Layout, asked, candidates
from okd_jax.bench.roofline import topology_of
from okd_jax.config import read
from okd_jax.config.unstaged import without_stages
from okd_jax.errors import UserError
from okd_jax.run import ahead
from okd_jax.run.job import check

SMALL = {
  "teacher.model.hidden_size": 64,
  "teacher.model.num_layers": 3,
  "student.model.hidden_size": 32,
  "train.batch_size": 16,
  "train.dtype": "bfloat16",
  "data.max_length": 128,
  "data.max_prompt_length": 64,
}
FLAGS = ["--config=default", *(f"--config.{k}={v}" for k, v in SMALL.items())]
VOCAB = 512


def planner(topology, recipe="default", **changes):
  given = {k.replace("__", "."): v for k, v in changes.items()}
  small = SMALL if recipe == "default" else {}
  config = read.from_keys(small | given, recipe)
  job = check(without_stages(config))
  return planning.Planner(
    job, ahead.outline(job.settings, VOCAB), topology_of(topology)
  )


@pytest.mark.parametrize(
  "flags, told",
  [
    (["--topology=v9:2x2"], "--topology=v9:2x2 is not known; name one such as v5e:2x4"),
    (["--topology=v5e:2x4", "--config.mesh.data=3"], "does not fit the 8 devices"),
    (["--topology=v5e:2x4", "--config.train.batch_size=4"], "must be a multiple"),
    (
      ["--topology=v5e:2x4", "--config.teacher.cache=x", "--config.method.name=kd"],
      "reads no rows",
    ),
  ],
)
def test_what_cannot_be_planned_is_one_sentence(flags, told):
  with pytest.raises(UserError, match=told) as found:
    plan.main([*FLAGS, *flags, "--compile=0"])
  assert "\n" not in str(found.value)


def test_a_wrong_topology_leaves_with_status_2(monkeypatch, capsys):
  monkeypatch.setattr(sys, "argv", ["plan", *FLAGS, "--topology=v9"])
  with pytest.raises(SystemExit) as left:
    plan.command()
  said = capsys.readouterr()
  assert left.value.code == 2 and not said.out
  assert said.err.startswith("error: --topology=v9 is not known")
  assert len(said.err.splitlines()) == 1


def test_without_libtpu_it_says_what_to_install(monkeypatch):
  find = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util, "find_spec", lambda name: None if name == "libtpu" else find(name)
  )
  with pytest.raises(UserError, match=r"pip install okd-jax\[tpu\]"):
    planning.tpu_devices(topology_of("v5e:2x4"))


def test_gpus_are_planned_by_arithmetic(tmp_path, capsys):
  output = tmp_path / "plan.json"
  plan.main([*FLAGS, "--topology=gpu:h100x8", "--search", f"--output={output}"])
  page = capsys.readouterr().out
  assert max(map(len, page.splitlines())) <= 88
  assert "by arithmetic alone" in page and "MFU" in page
  found = json.loads(output.read_text())
  best = found["best"]
  assert best == found["plans"][0] and best["fits"] and best["by"] == "arithmetic"
  assert found["devices"] == 8 and len(found["plans"]) > 4
  assert best["roofline"]["mfu_overlapped"] >= best["roofline"]["mfu_in_turn"] > 0
  assert plan.main(["--help"]) is None and "--topology" in capsys.readouterr().out


def test_bytes_by_hand():
  """A student of 4 bytes a weight and two moments of as many, split by eight."""
  made = planner("v5e:2x4", mesh__data=1, mesh__fsdp=8)
  shape = ahead.outline(made.job.settings, VOCAB).student
  weights = sum(x.size for x in models.parameter_shapes(shape).values())
  small = 32 * (2 * 2 + 1)  # the norms' scales, which no rule splits
  found = made.by_arithmetic(made.asked()).memory
  assert found["student"] == 4 * ((weights - small) // 8 + small)
  moments = found["optimizers"] - 2 * (found["student"] + found["modules"])
  assert 0 <= moments < 64  # counters
  assert found["batch"] == 16 * 128 * (3 * 4 + 1) // 8
  whole = made.by_arithmetic(made.asked()._replace(teacher="replicate")).memory
  tree = made._general.frozen["teacher"]
  assert whole["teachers"] == 2 * sum(x.size for x in jax.tree.leaves(tree))


def test_what_is_sent_by_hand():
  """Split by fsdp, layers are gathered twice and their gradients scattered."""
  made = planner("v5e:2x4", mesh__data=1, mesh__fsdp=8, mesh__teacher="fsdp")
  found = made.by_arithmetic(made.asked()).sent
  by_name = {(each.kind, each.what): each for each in found}
  layers = made.shape.student.num_layers
  gathered = by_name["all-gather", "student layer"]
  assert gathered.times == 2 * layers and gathered.in_loop and gathered.axes == "fsdp"
  own = made._general.plan.abstract.params["student"]["layers"]
  assert gathered.bytes == 2 * sum(x.size for x in jax.tree.leaves(own)) // layers
  assert by_name["reduce-scatter", "student layer's gradient"].times == layers
  assert by_name["all-gather", "teacher layer"].times == 2 * 3
  data = made.by_arithmetic(made.asked()._replace(data=8, fsdp=1)).sent
  assert {each.kind for each in data} == {"all-reduce"}


@pytest.mark.parametrize(
  "recipe, topology, rows, mfu",
  [("gpt2:large", "v5e:2x4", 64, 0.715), ("llama:7b", "v5e:4x4", 64, 0.691)],
)
def test_what_remat_leaves_of_the_peak(recipe, topology, rows, mfu):
  """Each layer runs forwards again: 4 T + 6 S useful of 6 T + 8 S operations, for T
  weights of the teacher and S of the student; head and loss run once."""
  made = planner(topology, recipe, train__batch_size=rows, mesh__data=1, mesh__fsdp=-1)
  found = made.by_arithmetic(made.asked())
  times = found.roofline
  assert times["mfu_overlapped"] == pytest.approx(mfu, abs=2e-3)
  assert times["step_overlapped_s"] == times["compute_s"]
  free = made.by_arithmetic(made.asked()._replace(remat=False)).roofline
  assert free["mfu_overlapped"] == pytest.approx(1)  # what the peak means


def test_a_search_tries_what_makes_sense():
  made = planner("v5e:2x4")
  shapes = {"student": made.shape.student} | dict(made.shape.teachers)
  tried = list(candidates(made.job, shapes, 8))
  assert {each.tensor for each in tried} == {1, 2, 4}  # of four heads
  assert all(each.data * each.fsdp * each.tensor == 8 for each in tried)
  assert all(16 % (each.rows * each.microbatches) == 0 for each in tried)
  found = made.search()
  assert found == sorted(found, key=lambda plan: plan.order)
  assert len({each.layout[:-1] for each in found}) == len(found)


def test_layouts_in_words():
  assert asked(planner("v5e:2x4").job.settings, 8) == Layout(8, 1, 1, "auto", False, 1)
  layout = Layout(2, 4, 1, "replicate", True, 2)
  assert str(layout) == "data2 fsdp4 teacher replicate remat x2"
  assert "--config.mesh.fsdp=4 " in layout.flags()


def test_stages_stand_for_what_they_start_from():
  config = without_stages(read.load_recipe("gpt2:large"))
  assert (config.teacher.path, config.student.path) == ("gpt2-xl", "gpt2-large")
  config = read.from_keys({"teacher.path": "stage:none", "student.path": "gpt2"})
  with pytest.raises(UserError, match="teacher.path=stage:none: this stage starts"):
    without_stages(config)


def test_a_folder_of_a_configuration_alone_is_a_model(tmp_path):
  raw = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2}
  raw |= {"num_attention_heads": 4, "intermediate_size": 96, "vocab_size": 300}
  (tmp_path / "config.json").write_text(json.dumps(raw))
  assert ahead.shape_of(str(tmp_path)).vocab_size == 300
  # As many weights as are published.
  for name, weights in (("gpt2-xl", 1.558e9), ("Qwen/Qwen3-32B", 32.76e9)):
    sizes = models.parameter_shapes(ahead.shape_of(name))
    assert sum(x.size for x in sizes.values()) == pytest.approx(weights, rel=1e-3)


@pytest.mark.parametrize("method", ["minillm", "clda"])
def test_every_kind_of_batch_has_a_shape(method):
  made = planner("gpu:a100x2", method__name=method)
  assert made.by_arithmetic(made.asked()).fits
  assert made.about()["not_planned"]


@pytest.mark.slow
@pytest.mark.parametrize("teacher", ["fsdp", "replicate"])
def test_the_compiled_step_holds_what_arithmetic_says(teacher, capsys):
  pytest.importorskip("libtpu", reason="needs libtpu: pip install -e '.[tpu]'")
  made = planner("v5e:2x4", mesh__data=2, mesh__fsdp=4)
  found = made.by_compiler(made.asked()._replace(teacher=teacher))
  assert found.fits and found.by == "compiler" and not found.error
  parts = {k: v for k, v in found.memory.items() if k in ("student", "optimizers")}
  assert parts == {
    k: v for k, v in made.by_arithmetic(found.layout).memory.items() if k in parts
  }
  loops = {each.axes for each in found.sent if each.in_loop}
  assert "fsdp" in loops and {each.kind for each in found.sent} > {"all-gather"}
  assert found.roofline["link_s"] > 0
  print(plan_text.text(made.about(), [found], found))
  assert max(map(len, capsys.readouterr().out.splitlines())) <= 88
