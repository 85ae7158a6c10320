"""The command: tasks from files, what it prints and writes, and how it refuses."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from alphabet import alphabet_tokenizer, save

from okd_jax import lm_eval, models
from okd_jax.errors import UserError

needed = "needs lm_eval: pip install -e '.[lm-eval]'"
harness = pytest.importorskip("lm_eval", reason=needed)

from okd_jax.evaluation import harness_tasks  # noqa: E402
from okd_jax.runtime import cli  # noqa: E402

ROOT = Path(__file__).parents[1]
GSM8K = ROOT / "configs" / "lm_eval" / "gsm8k_local.yaml"
SPELL = """
task: spell
dataset_path: json
dataset_kwargs: {data_files: {test: nowhere.jsonl}}
test_split: test
fewshot_split: test
output_type: generate_until
doc_to_text: "{{instruction}}"
doc_to_target: "{{output}}"
generation_kwargs: {until: ["!", "?"], max_gen_toks: 12}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
CHOOSE = """
task: choose
dataset_path: json
dataset_kwargs: {data_files: {test: nowhere.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{instruction}}"
doc_to_choice: ["xyz", "vwx", "uvw"]
doc_to_target: "{{answer}}"
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
READ = """
task: read
dataset_path: json
dataset_kwargs: {data_files: {test: nowhere.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{instruction}}{{output}}"
metric_list: [{metric: byte_perplexity, aggregation: weighted_perplexity}]
"""
ROWS = [
  {"instruction": "w", "output": "xyz", "answer": 0},
  {"instruction": "u", "output": "vwxyz", "answer": 1},
  {"instruction": "t", "output": "u", "answer": 0},
]


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
  """`datasets` keeps what it reads; not in the user's own folder."""
  import datasets

  with pytest.MonkeyPatch.context() as patch:
    folder = str(tmp_path_factory.mktemp("datasets"))
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    yield


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  """A folder with a model that knows the alphabet, three tasks and their rows."""
  folder = tmp_path_factory.mktemp("place")
  save(folder / "model")
  (folder / "tasks").mkdir()
  for name, text in (("spell", SPELL), ("choose", CHOOSE), ("read", READ)):
    (folder / "tasks" / f"{name}.yaml").write_text(text)
  rows = "".join(json.dumps(row) + "\n" for row in ROWS)
  (folder / "rows.jsonl").write_text(rows)
  return folder


def run(place, *arguments, tasks="tasks", data="rows.jsonl"):
  flags = [f"--data={place / data}"] if data else []
  where = f"--tasks={place / tasks}"
  lm_eval.main([f"--model={place / 'model'}", where, *flags, *arguments])


def test_a_folder_of_tasks_and_what_is_written(place, tmp_path, capsys):
  output = tmp_path / "results.json"
  run(place, f"--output={output}", "--log_samples", "--batch_size=2")
  found = json.loads(output.read_text())
  values = found["results"]
  # After w and u the alphabet goes on as expected; after t it goes on for too long.
  assert values["spell"]["exact_match,none"] == pytest.approx(2 / 3)
  assert values["choose"]["acc,none"] == pytest.approx(2 / 3)
  assert values["read"]["byte_perplexity,none"] > 1
  assert found["config"]["model"] == str(place / "model")
  texts = [sample["resps"] for sample in found["samples"]["spell"]]
  assert texts == [[["xyz"]], [["vwxyz"]], [["uvwxyz"]]]
  table = capsys.readouterr().out
  for cell in ("Tasks", "exact_match", "|acc", "byte_perplexity", "0.6667"):
    assert cell in table


def test_few_shots_and_a_limit(place, tmp_path):
  output = tmp_path / "results.json"
  flags = ("--limit=2", "--num_fewshot=1", "--gen_kwargs=max_gen_toks=3", "--seed=7")
  run(place, f"--output={output}", *flags, tasks="tasks/spell.yaml")
  found = json.loads(output.read_text())
  assert found["n-samples"]["spell"] == {"original": 3, "effective": 2}
  assert found["n-shot"] == {"spell": 1}
  assert "samples" not in found
  assert found["results"]["spell"]["exact_match,none"] == 0.5  # vwxyz is too long


def test_names_and_a_folder_that_has_them(place, tmp_path, capsys, monkeypatch):
  """--include_path gives tasks names; without the harness's, which take seconds."""
  text = SPELL.replace("nowhere.jsonl", str(place / "rows.jsonl"))
  for name in ("spell_one", "spell_two"):
    own = text.replace("task: spell", f"task: {name}")
    (tmp_path / f"{name}.yaml").write_text(own)
  few = harness_tasks._Manager(include_path=str(tmp_path), include_defaults=False)
  monkeypatch.setattr(harness_tasks, "_Manager", lambda **_: few)
  model, folder = f"--model={place / 'model'}", f"--include_path={tmp_path}"
  lm_eval.main([model, folder, "--tasks=spell_*", "--limit=1"])
  table = capsys.readouterr().out
  assert "spell_one" in table and "spell_two" in table
  with pytest.raises(UserError, match="no task 'spell_tow'; did you mean spell_two?"):
    lm_eval.main([model, folder, "--tasks", "spell_one,spell_tow", str(GSM8K)])
  monkeypatch.chdir(place)  # where a folder has no such name
  assert [config["task"] for config in harness_tasks.find_tasks(["tasks"])[1]] == [
    *("choose", "read", "spell")
  ]


def test_gsm8k_from_a_local_file(place, tmp_path, capsys):
  """As shipped: a question, its answer's last line, and other questions before it."""
  rows = [{"instruction": f"{n} + 1?", "output": f"So\n#### {n + 1}"} for n in range(4)]
  file = tmp_path / "gsm8k.jsonl"
  file.write_text("".join(json.dumps(row) + "\n" for row in rows))
  output = tmp_path / "results.json"
  lm_eval.main(
    [
      *(f"--model={place / 'model'}", f"--tasks={GSM8K}", f"--data=test={file}"),
      *("--num_fewshot=2", "--gen_kwargs=max_gen_toks=12", "--limit=2"),
      *(f"--output={output}", "--log_samples"),
    ]
  )
  found = json.loads(output.read_text())
  assert found["results"]["gsm8k_local"]["exact_match,strict-match"] == 0
  prompt = found["samples"]["gsm8k_local"][0]["arguments"][0][0]
  assert prompt.endswith("\n\nQuestion: 0 + 1?\nAnswer:")
  assert prompt.count("Question:") == 3 == prompt.count("####") + 1
  assert "gsm8k_local" in capsys.readouterr().out


def test_chats(place, tmp_path):
  tokenizer = alphabet_tokenizer()
  tokenizer.chat_template = (
    "{% for m in messages %}({{ m.content }}){% endfor %}"
    "{% if add_generation_prompt %}{{ messages[-1].content }}{% endif %}"
  )
  save(tmp_path / "model", tokenizer)
  output = tmp_path / "results.json"
  flags = (f"--model={tmp_path / 'model'}", f"--tasks={place / 'tasks' / 'spell.yaml'}")
  chat = ("--apply_chat_template", "--num_fewshot=1", "--limit=1", "--log_samples")
  file = f"--data={place / 'rows.jsonl'}"
  lm_eval.main([*flags, *chat, file, f"--output={output}"])
  [sample] = json.loads(output.read_text())["samples"]["spell"]
  prompt = sample["arguments"][0][0]
  assert prompt.endswith("(w)w") and prompt.count("(") == 3
  assert sample["resps"] == [["xyz"]]
  with pytest.raises(UserError, match="--apply_chat_template: .* has no template"):
    run(place, "--apply_chat_template", tasks="tasks/spell.yaml")


BAD_YAML = "task: spell\ndataset_path: [json\n"


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"tasks": "tasks/other.yaml"}, "no file or folder .*other.yaml"),
    ({"tasks": "model/"}, "the folder .* holds no .yaml files"),
    ({"data": "other.jsonl"}, "--data: there is no file .*other.jsonl"),
    ({"data": ""}, "cannot be loaded: .*nowhere.jsonl"),
    ({"arguments": ["--limit=-1"]}, "--limit=-1 must be at least 0"),
    ({"arguments": ["--batch_size=0"]}, "--batch_size=0 must be at least 1"),
    ({"arguments": ["--max_length=999"]}, "--max_length=999, .* takes only 200"),
    ({"arguments": ["--include_path=nowhere"]}, "--include_path=nowhere is no folder"),
    (
      {"arguments": ["--gen_kwargs=max_gen_toks=200"]},
      "task spell: 200 new tokens are asked",
    ),
    ({"arguments": ["--num_fewshot=3"]}, "task spell: prompts cannot .*Sample larger"),
    ({"arguments": ["--gen_kwargs=min_p=0.1"]}, "task spell: .*not there: min_p"),
  ],
)
def test_refusals(place, changes, message):
  arguments = changes.pop("arguments", [])
  with pytest.raises(UserError, match=message):
    run(place, *arguments, **{"tasks": "tasks/spell.yaml"} | changes)


def test_files_that_are_no_tasks(place, tmp_path):
  for text, message in (
    (BAD_YAML, "(?s)is no task: .*expected"),
    ("dataset_path: json\n", "neither the key task nor group"),
    (SPELL + "unsafe_code: true\n", "runs code that the model writes"),
    (SPELL.replace("dataset_path: json", "dataset_path: mnist"), "--data is for tasks"),
    (SPELL.replace("exact_match", "no_such"), "spell: there is no metric no_such"),
    (SPELL.replace("generate_until", "sing"), "cannot be loaded: .*'sing'"),
  ):
    (tmp_path / "task.yaml").write_text(text)
    arguments = [f"--tasks={tmp_path / 'task.yaml'}", f"--data={place / 'rows.jsonl'}"]
    with pytest.raises(UserError, match=message):
      lm_eval.main([f"--model={place / 'model'}", *arguments])


def test_models_that_cannot_read_a_task(place, tmp_path):
  params, config = (
    models.load(place / "model").params,
    models.load(place / "model").config,
  )
  models.save(tmp_path / "bare", params, config)
  task = [f"--tasks={place / 'tasks' / 'spell.yaml'}", f"--data={place / 'rows.jsonl'}"]
  with pytest.raises(UserError, match="no tokenizer"):
    lm_eval.main([f"--model={tmp_path / 'bare'}", *task])
  with pytest.raises(UserError, match="no such file or folder"):
    lm_eval.main(["--model=./nowhere", *task])


def test_the_package_is_asked_for_where_it_is_missing(place, monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(UserError, match=r"lm_eval is missing: .*okd-jax\[lm-eval\]"):
    run(place)


def test_neither_module_hides_the_other(monkeypatch):
  assert Path(lm_eval.__file__).parent.name == "okd_jax"
  assert Path(harness.__file__).parent.name == "lm_eval"
  # In the folder that holds our command `import lm_eval` would find it first.
  monkeypatch.delitem(sys.modules, "lm_eval")
  monkeypatch.chdir(Path(lm_eval.__file__).parent)
  monkeypatch.setattr(sys, "path", ["", *sys.path])
  assert importlib.util.find_spec("lm_eval").origin == lm_eval.__file__
  cli.need("lm_eval", "lm-eval")
  assert importlib.util.find_spec("lm_eval").origin == harness.__file__


@pytest.mark.parametrize(
  "flag", ["--limit=two", "--dtype=int8", "--unknown=1", "--log_samples"]
)
def test_bad_flags_are_one_line_and_status_2(flag, capsys):
  with pytest.raises(SystemExit) as exit:
    lm_eval.main(["--model=nowhere", "--tasks=a", flag])
  assert exit.value.code == 2
  out, err = capsys.readouterr()
  assert not out and err.count("\n") == 1 and flag.partition("=")[0] in err


@pytest.mark.slow
def test_the_process(place):
  arguments = ["--tasks=tasks/spell.yaml", "--data=rows.jsonl"]
  command = [sys.executable, "-m", "okd_jax.lm_eval", *arguments]
  done = subprocess.run(
    [*command, "--model=model"], cwd=place, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  assert "|spell|" in done.stdout and "loading model" in done.stderr
  refused = subprocess.run(
    [*command, "--model=./other"], cwd=place, capture_output=True, text=True
  )
  assert (refused.returncode, refused.stdout) == (2, "")
  assert "error: ./other" in refused.stderr and "Traceback" not in refused.stderr
  named = [*command[:3], "--model=model", "--tasks=arc_eazy"]
  refused = subprocess.run(named, cwd=place, capture_output=True, text=True)
  assert refused.returncode == 2 and "did you mean arc_easy?" in refused.stderr
