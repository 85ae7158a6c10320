"""Students that are trained in part: what stays, stays, and the rest is as ever."""

import chex
import families
import jax
import numpy as np
import pytest
from commands import call, same_folder, second_half, train
from safetensors.numpy import load_file
from small import built, config, step_of

from okd_jax import models
from okd_jax.data.batch import Batch
from okd_jax.errors import UserError
from okd_jax.models import Decoder, int8
from okd_jax.run import distill, student
from okd_jax.runtime.workdir import Workdir
from okd_jax.teachers import activity

LORA = {"student.adapter.kind": "lora", "student.adapter.rank": 2}
PART = {"student.frozen": "embed|layers/0/", "optim.clip": 0.0}
WITH = [
  f"--config.{key}={value}"
  for key, value in {
    **LORA,
    "student.adapter.targets": ("query", "up"),
    "student.model.family": "qwen3",
    "teacher.model.family": "qwen3",
    "teacher.model.num_layers": 4,
    "teacher.dtype": "int8",
  }.items()
]


def rows(run):
  shape = (run.settings.train.batch_size, run.settings.data.max_length)
  ids = np.random.default_rng(0).integers(0, 100, (2, *shape), dtype=np.int32)
  ones = np.ones(shape, np.int32)
  return Batch(tokens=ids[0], labels=ids[1], mask=ones > 0, segment_ids=ones)


def stepped(run):
  """(the first state's parameters, the next state, its figures)."""
  with jax.set_mesh(run.mesh):
    state = run.init()
    begun = jax.tree.map(np.array, state.params)
    state, figures = step_of(run)(state, run.cast.frozen, rows(run))
  return begun, state, figures


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """A step of a run that trains all of its student."""
  run = built(config(**{"optim.clip": 0.0}), tmp_path_factory.mktemp("whole"))
  return stepped(run)


def test_a_step_moves_what_is_trained_as_in_a_whole_student(whole, tmp_path):
  """To the same place; what stays has no moment and keeps its bits."""
  run = built(config(**PART), tmp_path)
  begun, state, figures = stepped(run)
  part, held = run.cast.student.adapter, run.cast.frozen["student"]
  old, new, theirs = whole
  chex.assert_trees_all_equal(begun["student"], part.start(old["student"]))
  chex.assert_trees_all_equal(held, part.held(old["student"]))
  np.testing.assert_allclose(figures["loss"], theirs["loss"], rtol=1e-6)
  chex.assert_trees_all_close(
    state.params["student"], part.start(new.params["student"]), rtol=1e-4, atol=1e-6
  )
  sizes = [sum(x.size for x in jax.tree.leaves(t)) for t in (begun, state.opt_state)]
  assert 2 * sizes[0] <= sizes[1] <= 2 * sizes[0] + 10  # and a few counters


@pytest.mark.parametrize(
  "dtype", ["", pytest.param("bfloat16", marks=pytest.mark.slow), "int8"]
)
def test_lora_begins_as_the_whole_student_and_is_merged(dtype, whole, tmp_path):
  """Guards the export: the merged weights say what was trained."""
  run = built(config(**LORA, **{"student.dtype": dtype}), tmp_path)
  before = jax.tree.map(np.array, run.cast.frozen)
  _, state, figures = stepped(run)
  chex.assert_trees_all_equal(run.cast.frozen, before)
  exact = {"": 1e-6, "bfloat16": 1e-3, "int8": 1e-3}[dtype]
  np.testing.assert_allclose(figures["loss"], whole[2]["loss"], rtol=exact)
  trees = {"query": {"down", "up"}, "value": {"down", "up"}}
  own = state.params["student"]["layers"]["attention"]
  assert {name: {*pair} for name, pair in own.items()} == trees
  assert all(x.any() for x in jax.tree.leaves(own))
  tokens = rows(run).tokens[:2]
  variables = run.cast.student_variables(state.params)
  want, _ = run.cast.student.apply(variables, tokens)
  merged = student.merged(run.cast, state.params["student"])
  got, _ = Decoder(run.cast.student.config).apply({"params": merged}, tokens)
  np.testing.assert_allclose(got, want, atol=2e-5)


def test_what_stays_is_found_again(tmp_path):
  """Guards resuming: of random students, of teachers' layers, and of folders."""
  first = built(config(**LORA, **{"student.dtype": "int8"}), tmp_path)
  again = built(config(**LORA, **{"student.dtype": "int8"}), tmp_path)
  chex.assert_trees_all_equal(first.cast.frozen, again.cast.frozen)
  shape, tokenizer = first.outline.student, first.outline.tokenizer
  params = int8.dequantized(first.cast.frozen["student"])
  models.save(tmp_path / "start", params, shape, tokenizer)
  path = {"student.path": str(tmp_path / "start"), "student.model.hidden_size": 0}
  named = built(config(**LORA, **path, **{"student.dtype": "int8"}), tmp_path)
  kept = int8.dequantized(named.cast.frozen["student"])
  chex.assert_trees_all_close(kept, params, rtol=1e-6)
  layers = {"student.layers": 2, "student.model.hidden_size": 0}
  taken = built(config(**LORA, **layers), tmp_path).cast
  own, _ = models.take_layers(
    taken.frozen["teacher"], taken.teachers["teacher"].config, 2
  )
  chex.assert_trees_all_equal(taken.frozen["student"], own)


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    (LORA | {"student.frozen": "embed"}, "stay already; set one"),
    ({"student.dtype": "bfloat16"}, "weights that stay, and all are trained"),
    (PART | {"student.dtype": "int8"}, "needs student.adapter.kind=lora"),
    ({"student.adapter.kind": "prefix"}, "must be 'lora' or empty"),
    ({"student.frozen": "layer9"}, "found in none of the parameters' names"),
    (LORA | {"student.adapter.layers": 9}, "student.adapter.layers=9, but the model"),
    (LORA | {"student.adapter.rank": 0}, "student.adapter.rank=0 must be at least 1"),
  ],
)
def test_what_cannot_be(changes, words, tmp_path):
  with pytest.raises(UserError, match=words):
    built(config(**changes), tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """OKD from an int8 teacher to a student with LoRA."""
  workdir = tmp_path_factory.mktemp("run") / "whole"
  return workdir, train(workdir, *WITH)


@pytest.mark.slow
def test_resumed_to_the_last_bit_and_exported_again(finished, tmp_path):
  workdir, done = finished
  assert "student_adapter" in done.stdout
  second_half(workdir, tmp_path / "cut", *WITH)
  call(
    "export",
    f"--workdir={workdir}",
    f"--output={tmp_path / 'student'}",
    f"--student_adapter={tmp_path / 'student_adapter'}",
  )
  for name in ("student", "student_adapter", "student_adapter_base"):
    assert same_folder(workdir / name, tmp_path / name)
  page = (workdir / "report.html").read_text()
  assert "are trained" in page


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_opened_by_transformers_and_peft(finished):
  """The merged folder and PEFT's pair say the same; the teacher's pair opens, too."""
  pytest.importorskip("torch")
  peft = pytest.importorskip("peft")
  workdir, _ = finished
  tokens = np.arange(40, dtype=np.int32)[None] % 30
  want = families.torch_logits(families.torch_model(workdir / "student"), tokens)
  opened = peft.AutoPeftModelForCausalLM.from_pretrained
  for name, exact in (("student_adapter", want), ("adapter", None)):
    got = families.torch_logits(opened(workdir / name).eval(), tokens)
    plain = families.torch_model(workdir / f"{name}_base")
    assert np.abs(got - families.torch_logits(plain, tokens)).max() > 1e-4
    if exact is not None:
      np.testing.assert_allclose(got, exact, atol=1e-4)
  ours = models.load(workdir / "student")
  np.testing.assert_allclose(ours.logits(ours.params, tokens), want, atol=1e-4)
  weights = load_file(workdir / "student_adapter" / "adapter_model.safetensors")
  assert {name.split(".")[-3] for name in weights} == {"q_proj", "up_proj"}


@pytest.mark.slow
@pytest.mark.parametrize("changes", [LORA, PART], ids=["lora", "part"])
@pytest.mark.parametrize("name", ["minillm", "distillm2", "gkd", "skd", "ensemble"])
def test_methods_that_sample_or_look_first(name, changes, tmp_path):
  """Whatever reads the student outside of the loss reads all of it."""
  changes = changes | {"method.name": name, "train.steps": 2}
  own = {"max_new_tokens": 4} if name != "ensemble" else {"weighting": "reinforced"}
  changes |= {f"method.{key}": value for key, value in own.items()}
  [result] = distill.run(config(**changes), tmp_path)
  assert np.isfinite(result.figures["student, step 2"]["loss"])


NARROW = {
  "student.width": 0.5,
  "student.model.hidden_size": 0,
  "teacher.model.num_heads": 4,
  "teacher.model.family": "qwen3",
}


def test_a_narrower_student_is_cut_out_of_the_teacher(tmp_path):
  """By training rows; a run that goes on reads which heads and channels they were."""
  run = built(config(**NARROW), tmp_path)
  teacher, shape = run.outline.teachers["teacher"], run.outline.student
  assert shape.num_layers == teacher.num_layers and shape.num_heads == 2
  assert 2 * shape.mlp_size == teacher.mlp_size
  params, kept = run.init().params["student"], run.cast.kept
  whole = run.cast.frozen["teacher"]
  up = [x["layers"]["mlp"]["up"]["kernel"] for x in (params, whole)]
  for layer, channels in enumerate(kept.channels):
    np.testing.assert_array_equal(up[0][layer], up[1][layer][:, channels])
  other = kept._replace(
    channels=np.broadcast_to(np.arange(shape.mlp_size), kept.channels.shape)
  )
  activity.write(Workdir(tmp_path).width, other)
  again = built(config(**NARROW), tmp_path)
  np.testing.assert_array_equal(again.cast.kept.channels, other.channels)


@pytest.mark.slow
def test_a_narrower_student_of_which_a_part_is_trained(tmp_path):
  """Exported again from the checkpoint, which lacks what was cut out and stays."""
  changes = [
    f"--config.{k}={v}" for k, v in {**NARROW, **LORA, "student.layers": 2}.items()
  ]
  whole = tmp_path / "whole"
  train(whole, *changes)
  second_half(whole, tmp_path / "cut", *changes)
  call("export", f"--workdir={whole}", f"--output={tmp_path / 'student'}")
  assert same_folder(whole / "student", tmp_path / "student")
