"""The benchmarks' commands: what they write, and how they refuse. No speeds."""

import json

import families
import pytest
from alphabet import save
from commands import call

from okd_jax.bench import command, measure
from okd_jax.errors import UserError

NAME = "llama_gqa"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp("bench") / "model"
  families.save(NAME, path)
  return path


def test_speculate_prints_both_speeds(tmp_path, capsys):
  """A model that drafts for itself: every token is kept, all texts are the same."""
  model, output = save(tmp_path / "model"), tmp_path / "result.json"
  rows = tmp_path / "rows.jsonl"
  rows.write_text("".join(f'{{"prompt": "{c}", "completion": "x"}}\n' for c in "abw"))
  command.main(
    [
      "speculate",
      f"--model={model}",
      f"--draft={model}",
      f"--data={rows}",
      "--max_new_tokens=6",
      "--draft_tokens=2",
      f"--output={output}",
    ]
  )
  printed = capsys.readouterr().out
  for title in ("models", "shape", "tokens/s", "ratio", "kept"):
    assert f"\n{title} " in printed
  result = json.loads(output.read_text())
  assert result["accepted"] == result["expected"] == 1 and result["same"] == 3
  assert 2 < result["tokens_a_pass"] <= 3
  assert result["tokens_per_s"].keys() == {"plain", "drafted"}


def test_generate_prints_a_table_and_writes_json(folder, tmp_path, capsys):
  output = tmp_path / "deep" / "result.json"
  shape = {"batch_size": 2, "prompt_tokens": 3, "max_new_tokens": 4, "repeats": 3}
  command.main(
    [
      "generate",
      f"--model={folder}",
      f"--output={output}",
      *(f"--{name}={value}" for name, value in shape.items()),
    ]
  )
  printed = capsys.readouterr().out
  titles = "machine,model,tokens/s,ms per token,where,floor,compile,memory"
  for title in titles.split(","):
    assert f"\n{title} " in "\n" + printed
  result = json.loads(output.read_text())
  keys = "benchmark date machine versions model parameters settings tokens_per_s"
  keys += " ms_per_token prompts_ms ms_per_later_token read_rate floor_ms to_floor"
  keys += " compile_s memory_bytes"
  assert list(result) == keys.split()
  assert result["model"] == "model" and result["benchmark"] == "generate"
  more = {"warmup": 1, "temperature": 0.0, "dtype": "float32"}
  assert result["settings"] == shape | more
  speed = result["tokens_per_s"]
  assert 0 < speed["min"] <= speed["median"] <= speed["max"]
  # Two rows of four tokens each: the median run took so long.
  milliseconds = 1e3 * 2 * 4 / speed["median"]
  assert result["ms_per_token"] == pytest.approx(milliseconds / 4)
  assert result["compile_s"] > 0
  parameters = sum(leaf.size for leaf in _leaves(families.params(_config())))
  assert result["parameters"] == parameters
  assert result["memory_bytes"]["arguments"] >= 4 * parameters


def test_every_row_runs_to_the_limit_whatever_the_settings(folder, monkeypatch):
  """An EOS would make some runs shorter, and their speed a fiction."""
  seen = []

  def seconds(call):
    seen.append(call())
    return 1.0

  monkeypatch.setattr(measure, "seconds", seconds)
  monkeypatch.setattr(measure, "read_rate", lambda: 1e9)
  flags = ["--batch_size=16", "--prompt_tokens=5", "--max_new_tokens=40", "--repeats=2"]
  flags += ["--temperature=9", "--dtype=bfloat16", "--warmup=0"]
  command.main(["generate", f"--model={folder}", *flags])
  assert [rollout.lengths.tolist() for rollout in seen[1::2]] == [[1] * 16] * 2
  for rollout in seen[::2]:
    assert rollout.lengths.tolist() == [40] * 16
    assert (rollout.tokens == _config().eos_ids[0]).any()


def test_the_model_must_have_room(folder):
  with pytest.raises(UserError, match="are 129 tokens, but the model takes 128"):
    command.main(["generate", f"--model={folder}", "--max_new_tokens=97"])


@pytest.mark.parametrize(
  "flag",
  [
    "--batch_size=0",
    "--prompt_tokens=0",
    "--max_new_tokens=2.5",
    "--repeats=0",
    "--warmup=-1",
    "--temperature=-0.1",
    "--temperature=nan",
    "--temperature=inf",
    "--dtype=int8",
    "--unknown=1",
  ],
)
def test_bad_flags_are_one_line_and_status_2(flag, capsys):
  _refused(["generate", "--model=nowhere", flag], flag.partition("=")[0], capsys)


TINY = ["--config.train.batch_size=2", "--config.data.max_length=16", "--repeats=2"]
TINY += ["--vocab_size=50", "--config.train.loss_chunk=4"]
LORA = ["--config.student.adapter.kind=lora", "--config.student.adapter.rank=2"]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "flags"), [("okd", []), ("sft", []), ("okd", LORA)])
def test_a_step_beside_its_arithmetic(method, flags, tmp_path):
  output = tmp_path / "step.json"
  shapes = ["--teacher=3x64", "--student=1x64", f"--method={method}"]
  done = call("bench", "step", *TINY, *shapes, *flags, f"--output={output}")
  result = json.loads(output.read_text())
  total = sum(result["operations"].values())
  assert result["floor_ms"] == pytest.approx(1e3 * total / result["matmul_rate"])
  ratio = result["ms"]["median"] / result["floor_ms"]
  assert result["to_floor"] == pytest.approx(ratio)
  memory = {"student", "optimizers", "temporaries"}
  memory |= {"teacher", "module"} if method == "okd" else set()
  if flags:
    memory.add("frozen student")
    # Of query and value of one layer, down [64, 2] and up [2, 64], in float32.
    assert result["memory_bytes"]["student"] == 4 * 2 * (64 * 2 + 2 * 64)
  assert set(result["memory_bytes"]) == memory
  assert result["settings"]["teacher"] == [3, 64]
  for title in ("step", "GFLOP", "floor", "compile", "memory"):
    assert f"\n{title} " in done.stdout


@pytest.mark.slow
def test_the_loss_beside_a_dense_one(tmp_path):
  """On this many tokens a chunk is an eighth of all logits."""
  output = tmp_path / "loss.json"
  shapes = ["--vocab_size=4096", "--student_size=32", "--teacher_size=48"]
  more = ["--config.data.max_length=64", "--config.train.loss_chunk=8"]
  call("bench", "loss", *TINY[::2], *shapes, *more, f"--output={output}")
  sizes = json.loads(output.read_text())["temporary_bytes"]
  assert sizes["chunked"] < sizes["dense"] / 4


@pytest.mark.slow
def test_depth_costs_no_compilation():
  """Layers are scanned: a program of twelve is as long as one of two."""
  flags = [*TINY[:2], "--vocab_size=50", "--hidden_size=64", "--layers=2,12"]
  done = call("bench", "compile", *flags)
  assert "2 layers" in done.stdout and "12 layers" in done.stdout


@pytest.mark.parametrize(
  ("flags", "words"),
  [
    (["--method=gkd"], "--method=gkd is more than a step on given rows"),
    (["--config.train.batch=3"], "config.train.batch is no configuration key"),
    (["--config.train.batch_size=0"], "train.batch_size=0 must be at least 1"),
    (["--config.train.microbatches=3"], "must be a multiple of train.microbatches=3"),
  ],
)
@pytest.mark.filterwarnings("ignore:.*load_module:DeprecationWarning")  # ml_collections
def test_what_a_step_refuses(flags, words):
  with pytest.raises(UserError, match=words):
    command.main(["step", *flags])


def test_a_benchmark_must_be_named(capsys):
  _refused([], "BENCHMARK", capsys)
  _refused(["nothing", "--model=nowhere"], "nothing", capsys)
  _refused(["generate"], "--model", capsys)
  _refused(["step", "--teacher=8"], "no LAYERSxCHANNELS", capsys)
  _refused(["step", "--what=3"], "unrecognized arguments: --what=3", capsys)


def _refused(arguments, named, capsys):
  with pytest.raises(SystemExit) as exit:
    command.main(arguments)
  assert exit.value.code == 2
  out, err = capsys.readouterr()
  assert not out
  assert err.count("\n") == 1 and named in err


def _config():
  return families.CONFIGS[NAME]


def _leaves(tree):
  for value in tree.values():
    yield from _leaves(value) if isinstance(value, dict) else [value]
