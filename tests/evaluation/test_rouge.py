"""ROUGE-L, exact match, and the command that prints them."""

import json
import subprocess
import sys

import pytest

from okd_jax import score as score_module
from okd_jax.errors import UserError
from okd_jax.evaluation.rouge import score
from okd_jax.score import main


def write(path, *rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
  return str(path)


def test_known_rouge():
  # Longest common subsequence 'the cat the mat' of 6 and 5 words: P 4/5, R 4/6.
  result = score(["the cat on the mat"], [["the cat sat near the mat"]])
  assert result["rougeL"] == pytest.approx(
    100 * 2 * (4 / 5) * (4 / 6) / (4 / 5 + 4 / 6)
  )
  assert result["exact_match"] == 0
  assert result["n"] == 1


def test_words_are_stemmed():
  assert score(["running dogs"], [["run dog"]])["rougeL"] == pytest.approx(100)


def test_order_counts():
  assert score(["b a"], [["a b"]])["rougeL"] == pytest.approx(50)


def test_the_best_reference_counts():
  references = ["nothing alike", "blue sky", "a blue sky"]
  result = score(["A blue sky!"], [references])
  assert result["rougeL"] == pytest.approx(100)
  assert result["exact_match"] == 100
  assert score(["A blue sky!"], [references[:1]])["rougeL"] == 0


@pytest.mark.parametrize(
  "prediction, reference, same",
  [
    ("Yes.", "yes", True),
    ("  The   answer\n is: 4 ", "the answer is 4", True),
    ("a-b", "ab", True),
    ("a b", "ab", False),
    ("the cat", "cat", False),  # articles count
    ("", "yes", False),
    ("", "", True),
    # Signs and points of numbers are no punctuation.
    ("1.0", "10", False),
    ("1.0.", "1.0", True),
    (".5", "5", False),
    ("-5", "5", False),
    ("\u22125", "-5", True),
    ("x = -5", "x 5", False),
    ("5-3", "53", False),
    ("- 5", "5", True),
    ("1,000,000", "1000000", True),
    ("1,5", "15", False),
    # Nor is what names end in.
    ("C++", "C", False),
    ("C++.", "c++", True),
    ("C#", "C", False),
    ("A+", "A", False),
    ("a+b", "ab", True),
    # Of what is nothing but punctuation each is itself alone.
    ("?!", "...", False),
    (" ... ", "...", True),
    ("你好。", "你好", True),
    ("«Да»", "да", True),
  ],
)
def test_exact_match_ignores_case_punctuation_and_spaces(prediction, reference, same):
  assert score([prediction], [[reference]])["exact_match"] == 100 * same


def test_means_over_rows():
  result = score(["a", "x", "a"], [["a"], ["y"], ["b"]])
  assert result == {
    "n": 3,
    "rougeL": pytest.approx(100 / 3),
    "exact_match": pytest.approx(100 / 3),
  }


@pytest.mark.parametrize(
  "prediction, references, want",
  [
    # LCS 'the quick fox' of 4 and 4 words: P 3/4, R 3/4.
    ("the quick red fox", ["the quick brown fox"], 75.0),
    # The second: LCS 'a b' of 2 and 3 words, P 1, R 2/3, F 4/5; the first: F 1/3.
    ("a b", ["a x y z", "a b c"], 80.0),
    # LCS 'one two' of 5 and 2 words: P 2/5, R 1, F 4/7.
    ("one thing or two things", ["one two"], 57.1429),
    ("", ["some words"], 0.0),
    ("some words", ["", "other"], 0.0),
    ("", [""], 0.0),  # no words, no overlap; exact match is 1
    # Only ASCII letters and digits make words: 'caf' is 1 of 2, P = R = 1/2.
    ("café noir", ["café bleu"], 50.0),
    # 'na', 've' of 3 and 3: an umlaut splits a word, P = R = 2/3.
    ("naïve one", ["naïve two"], 66.6667),
    # Where most letters are of another script, words are of any letters …
    ("Привет, мир", ["привет мир!"], 100.0),
    ("नमस्ते दुनिया", ["नमस्ते भारत"], 50.0),
    ("γεια κόσμε ok", ["γεια κόσμε okays"], 66.6667),
    # … and characters where a script has no spaces.
    ("北京", ["北京"], 100.0),
    ("我爱北京", ["我在北京。"], 75.0),
    ("สวัสดี", ["สวัสดี"], 100.0),
    ("ﾃｽﾄ", ["テスト"], 100.0),  # of half width
    # A few letters of another script make no other text.
    ("the letter π is pi", ["the letter π is nice"], 75.0),
  ],
)
def test_by_hand_to_four_decimals(prediction, references, want):
  """F = 2 P R / (P + R) of the longest common subsequence of words."""
  assert round(score([prediction], [references])["rougeL"], 4) == want


def test_mistakes():
  with pytest.raises(UserError, match="1 predictions do not match 2 rows"):
    score(["a"], [["a"], ["b"]])
  with pytest.raises(UserError, match="nothing to score"):
    score([], [])
  with pytest.raises(UserError, match="row 2 has no reference"):
    score(["a", "b"], [["a"], []])
  with pytest.raises(TypeError, match="list of strings"):
    score(["a"], ["a"])


# The command


def test_command_writes_and_prints(tmp_path, capsys):
  predictions = write(tmp_path / "p.jsonl", {"text": "a b"}, {"text": ""})
  references = write(
    tmp_path / "f.jsonl", {"instruction": "?", "output": ["x", "A b."]}, {"output": "c"}
  )
  output = tmp_path / "deep" / "o.json"
  main([f"--predictions={predictions}", f"--references={references}"])
  main(
    [f"--predictions={predictions}", f"--references={references}", f"--output={output}"]
  )
  assert json.loads(output.read_text()) == {"n": 2, "rougeL": 50, "exact_match": 50}
  assert [path.name for path in output.parent.iterdir()] == ["o.json"]
  assert capsys.readouterr().out == "n 2   ROUGE-L 50.00   exact match 50.00\n" * 2


def test_references_in_every_form(tmp_path, capsys):
  predictions = write(tmp_path / "p.jsonl", *[{"text": "a"}] * 3)
  talk = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "a"}]
  rows = {"output": "a"}, {"prompt": "?", "completion": "a"}, {"messages": talk}
  references = write(tmp_path / "f.jsonl", *rows)
  main([f"--predictions={predictions}", f"--references={references}"])
  assert "exact match 100.00" in capsys.readouterr().out


@pytest.mark.parametrize(
  "rows, message",
  [
    ([{"text": "a"}, {"text": "b"}], "2 predictions do not match 1 rows"),
    ([{"answer": "a"}], r'p.jsonl:1: a prediction must look like {"text": "..."}'),
    ([{"text": None}], "p.jsonl:1: a prediction must look like"),
    (["a"], "p.jsonl:1: a prediction must look like"),
    ([], "p.jsonl: the file is empty"),
  ],
)
def test_bad_predictions(tmp_path, rows, message):
  predictions = write(tmp_path / "p.jsonl", *rows)
  references = write(tmp_path / "f.jsonl", {"output": "a"})
  with pytest.raises(UserError) as caught:
    main([f"--predictions={predictions}", f"--references={references}"])
  assert message in str(caught.value)


def test_an_output_that_cannot_be_written(tmp_path):
  path = write(tmp_path / "p.jsonl", {"text": "a", "output": "a"})
  (tmp_path / "file").write_text("")
  arguments = [f"--predictions={path}", f"--references={path}"]
  with pytest.raises(UserError, match="cannot be written"):
    main([*arguments, f"--output={tmp_path}/file/o.json"])


def test_errors_are_one_line_and_status_2(tmp_path):
  command = [sys.executable, "-m", score_module.__name__]
  references = write(tmp_path / "f.jsonl", {"output": "a"})
  arguments = [f"--predictions={tmp_path}/no.jsonl", f"--references={references}"]
  done = subprocess.run([*command, *arguments], capture_output=True, text=True)
  assert (done.returncode, done.stdout) == (2, "")
  assert done.stderr == f"error: {tmp_path}/no.jsonl: no such file or folder\n"


def test_help(capsys):
  with pytest.raises(SystemExit) as done:
    main(["--help"])
  assert done.value.code == 0
  assert "--predictions" in capsys.readouterr().out
