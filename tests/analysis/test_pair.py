"""`okd_jax.analyze` on two small models: what it writes, and what it refuses."""

import json

import jax
import pytest

from okd_jax import analyze, models
from okd_jax.analysis import pair, pictures
from okd_jax.data import load_records, make_tokenizer
from okd_jax.errors import UserError
from okd_jax.runtime import cli

PICTURES = ("difficulty", "calibration", "top_tokens", "exposure_bias")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A teacher, a student, a teacher's adapter and rows with prompts."""
  folder = tmp_path_factory.mktemp("pair")
  tokenizer = make_tokenizer("bytes", load_records("embedded:eval"))
  for seed, (name, layers) in enumerate((("teacher", 2), ("student", 1))):
    config = models.preset(
      "llama",
      vocab_size=len(tokenizer),
      hidden_size=16,
      num_layers=layers,
      num_heads=2,
      eos_ids=(tokenizer.eos_token_id,),
    )
    params = models.init(config, jax.random.key(seed))
    models.save(folder / name, params, config, tokenizer)
  rows = [{"prompt": f"Say {i}: ", "completion": "so be it " * i} for i in range(1, 7)]
  lines = "".join(json.dumps(row) + "\n" for row in rows)
  (folder / "rows.jsonl").write_text(lines)
  (folder / "plain.jsonl").write_text('{"text": "nothing to continue"}\n' * 3)
  return folder


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
  """Compiled programs for several devices hang when they come from the cache."""
  monkeypatch.setattr(cli, "use_compilation_cache", lambda: None)


def arguments(folder, output, *more):
  return [
    f"--student={folder / 'student'}",
    f"--teacher={folder / 'teacher'}",
    f"--data={folder / 'rows.jsonl'}",
    f"--output={output}",
    "--max_length=64",
    "--max_prompt_length=32",
    "--length=4",
    *more,
  ]


def test_the_command_writes_figures_and_pictures(folder, tmp_path, capsys):
  analyze.main(arguments(folder, tmp_path, "--positions=0:12,5:20"))
  found = json.loads((tmp_path / "analysis.json").read_text())
  assert found["rows"] == 6 and "adapted" not in found
  tokens = found["tokens"]
  assert tokens["all"] == tokens["hard"] + tokens["easy"] > 100
  every = found["teacher"]["all"]
  for name in every:  # the groups are a partition: means weigh up
    mixed = sum(tokens[g] * found["teacher"][g][name] for g in ("hard", "easy"))
    assert every[name] == pytest.approx(mixed / tokens["all"], rel=1e-4), name
  assert found["teacher"]["hard"]["unc"] > found["teacher"]["easy"]["unc"]
  assert found["exposure_bias"]["teacher"]["prompts"] == 6
  places = found["top_tokens"]
  assert [(place["row"], place["position"]) for place in places] == [(0, 12), (5, 20)]
  likely = [row["teacher"] for row in places[0]["tokens"]]
  assert len(likely) == 50 and likely == sorted(likely, reverse=True)
  for name in PICTURES:
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
  shown = capsys.readouterr().out
  assert "against the frozen teacher" in shown and "exposure bias" in shown


def test_a_copy_on_rows_without_prompts(folder, tmp_path):
  """No further than rounding; and nothing to continue, so no exposure bias."""
  teacher = models.load(str(folder / "teacher"))
  records = load_records(str(folder / "plain.jsonl"))
  options = pair.Options(max_length=64, max_prompt_length=32, length=4)
  found = pair.analyse(teacher, teacher, None, records, options)
  assert found["teacher"]["all"]["top1_agreement"] == 1
  assert abs(found["teacher"]["all"]["forward_kl"]) < 1e-6
  assert "exposure_bias" not in found
  pictures.draw(found, tmp_path)
  assert not (tmp_path / "exposure_bias.png").exists()


@pytest.mark.parametrize(
  "wrong, message",
  [
    ("--length=1024", "1024 new tokens leave no room"),
    ("--batch_size=0", "--batch_size=0 must be at least 1"),
    ("--positions=0-12", "--positions=0-12 must look like 0:12,3:5"),
    ("--positions=99:1", "row 99 has no response token that follows position 1"),
    ("--positions=0:1", "row 0 has no response token"),
    ("--student=nowhere", "nowhere"),
  ],
)
def test_what_is_refused(folder, tmp_path, wrong, message):
  with pytest.raises(UserError, match=message):
    analyze.main(arguments(folder, tmp_path, wrong))
  assert not (tmp_path / "analysis.json").exists()
