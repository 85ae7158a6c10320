"""`okd_jax.evaluate`: known scores, the protocol of MiniLLM and OKD, kept answers."""

import json
import statistics

import pytest
from alphabet import save
from answering import random_model

from okd_jax import evaluate, models
from okd_jax.data import load_records, prepare, read_predictions, read_references
from okd_jax.errors import UserError
from okd_jax.evaluation import draws
from okd_jax.evaluation.answers import answer
from okd_jax.evaluation.held_out import Options
from okd_jax.evaluation.rouge import score

TEMPLATE = "--template={instruction}"


def write(path, *rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf8")
  return path


def run(folder, *arguments):
  """The results that the command writes, of a model in `folder/model`."""
  output = folder / "results.json"
  fixed = [f"--model={folder / 'model'}", TEMPLATE, f"--output={output}"]
  evaluate.main([*fixed, "--batch_size=2", *arguments])
  return json.loads(output.read_text())


@pytest.fixture(scope="module")
def drawing(tmp_path_factory):
  """A folder with a model that draws bytes, and two sets of prompts."""
  folder = tmp_path_factory.mktemp("drawing")
  decoder, variables, tokenizer = random_model()
  models.save(folder / "model", variables["params"], decoder.config, tokenizer)
  for name, count in (("one", 11), ("two", 3)):
    rows = ({"instruction": "ab" * (i % 5 + 1), "output": "a b"} for i in range(count))
    write(folder / f"{name}.jsonl", *rows)
  return folder


def test_rouge_of_answers_known_beforehand(tmp_path):
  """The alphabet's model says 'xyz', nothing and 'yz'; F = 2 P R / (P + R) by hand."""
  save(tmp_path / "model")
  data = write(
    tmp_path / "data.jsonl",
    {"instruction": "w", "output": ["no", "xyz abc"]},  # P 1, R 1/2: F 2/3
    {"instruction": "z", "output": "xyz"},  # an empty answer: 0
    {"instruction": "x", "output": "yz über café"},  # words yz, ber, caf: F 1/2
    {"instruction": "x", "output": ["Yz!"]},  # 1, and an exact match
  )
  found = run(tmp_path, f"--data={data}")
  assert round(found["rougeL"], 4) == 54.1667
  assert found["exact_match"] == 25
  assert found["n"] == found["prompts"] == 4
  assert found["draws"] == {"greedy": {"rougeL": found["rougeL"], "exact_match": 25}}


def test_letters_that_rouge_does_not_see_are_told(tmp_path, caplog):
  save(tmp_path / "model")
  rows = [
    {"instruction": "w", "output": x} for x in ("北京", "xyz", "Ærø", "– €", "Åse")
  ]
  run(tmp_path, f"--data={write(tmp_path / 'data.jsonl', *rows)}")
  assert "2 of 5 rows have references with letters outside ASCII" in caplog.text


def test_the_protocol(drawing):
  """Five draws at temperature 1 and greedy answers, of each set, as if asked singly."""
  sets = [f"{name}={drawing / name}.jsonl" for name in ("one", "two")]
  into = drawing / "kept"
  short = ["--max_new_tokens=12", "--protocol"]
  found = run(drawing, "--sets", *sets, *short, f"--answers={into}")
  model = models.load(drawing / "model")
  for name in ("one", "two"):
    path = str(drawing / f"{name}.jsonl")
    examples, _ = prepare(
      load_records(path),
      model.tokenizer,
      template="{instruction}",
      max_length=64,
      max_prompt_length=52,
    )
    results, scores = found[name], {}
    for seed in (None, 10, 20, 30, 40, 50):
      drawn = "greedy" if seed is None else f"seed{seed}"
      texts = answer(
        models.Decoder(model.config),
        {"params": model.params},
        examples,
        model.tokenizer,
        template="{instruction}",
        max_new_tokens=12,
        temperature=0.0 if seed is None else 1.0,
        seed=seed or 0,
      )
      assert read_predictions(str(into / name / f"{drawn}.jsonl")) == texts
      scores[drawn] = score(texts, read_references(path))
      assert results["draws"][drawn]["rougeL"] == scores[drawn]["rougeL"]
    greedy = scores.pop("greedy")["rougeL"]
    values = [each["rougeL"] for each in scores.values()]
    assert results["seeds"] == [10, 20, 30, 40, 50]
    assert results["rougeL_greedy"] == greedy
    assert results["rougeL"] == pytest.approx(statistics.fmean(values))
    assert results["rougeL_std"] == pytest.approx(statistics.stdev(values))


def test_what_was_stopped_is_gone_on_with(drawing, monkeypatch, tmp_path):
  """Stopped within a draw, the same command answers what is missing, with no other."""
  short = [f"--data={drawing}/one.jsonl", "--max_new_tokens=12", "--protocol"]
  short += ["--seeds=1,2", "--no_repeat_ngram=2"]
  whole = run(drawing, *short, f"--answers={tmp_path / 'whole'}")
  asked, generate = [], draws.generate

  def counting(*arguments, rows=(), **options):
    asked.extend(rows)
    return generate(*arguments, rows=rows, **options)

  def stopping(*arguments, rows=(), **options):
    if len(asked) > 17:
      raise KeyboardInterrupt
    return counting(*arguments, rows=rows, **options)

  with monkeypatch.context() as patch:
    patch.setattr(draws, "generate", stopping)
    with pytest.raises(KeyboardInterrupt):
      run(drawing, *short, f"--answers={tmp_path / 'cut'}")
  cut = tmp_path / "cut"
  assert len((cut / "seed1.jsonl.partial").read_text().splitlines()) == 8
  count = len(asked)  # ends with a piece that was not asked: 11 + 8
  monkeypatch.setattr(draws, "generate", counting)
  assert run(drawing, *short, f"--answers={cut}") == whole
  assert len(asked) - count == 3 + 11  # the end of seed 1, and seed 2
  for name in ("greedy", "seed1", "seed2"):
    kept = [(x / f"{name}.jsonl").read_bytes() for x in (cut, tmp_path / "whole")]
    assert kept[0] == kept[1]


@pytest.mark.parametrize(
  "change", ["--no_repeat_ngram=3", "--max_new_tokens=11", "--limit=5"]
)
def test_answers_to_something_else_are_refused(drawing, change):
  short = [f"--data={drawing}/one.jsonl", "--max_new_tokens=12"]
  short.append(f"--answers={drawing / 'once'}")
  run(drawing, *short)
  with pytest.raises(UserError, match=r"greedy.jsonl was made from something else"):
    run(drawing, *short, change)


@pytest.mark.parametrize(
  "arguments, message",
  [
    (["--sets", "one"], "'one' must be NAME=F.jsonl"),
    (["--sets", "../x=F"], "'../x=F' must be NAME=F.jsonl"),
    (["--sets", "a=F", "a=G"], "'a' is named twice"),
    (["--data=F", "--protocol", "--temperature=0"], "--protocol draws answers"),
    (["--data=F", "--seeds=1,1"], "must be one or more, all different"),
    (["--data=F", "--no_repeat_ngram=-1"], "--no_repeat_ngram=-1 must be at least 0"),
  ],
)
def test_mistakes_are_told_before_a_model_is_read(arguments, message):
  with pytest.raises(UserError) as told:
    evaluate.main(["--model=does/not/exist", *arguments])
  assert message in str(told.value)


def test_data_is_never_written_over(tmp_path, capsys):
  data = write(tmp_path / "data.jsonl", {"instruction": "w", "output": "x"})
  for flag in ("predictions", "output"):
    with pytest.raises(SystemExit):
      evaluate.main(["--model=M", f"--data={data}", f"--{flag}={data}"])
    assert "is the data; name another file" in capsys.readouterr().err


@pytest.mark.parametrize("seeds", ["-1", "4294967296", "a", "1,,2"])
def test_seeds_that_cannot_be(seeds, capsys):
  with pytest.raises(SystemExit):
    evaluate.main(["--model=M", "--data=F", f"--seeds={seeds}"])
  assert "must be a whole number, from 0 to 2^32 - 1" in capsys.readouterr().err


def test_predictions_of_several_sets_are_refused(capsys):
  with pytest.raises(SystemExit) as left:
    evaluate.main(["--model=M", "--sets", "a=F", "--predictions=P"])
  assert left.value.code == 2
  assert "--answers keeps those of all sets" in capsys.readouterr().err


@pytest.mark.parametrize(
  "flag, words", [("output", "is a folder"), ("answers", "is a file")]
)
def test_places_that_cannot_be_are_told_first(flag, words, tmp_path, capsys):
  place = tmp_path if flag == "output" else write(tmp_path / "file", {})
  with pytest.raises(SystemExit) as left:
    evaluate.main(["--model=M", "--data=F", f"--{flag}={place}"])
  assert left.value.code == 2 and words in capsys.readouterr().err


def test_which_answers_are_drawn():
  def names(**options):
    return [(d.name, d.temperature) for d in Options(seeds=(1, 2), **options).draws]

  greedy = [("greedy", 0)]
  assert names() == names(temperature=0) == greedy
  assert names(temperature=0.5) == [("seed1", 0.5), ("seed2", 0.5)]
  assert names(protocol=True) == [*greedy, ("seed1", 1), ("seed2", 1)]
