"""Every shipped configuration loads, names only known keys, and runs two steps."""

import inspect
import itertools
import json
import runpy
from pathlib import Path

import jax
import pytest
from commands import QUICK, call
from ml_collections import ConfigDict

from configs import default, gemma3, gpt2, llama, qwen3, smollm2
from configs.studies import scarce
from okd_jax import models
from okd_jax.config import read
from okd_jax.config import study as studies
from okd_jax.config.describe import describe
from okd_jax.config.stages import stages
from okd_jax.data import load_records, make_tokenizer
from okd_jax.errors import UserError
from okd_jax.run.job import check

ROOT = Path(__file__).parents[2]
CHATML = (
  "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|endoftext|>\n"
  "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TWO_STEPS = [change for change in QUICK if "train.steps" not in change] + [
  "--config.train.steps=2",
  "--config.train.batch_size=2",
  "--config.train.dtype=float32",
  "--config.optim.warmup_steps=0",
  "--config.data.holdout=4",
]

VARIANTS = {
  "gemma3": gemma3.VARIANTS,
  "gpt2": gpt2.VARIANTS,
  "llama": llama.TEACHERS,
  "qwen3": qwen3.STUDENTS,
  "studies/gpt2": gpt2.VARIANTS,
  "studies/llama2": llama.TEACHERS,
  "studies/scarce": scarce.TEACHERS,
}


def every_config():
  """NAME or NAME:VARIANT of all that --config knows by name."""
  for path in sorted((ROOT / "configs").rglob("*.py")):
    name = path.relative_to(ROOT / "configs").with_suffix("").as_posix()
    recipe = runpy.run_path(str(path))
    variants = [""]
    if name in VARIANTS:
      variants = VARIANTS[name]
    elif "recipe" in inspect.signature(recipe["get_config"]).parameters:
      variants = ["", "gpt2.medium"]
    for variant in variants:
      yield f"{name}:{variant}"


EVERY = list(every_config())
# One variant of each file: they differ in values.
STAGED = {spec.partition(":")[0]: spec for spec in reversed(EVERY)}.values()
# Those whose stages are taught by nobody: all but okd_twice.
STAGED = sorted(
  spec
  for spec in STAGED
  if (parts := read.load_recipe(spec).stages)
  and all(part.method.name == "sft" for part in parts.values())
)


@pytest.mark.parametrize("spec", EVERY)
def test_configuration_names_only_known_keys(spec, tmp_path):
  """Guards H1: each stage is applied to the locked default, so a typo raises."""
  known = default.get_config()
  for stage in stages(read.load_recipe(spec), tmp_path):
    assert stage.workdir.is_relative_to(tmp_path)
    merged = ConfigDict(known.to_dict()).lock()
    merged.update(stage.config)
    assert json.dumps(merged.to_dict())


@pytest.mark.parametrize("spec", [spec for spec in EVERY if "studies/" in spec])
def test_every_run_of_a_study_has_a_method_that_reads_its_knobs(spec, tmp_path):
  study = studies.load(spec, [])
  for job in studies.jobs(study, tmp_path):
    assert check(job.config).settings.data.eval_sources == study.held_out


def test_every_key_has_a_comment():
  text = (ROOT / "configs" / "default.py").read_text()
  lines = text.partition("def for_chats")[0].splitlines()
  keys = [
    line
    for above, line in itertools.pairwise(lines)
    if line.startswith(("  config.", "  model.")) and not above.startswith("  # ")
  ]
  bare = [
    line
    for line in keys
    if " = " in line
    and "#" not in line
    and not line.endswith(("ConfigDict()", "sort_keys=False)"))
  ]
  # What needs no words beside its neighbours.
  wordless = "sampled_share rank epochs seed b1 b2 eps max_prompt_length"
  wordless += " warmup_steps batch_size max_new_tokens num_layers num_heads"
  wordless += " tie_embeddings"
  names = {line.split("=")[0].strip().rsplit(".", 1)[-1] for line in bare}
  assert names <= set(wordless.split())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
  """Folders of tiny models with a byte tokenizer and a chat template."""
  folder = tmp_path_factory.mktemp("tiny")
  tokenizer = make_tokenizer("bytes", load_records("embedded:eval"))
  tokenizer.chat_template = CHATML
  depths = {"gpt2": 2, "llama": 10, "qwen3": 12, "gemma3_text": 14}
  for family, layers in depths.items():
    config = models.preset(
      family,
      vocab_size=len(tokenizer),
      hidden_size=16,
      num_layers=layers,
      num_heads=2,
      eos_ids=(tokenizer.eos_token_id,),
    )
    models.save(
      folder / family, models.init(config, jax.random.key(0)), config, tokenizer
    )
  rows = [{"instruction": f"Say {i}", "output": f"It is {i}."} for i in range(12)]
  data = folder / "data.jsonl"
  data.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return folder


@pytest.mark.parametrize(
  "name, family",
  [
    pytest.param("gpt2.py:base", "gpt2", marks=pytest.mark.slow),
    pytest.param("llama.py:7b", "llama", marks=pytest.mark.slow),
  ],
)
def test_the_papers_runs_in_two_steps(name, family, tiny, tmp_path):
  """Guards H2: teacher stage, start stage and OKD, on models small enough for here."""
  stages = [
    f"--config.stages.{stage}.{key}={value}"
    for stage in ("teacher", "start")
    for key, value in (("train.steps", 2), ("student.path", tiny / family))
  ]
  workdir = tmp_path / "run"
  arguments = [f"--config=configs/{name}", f"--workdir={workdir}", *TWO_STEPS]
  # The Alpaca wrapper alone has more bytes than the other tests' prompts.
  longer = [
    f"--config.data.train={tiny / 'data.jsonl'}",
    "--config.data.max_length=256",
  ]
  call("main", *arguments, *stages, *longer, "--config.data.max_prompt_length=250")
  assert (workdir / "student" / "config.json").exists()
  assert (workdir / "adapter" / "adapter_config.json").exists()


@pytest.mark.slow
def test_smollm2_in_two_steps(tiny, tmp_path):
  call(
    "main",
    "--config=configs/smollm2.py",
    f"--workdir={tmp_path / 'run'}",
    *TWO_STEPS,
    f"--config.teacher.path={tiny / 'llama'}",
    f"--config.data.train={tiny / 'data.jsonl'}",
  )
  config = json.loads((tmp_path / "run" / "student" / "config.json").read_text())
  assert config["num_hidden_layers"] == smollm2.get_config().student.layers == 8


@pytest.mark.slow
@pytest.mark.parametrize(
  "name, family", [("qwen3.py:8b", "qwen3"), ("gemma3.py:12b", "gemma3_text")]
)
def test_chats_in_two_steps(name, family, tiny, tmp_path):
  """In their debug form: tiny folders by the same rules, int8, and resumed."""
  arguments = [
    f"--config=configs/{name}",
    f"--workdir={tmp_path / 'run'}",
    *(flag for flag in TWO_STEPS if "train.steps" not in flag),
    "--config.train.batch_size=4",
    f"--config.teacher.path={tiny / family}",
    f"--config.student.path={tiny / family}",
    f"--config.data.train={tiny / 'data.jsonl'}",
    "--config.teacher.dtype=int8",
  ]
  call("main", *arguments, "--config.train.steps=2")
  done = call("main", *arguments, "--config.train.steps=4")
  assert "resuming at step 2 of 4" in done.stderr + done.stdout
  config = json.loads((tmp_path / "run" / "student" / "config.json").read_text())
  assert config["model_type"] == family


@pytest.mark.slow
def test_tokenizers_that_differ_are_refused(tiny, tmp_path):
  """Says which ids differ, before anything is trained."""
  other = tmp_path / "other"
  tokenizer = make_tokenizer("bpe:300", load_records("embedded:eval"))
  config = models.preset(
    "llama", vocab_size=len(tokenizer), hidden_size=16, num_layers=1, num_heads=2
  )
  models.save(other, models.init(config, jax.random.key(0)), config, tokenizer)
  done = call(
    "main",
    "--config=configs/default.py",
    f"--workdir={tmp_path / 'run'}",
    f"--config.teacher.path={tiny / 'llama'}",
    f"--config.student.path={other}",
    status=2,
  )
  assert "differ in" in done.stderr and "id 0:" in done.stderr
  assert "method.cross_tokenizer=uld" in done.stderr


@pytest.mark.slow
def test_a_padded_vocabulary_is_aligned(tiny, tmp_path):
  """Guards E1 (d 10): 151936 and 152064 rows of one tokenizer just work."""
  padded = tmp_path / "padded"
  model = models.load(tiny / "llama")
  config = models.preset(
    "llama", vocab_size=264, hidden_size=16, num_layers=1, num_heads=2
  )
  models.save(padded, models.init(config, jax.random.key(0)), config, model.tokenizer)
  call(
    "main",
    "--config=configs/default.py",
    f"--workdir={tmp_path / 'run'}",
    *TWO_STEPS,
    f"--config.data.train={tiny / 'data.jsonl'}",
    f"--config.teacher.path={tiny / 'llama'}",
    f"--config.student.path={padded}",
  )


def test_no_key_is_hidden_behind_a_method():
  """config_flags reads keys by getattr: one named like a method cannot be set."""

  def keys(config):
    for key, value in config.items():
      yield key
      if isinstance(value, ConfigDict):
        yield from keys(value)

  assert not {*keys(default.get_config())} & {*dir(ConfigDict)}


@pytest.mark.parametrize("recipe", ["quickstart.py", "okd_paper.py:gpt2.base"])
def test_stages_leave_the_runs_own_method_to_it(recipe, tmp_path):
  """A schedule or an adapter of the run must not reach the stages before it."""
  config = read.load_recipe(recipe)
  config.method.end.temperature = 2.0
  config.adapter.kind = "prefix"
  for stage in stages(config, tmp_path):
    method = check(stage.config).method
    assert (method.taught, method.adapts) == (not stage.name, not stage.name)
    ends = stage.config.method.end
    moving = [key for key, value in ends.items() if value is not None]
    assert moving == ([] if stage.name else ["temperature"])


@pytest.mark.parametrize(
  ("text", "targets"),
  [
    ("query,up", ("query", "up")),
    ("query, value,up", ("query", "value", "up")),
    (" [query,up]", ("query", "up")),
    ("2b,9b-it", ("2b", "9b-it")),
    ("('query', 'up')", ("query", "up")),
    ("query", ("query",)),
  ],
)
def test_several_words_are_written_as_people_write_them(text, targets):
  arguments = ["--config=configs/debug.py", f"--config.adapter.targets={text}"]
  assert tuple(read.read(arguments).adapter.targets) == targets


def test_text_with_commas_and_numbers_stay_as_they_are():
  arguments = ["--config=configs/debug.py", "--config.data.train=a,b"]
  arguments += [
    "--config.method.name=ensemble",
    "--config.method.teacher_weights=1.,2.",
  ]
  config = read.read(arguments)
  assert config.data.train == "a,b" and config.method.teacher_weights == (1.0, 2.0)


@pytest.mark.parametrize("recipe", STAGED)
@pytest.mark.parametrize(
  "flags",
  [
    ["method.name=okd", "adapter.layers=2", "teacher.trunk=memory"],
    ["method.name=kd", "adapter.kind=", "teacher.cache=stored"],
    ["method.name=kd", "teacher.adapter=runs/okd"],
    ["eval.best=forward_kl", "eval.patience=3"],
    ["method.name=ensemble", "teachers.a=one", "teachers.b=two", "teacher.path="],
    ["method.name=gkd", "adapter.kind=lora"],
    ["adapter.kind=prefix", "optim.lr=1e-4", "train.wandb=true"],
    ["checkpoint.keep=3", "mesh.fsdp=1", "export.dtype=bfloat16"],
  ],
  ids=lambda flags: flags[-1].partition("=")[0] + "," + flags[0],
)
def test_flags_pass_on_recipes_that_have_stages(recipe, flags, tmp_path):
  """What only a taught run understands must not reach the stages without a teacher."""
  given = [f"--config={recipe}", *(f"--config.{flag}" for flag in flags)]
  parts = stages(read.read(given), tmp_path)
  assert len(parts) > 1
  for part in parts:
    check(part.config)
  changed = dict(flag.split("=") for flag in flags)
  own = parts[-1].config
  assert own.method.name == changed.get("method.name", own.method.name)
  for part in parts[:-1]:
    section = part.config
    assert section.method.name == "sft" and not section.teachers
    assert not (section.teacher.trunk or section.teacher.cache or section.adapter.kind)
    assert section.eval.best != "forward_kl" and not section.eval.patience
    for key in ("optim.lr", "train.wandb", "checkpoint.keep", "mesh.fsdp"):
      if key in changed and key != "optim.lr":
        name, key = key.split(".")
        assert section[name][key] == own[name][key]


def test_okd_twice_learns_from_what_okd_adapted(tmp_path):
  """The module of stage 'okd', merged into the teacher of all stages; KD after that."""
  config = read.read(["--config=okd_twice"])
  *before, last = stages(config, tmp_path)
  assert [stage.name for stage in before] == ["teacher", "start", "okd"]
  okd, folder = before[-1].config, tmp_path / "stages"
  assert okd.method.name == "okd" and okd.adapter.rows == 0.25
  for own in (okd, last.config):
    assert own.teacher.path == str(folder / "teacher")
    assert own.student.path == str(folder / "start")
  assert last.config.method.name == "kd"
  assert last.config.teacher.adapter == str(folder / "okd") and not okd.teacher.adapter


def test_recipes_have_names_in_any_folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  want = read.read(["--config=gpt2:medium"])
  for spec in ("gpt2.py:medium", "configs/gpt2.py:medium"):
    assert read.read([f"--config={spec}"]).to_dict() == want.to_dict()
  own = tmp_path / "own.py"
  own.write_text("from configs import quickstart\nget_config = quickstart.get_config\n")
  assert read.read(["--config=own.py"]).stages
  with pytest.raises(UserError, match="no such file, and the recipes .* quickstart"):
    read.read(["--config=nothing"])


def test_somebody_elses_configs_do_no_harm(tmp_path, monkeypatch):
  """A package of that name is common; neither side may see the other's."""
  other = tmp_path / "configs"
  other.mkdir()
  (other / "__init__.py").write_text("OWN = True\n")
  (other / "default.py").write_text("raise RuntimeError('somebody else')\n")
  (other / "mine.py").write_text(
    "from configs import gpt2\ndef get_config():\n  return gpt2.get_config('base')\n"
  )
  for name in [m for m in list(__import__("sys").modules) if m.startswith("configs")]:
    monkeypatch.delitem(__import__("sys").modules, name)
  monkeypatch.syspath_prepend(tmp_path)
  monkeypatch.chdir(tmp_path)
  import configs

  assert configs.OWN
  assert read.read(["--config=gpt2:base"]).student.path
  assert read.read(["--config=configs/mine.py"]).student.path
  import configs as again

  assert again is configs


def test_help_tells_every_key():
  shown = describe()
  for key in read.keys(default.get_config()):
    for section, name in (("method.end", "KNOB"), ("teacher.model", "KEY")):
      if key.startswith(f"{section}."):  # one entry for all
        key = f"{section}.{name}"
    assert f"--config.{key}=" in shown, key
  assert "--config.teachers.NAME=" in shown
  assert (
    "  Text that is sampled for training." in shown
  )  # of several keys, at the margin
  assert "method.sampled_share=\n      of the steps; gkd 0.5\n" in shown
  assert "def " not in shown and "ConfigDict" not in shown


@pytest.mark.parametrize(
  "wrong, meant",
  [
    ("train.lr", "optim.lr"),
    ("optim.learning_rate", "optim.lr"),
    ("optim.warmup", "optim.warmup_steps"),
    ("method.temprature", "method.temperature"),
    ("steps", "train.steps"),
    ("adapter.ranks", "adapter.rank"),
  ],
)
def test_a_wrong_key_suggests_the_right_one_of_all(wrong, meant):
  with pytest.raises(UserError, match=f"did you mean --config.{meant}\\?"):
    read.read(["--config=debug", f"--config.{wrong}=1"])


def test_a_wrong_method_suggests_the_right_one():
  config = read.read(["--config=debug", "--config.method.name=gdk"])
  with pytest.raises(UserError, match="did you mean gkd"):
    check(config)


@pytest.mark.parametrize("text", ["nothing", "quickstart.foo", "studies"])
def test_recipes_that_are_none(text):
  with pytest.raises(ValueError, match="no recipe|no variants"):
    default.recipe(text)
