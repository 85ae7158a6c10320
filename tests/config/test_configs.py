"""Every shipped configuration loads, names only known keys, and runs two steps."""

import importlib
import inspect
import itertools
import json
from pathlib import Path

import jax
import pytest
from commands import QUICK, call
from ml_collections import ConfigDict

from configs import default, gpt2, llama, smollm2
from okd_jax import methods, models
from okd_jax.data import load_records, make_tokenizer
from okd_jax.run import loop as train

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


def every_config():
  for path in sorted((ROOT / "configs").rglob("*.py")):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    module = importlib.import_module(name)
    variants = {"gpt2": gpt2.VARIANTS, "llama": llama.TEACHERS}.get(path.stem, [None])
    if name.startswith("configs.studies."):
      variants = [*module.VALUES, f"{module.VALUES[0]}@gpt2.base"]
    elif "recipe" in inspect.signature(module.get_config).parameters:
      variants = [None, "gpt2.medium"]
    for variant in variants:
      yield pytest.param(module, variant, id=f"{path.stem}:{variant or ''}")


@pytest.mark.parametrize("module, variant", list(every_config()))
def test_configuration_names_only_known_keys(module, variant, tmp_path):
  """Guards H1: each stage is applied to the locked default, so a typo raises."""
  config = module.get_config(variant) if variant else module.get_config()
  known = default.get_config()
  for _, part, folder in train.stages(config, tmp_path):
    assert folder.is_relative_to(tmp_path)
    merged = ConfigDict(known.to_dict()).lock()
    merged.update(part)
    assert json.dumps(merged.to_dict())


def test_every_key_has_a_comment():
  lines = (ROOT / "configs" / "default.py").read_text().splitlines()
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
  """Folders of a tiny GPT-2 and LLaMA with a byte tokenizer and a chat template."""
  folder = tmp_path_factory.mktemp("tiny")
  tokenizer = make_tokenizer("bytes", load_records("embedded:eval"))
  tokenizer.chat_template = CHATML
  for family, layers in (("gpt2", 2), ("llama", 10)):
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
  """A schedule or a module of the run must not reach the stages before it."""
  name, _, variant = recipe.removesuffix(".py").partition(":")
  module = importlib.import_module(f"configs.{name.removesuffix('.py')}")
  config = module.get_config(variant) if variant else module.get_config()
  config.method.end.temperature = 2.0
  config.adapter.kind = "prefix"
  for stage, part, _ in train.stages(config, tmp_path):
    built = methods.build(part.method.name, part.method, part.adapter.kind)
    assert built.teacher == ("none" if stage else "adapted")
    moving = [k for k, v in part.method.end.items() if v is not None]
    assert moving == ([] if stage else ["temperature"])


@pytest.mark.parametrize("text", ["nothing", "quickstart.foo", "studies"])
def test_recipes_that_are_none(text):
  with pytest.raises(ValueError, match="no recipe|no variants"):
    default.recipe(text)
