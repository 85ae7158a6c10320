"""Responses as data: order, ends, resuming to the byte, and shares of processes."""

import dataclasses
import itertools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from alphabet import alphabet_tokenizer, save
from answering import PROMPTS, alphabet, ask, random_model, say, write

from configs import stories
from okd_jax import models, sample
from okd_jax.data import Record, encode, load_records
from okd_jax.data.format import decode_response
from okd_jax.errors import UserError
from okd_jax.text import answers_file, answers_job
from okd_jax.text.rollout import Sampling

EOS = 256  # of the byte tokenizer
ROOMY = {"max_length": 4096, "max_prompt_length": 4096}
GREEDY = Sampling(temperature=0.0)


def rows(content):
  return [json.loads(line) for line in content.splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """What an undisturbed run writes, and its settings."""
  path = tmp_path_factory.mktemp("whole") / "o.jsonl"
  content = write(path)
  assert sorted(p.name for p in path.parent.iterdir()) == [
    "o.jsonl",
    "o.jsonl.made_from.json",
  ]
  return content, (path.parent / "o.jsonl.made_from.json").read_bytes()


# Rows


def test_the_response_takes_the_answers_place(tmp_path):
  """In each form, in the data's order, whatever the order of the prompts' lengths."""
  talk = ({"role": "user", "content": "x"},)
  records = [
    Record("instruction", "f:1", prompt="Say", input="w", references=("old", "older")),
    ask("a long prompt that ends in v", "f:2"),
    Record("messages", "f:3", messages=talk, references=("old",)),
    Record("instruction", "f:4", prompt="Say y", references=("old",)),
  ]
  path = tmp_path / "o.jsonl"
  options = {"sampling": GREEDY, "template": "{instruction}{input}"}
  assert rows(write(path, records, alphabet(), **options)) == [
    {"instruction": "Say", "input": "w", "output": "xyz"},
    {"prompt": "a long prompt that ends in v", "completion": "wxyz"},
    {"messages": [*talk, {"role": "assistant", "content": "yz"}]},
    {"instruction": "Say y", "output": "z"},
  ]
  again = load_records(str(path))
  assert [record.kind for record in again] == [record.kind for record in records]
  assert [record.prompt for record in again] == [record.prompt for record in records]


def test_prompts_alone_are_answered_beside_others(tmp_path):
  given = tmp_path / "given.jsonl"
  asked = [{"prompt": "Say v"}, {"prompt": "Say v", "completion": "old"}]
  asked += [{"messages": [{"role": "user", "content": "x"}]}]
  asked += [{"instruction": "y", "teacher_prompt": "y, z"}]
  given.write_text("".join(json.dumps(row) + "\n" for row in asked))
  records = load_records(str(given), prompts=True)
  path = tmp_path / "o.jsonl"
  options = {"sampling": GREEDY, "template": "{instruction}{input}"}
  assert rows(write(path, records, alphabet(), **options)) == [
    {"prompt": "Say v", "completion": "wxyz"},
    {"prompt": "Say v", "completion": "wxyz"},
    {"messages": [*asked[2]["messages"], {"role": "assistant", "content": "yz"}]},
    {"instruction": "y", "output": "z", "teacher_prompt": "y, z"},
  ]


def test_what_met_the_limit_has_not_ended(tmp_path):
  """Guards B7: an end that the model never put would be learned from every such row."""
  path = tmp_path / "o.jsonl"
  options = {"max_new_tokens": 4, "sampling": GREEDY}
  assert rows(write(path, [ask("w"), ask("a")], alphabet(), **options)) == [
    {"prompt": "w", "completion": "xyz"},
    {"prompt": "a", "completion": "bcde", "ended": False},
  ]
  ended, cut = (
    encode(record, alphabet_tokenizer(), **ROOMY)[0].tokens.tolist()
    for record in load_records(str(path))
  )
  assert (ended, cut) == ([*b"wxyz", EOS], list(b"abcde"))


def test_silence_is_a_response(tmp_path):
  path = tmp_path / "o.jsonl"
  assert rows(write(path, [ask("z")], alphabet(), sampling=GREEDY)) == [
    {"prompt": "z", "completion": "<|endoftext|>"}
  ]
  [example] = encode(load_records(str(path))[0], alphabet_tokenizer(), **ROOMY)
  assert example.tokens.tolist() == [ord("z"), EOS]


@pytest.mark.parametrize(
  "response, ended, text",
  [
    (b"cd", True, "cd"),
    ("cé".encode()[:-1], False, "c"),
    (b"\n", True, "\n<|endoftext|>"),
    ([257], False, "<|pad|>"),
    ([257, 99], True, "c"),
  ],
)
def test_responses_that_are_no_plain_text(response, ended, text):
  prompt, tokens = (np.array(list(x), np.int32) for x in (b"ab", response))
  assert decode_response(alphabet_tokenizer(), prompt, tokens, ended) == text


def test_the_space_after_the_prompt_stays(shared):
  tokenizer = models.load(shared / "models" / "stories260K", params=False).tokenizer
  prompt, both = (tokenizer(x)["input_ids"] for x in ("Once upon", "Once upon a time"))
  assert tokenizer.decode(both[len(prompt) :]) == "a time"
  response = np.array(both[len(prompt) :])
  assert decode_response(tokenizer, np.array(prompt), response, True) == " a time"


# The same file, however it came to be


def test_the_draws_are_the_seeds_and_the_rows(tmp_path, whole):
  content = whole[0]
  assert {row.get("ended", True) for row in rows(content)} == {True, False}
  texts = [row["completion"] for row in rows(content)]
  assert texts[0] != texts[5] and PROMPTS[0].prompt == PROMPTS[5].prompt
  assert write(tmp_path / "a.jsonl", batch_size=5) == content
  some = write(tmp_path / "b.jsonl", PROMPTS[:13])
  assert some == b"".join(content.splitlines(keepends=True)[:13])
  assert write(tmp_path / "c.jsonl", seed=1) != content


def resume(folder, settings, part):
  """The file of a run that finds so much of it."""
  folder.mkdir()
  (folder / "o.jsonl.made_from.json").write_bytes(settings)
  (folder / "o.jsonl.partial").write_bytes(part)
  return write(folder / "o.jsonl")


def test_a_cut_file_is_gone_on_with(tmp_path, whole, monkeypatch):
  """Whole lines stay, a torn one is written again, and a cut piece is as it was."""
  content, settings = whole
  lines = content.splitlines(keepends=True)
  ends = [0, *itertools.accumulate(map(len, lines))]
  places = [0, 3, ends[1], ends[8] - 1, ends[8], ends[9] + 5, ends[20], len(content)]
  asked, generate = [], answers_file.generate

  def noted(*args, rows=(), **kwargs):
    asked.extend(rows)
    return generate(*args, rows=rows, **kwargs)

  monkeypatch.setattr(answers_file, "generate", noted)
  for number, place in enumerate(places):
    asked.clear()
    assert resume(tmp_path / str(number), settings, content[:place]) == content
    kept = content[:place].count(b"\n")
    assert asked == list(range(kept // 8 * 8 if kept < 21 else 21, 21))


def test_a_killed_run_leaves_whole_pieces(tmp_path, whole, monkeypatch):
  generate = answers_file.generate

  def dies(*args, rows=(), **kwargs):
    if 16 in rows:
      raise KeyboardInterrupt
    return generate(*args, rows=rows, **kwargs)

  path = tmp_path / "o.jsonl"
  with monkeypatch.context() as patch:
    patch.setattr(answers_file, "generate", dies)
    with pytest.raises(KeyboardInterrupt):
      write(path)
  assert not path.exists()
  part = (path.parent / "o.jsonl.partial").read_bytes()
  assert part == b"".join(whole[0].splitlines(keepends=True)[:16])
  assert write(path) == whole[0]


def test_a_whole_file_is_left_alone_and_one_that_is_gone_made_anew(tmp_path, whole):
  (tmp_path / "o.jsonl.made_from.json").write_text("{}")
  path = tmp_path / "o.jsonl"
  assert write(path) == whole[0]
  before = path.stat()
  assert write(path) == whole[0] and path.stat() == before


@pytest.mark.parametrize("count", [2, 3, 5])
def test_processes_share_the_rows(tmp_path, whole, monkeypatch, count):
  """Guards G4: three pieces for two, three and five, the parts made in any order."""
  jobs = []
  with monkeypatch.context() as patch:
    patch.setattr(answers_file, "answer", jobs.append)
    patch.setattr(Path, "read_bytes", lambda path: b"")
    write(tmp_path / "o.jsonl")
  [job] = jobs
  shares = [job.share(index, count) for index in range(count)]
  assert [row for share in shares for row in share] == list(range(21))
  for index in reversed(range(count)):
    answers_job.write_part(job, index, count, shown=False)
  answers_job.join(job, count)
  assert job.path.read_bytes() == whole[0]
  assert [p.name for p in tmp_path.iterdir()] == ["o.jsonl"]


@pytest.mark.parametrize("count", [1, 2])
def test_another_order_gives_the_same_file(tmp_path, whole, monkeypatch, count):
  """The longest prompts first: lines lie in the rows' own order, with their draws."""
  jobs = []
  with monkeypatch.context() as patch:
    patch.setattr(answers_file, "answer", lambda job: jobs.append(job) or False)
    write_samples = answers_file.write_samples
    decoder, variables, tokenizer = random_model()
    path = tmp_path / "o.jsonl"
    options = {"max_new_tokens": 12, "batch_size": 2}
    write_samples(decoder, variables, PROMPTS, tokenizer, path, **options)
  order = sorted(range(21), key=lambda i: -len(jobs[0].prompts[i]))
  asked = []

  def ask(prompts, rows):
    asked.extend(rows)
    return jobs[0].ask(prompts=prompts, rows=rows)

  job = dataclasses.replace(jobs[0], order=order, ask=ask)
  for index in range(count):
    answers_job.write_part(job, index, count, shown=False)
  answers_job.join(job, count)
  assert asked == order != list(range(21))
  assert path.read_bytes() == whole[0]
  assert [x.name for x in tmp_path.iterdir()] == ["o.jsonl"]


_PROCESSES = """
import sys
import jax
from pathlib import Path
processes, number, port = map(int, sys.argv[1:4])
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", processes, number)
import answering
from okd_jax.runtime import sharding
folder = Path(sys.argv[4])
answering.write(folder / "shared.jsonl")
decoder, variables, tokenizer = answering.random_model()
mesh = sharding.make_mesh(fsdp=2)
spread = jax.device_put(jax.device_get(variables), sharding.shardings(variables, mesh))
options = {"batch_size": 8, "sharding": sharding.batch_sharding(mesh)}
with jax.set_mesh(mesh):
  model = decoder, spread, tokenizer
  answering.write(folder / "together.jsonl", model=model, **options)
  answering.say(folder / "tokens.jsonl", model=(decoder, spread), **options)
"""


@pytest.mark.slow
def test_two_processes_write_the_file_of_one(tmp_path, whole):
  """Guards G4: by shares, and together where the model is spread over both."""
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    port = probe.getsockname()[1]
  devices = "--xla_force_host_platform_device_count=4"
  path = os.pathsep.join(sys.path)
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", _PROCESSES, "2", str(number), str(port), str(tmp_path)],
      cwd=Path(__file__).parents[1],
      env={**os.environ, "XLA_FLAGS": devices, "PYTHONPATH": path},
      stderr=subprocess.PIPE,
      text=True,
    )
    for number in range(2)
  ]
  for process in processes:
    stderr = process.communicate(timeout=300)[1]
    assert process.returncode == 0, stderr
  for name in ("shared", "together"):
    assert (tmp_path / f"{name}.jsonl").read_bytes() == whole[0]
  say(tmp_path / "alone.jsonl")
  alone, both = ((tmp_path / f"{x}.jsonl").read_bytes() for x in ("alone", "tokens"))
  assert alone == both
  assert not list(tmp_path.glob("*.partial*"))


# What is refused


def refused(path, *words, **options):
  before = sorted(path.parent.iterdir())
  with pytest.raises(UserError) as caught:
    write(path, **options)
  assert all(word in str(caught.value) for word in words), caught.value
  assert "\n" not in str(caught.value) and sorted(path.parent.iterdir()) == before


@pytest.mark.parametrize("name", ["o.jsonl", "o.jsonl.partial"])
def test_a_file_of_other_settings_is_refused(tmp_path, whole, name):
  content, settings = whole
  path = tmp_path / "o.jsonl"
  (tmp_path / name).write_bytes(content[:300])
  refused(path, name, "nothing says how it was made")
  sidecar = tmp_path / "o.jsonl.made_from.json"
  sidecar.write_text("{")
  refused(path, name, "nothing says how it was made")
  sidecar.write_bytes(settings)
  refused(path, name, "seed=0 there, 1 here", "name another output", seed=1)
  refused(path, "top_p=1.0 there, 0.5 here", sampling=Sampling(1.0, 0, 0.5))
  refused(path, "max_new_tokens=12 there, 13 here", max_new_tokens=13)
  refused(path, "model='", model=random_model(1))
  refused(path, "data='", records=[*PROMPTS[:-1], ask("b")])
  assert write(path) == (content[:300] if name == "o.jsonl" else content)


def test_parts_of_another_number_of_processes(tmp_path, whole):
  """Their shares are others, and nobody would take them up."""
  (tmp_path / "o.jsonl.made_from.json").write_bytes(whole[1])
  (tmp_path / "o.jsonl.partial.0-of-3").write_bytes(whole[0][:300])
  refused(tmp_path / "o.jsonl", "partial.0-of-3", "another number of processes")


def test_too_many_lines(tmp_path, whole):
  with pytest.raises(UserError, match="holds 22 lines, but 21 are asked"):
    resume(tmp_path / "run", whole[1], whole[0] + b"{}\n")


def test_what_cannot_be_asked(tmp_path):
  path = tmp_path / "o.jsonl"
  text = Record("text", "f:7", text="abc")
  refused(path, "f:7: is plain text", records=[*PROMPTS, text])
  refused(path, "no records", records=[])
  refused(path, "temperature=-1", sampling=Sampling(-1.0))
  refused(path, "batch_size=0", batch_size=0)
  refused(path, "max_new_tokens=0", max_new_tokens=0)
  refused(path, "do not fit the model's 64 tokens", max_new_tokens=64)
  refused(path, "do not fit", max_new_tokens=10, max_prompt_length=55)
  refused(path, "max_prompt_length=0", max_prompt_length=0)
  refused(tmp_path / "o.txt", "must end in .jsonl")
  (tmp_path / "o.jsonl").mkdir()
  refused(path, "o.jsonl is a folder; name a file")


def test_a_long_prompt_is_answered_by_its_end(tmp_path, caplog):
  record = ask("w" * 99 + "x")
  options = {"sampling": GREEDY, "max_prompt_length": 9}
  with caplog.at_level("INFO", logger="okd_jax"):
    content = write(tmp_path / "o.jsonl", [record], alphabet(), **options)
  assert rows(content) == [{"prompt": record.prompt, "completion": "yz"}]
  assert "cut 1 prompts to their last 9 tokens" in caplog.text


# The command


def test_the_command(tmp_path, capsys):
  folder = save(tmp_path / "model")
  data, output = tmp_path / "d.jsonl", tmp_path / "o.jsonl"
  lines = [json.dumps({"prompt": x, "completion": "-"}) for x in "wxyz"]
  data.write_text("\n".join(lines))
  arguments = [f"--model={folder}", f"--data={data}", f"--output={output}"]
  options = ["--temperature=0", "--max_new_tokens=9", "--limit=3"]
  sample.main([*arguments, *options])
  assert [row["completion"] for row in rows(output.read_bytes())] == ["xyz", "yz", "z"]
  captured = capsys.readouterr()
  assert captured.out == "" and "sample 3/3 rows" in captured.err
  with pytest.raises(UserError, match="temperature=0.0 there, 0.5 here"):
    sample.main([*arguments, *options, "--temperature=0.5"])
  for wrong in ("--seed=-1", "--top_k=some", "--limit=-1", "--top_p=0"):
    with pytest.raises(SystemExit, match="2"):
      sample.main([*arguments, wrong])
    assert wrong.partition("=")[0] in capsys.readouterr().err


# Stories


def test_stories_that_begin_alike_stay_together(tmp_path, capsys):
  path = tmp_path / "stories.jsonl"
  texts = [f'{name} said "hi." He left{i}.' for i in range(3) for name in "ABCDEFGHIJ"]
  lines = [{"prompt": "<s>", "completion": text} for text in [*texts, "Only one."]]
  lines[1]["ended"] = False
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  parts = stories.split(path)
  assert len(parts["train"]) + len(parts["eval"]) == 30 and all(parts.values())
  first, second = ({row["prompt"] for row in rows} for rows in parts.values())
  assert not first & second and 'A said "hi."' in first | second
  [row] = [row for rows in parts.values() for row in rows if "ended" in row]
  cut = {"completion": " He left0.", "ended": False}
  assert row == {"prompt": 'B said "hi."', **cut}
  assert "left out 1 stories" in capsys.readouterr().err


@pytest.mark.slow
def test_the_teacher_tells_its_own_stories(shared, tmp_path):
  model = shared / "models" / "stories260K"
  stories.main([f"--model={model}", f"--output={tmp_path}", "--stories=96"])
  parts = [load_records(str(tmp_path / f"{x}.jsonl")) for x in ("train", "eval")]
  assert sum(map(len, parts)) == 96
  tokenizer = models.load(model, params=False).tokenizer
  for record in parts[0]:
    [example] = encode(record, tokenizer, **ROOMY)
    assert record.prompt[0] != " " and record.references[0][0] in " \n"
    assert (example.tokens[-1] == tokenizer.eos_token_id) == record.ended
  assert Path(stories.get_config().teacher.path) == model
