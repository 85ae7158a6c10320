"""The command: what it prints, where it stops, and how it refuses."""

import io
import subprocess
import sys
from pathlib import Path

import families
import pytest
import tokenizers
from alphabet import (
  BOS,
  EOS,
  PAD,
  TURN,
  alphabet_tokenizer,
  save,
)

from okd_jax import generate, models
from okd_jax.errors import UserError
from okd_jax.text import complete

STORIES = Path(__file__).parents[1].parent / "shared" / "models" / "stories260K"
# A question in parentheses; its first letter opens the answer.
TEMPLATE = (
  "{% set opening = messages[0].content[0] %}"
  "{% for m in messages %}"
  "{% if m.role == 'user' %}({{ m.content }})"
  "{% else %}{{ opening + m.content }}<|turn|>{% endif %}"
  "{% endfor %}{% if add_generation_prompt %}{{ opening }}{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return save(tmp_path_factory.mktemp("alphabet") / "model")


@pytest.fixture
def printed(capsys):
  """Runs the command and returns what it printed, less the line break at the end."""

  def run(*arguments):
    generate.main(list(arguments))
    out = capsys.readouterr().out
    assert out.endswith("\n")
    return out[:-1]

  return run


def test_prints_the_completion_alone_up_to_the_end_of_the_text(folder, printed):
  assert printed(f"--model={folder}", "--prompt=u") == "vwxyz"
  assert printed(f"--model={folder}", "--prompt=b", "--max_new_tokens=3") == "cde"


def test_a_draft_changes_nothing_but_the_time(folder, tmp_path, printed, caplog):
  """The alphabet drafts for one that ends its text another way."""
  other = save(tmp_path / "other", end=ord("!"))
  caplog.set_level("INFO")
  flags = (f"--draft={folder}", "--draft_tokens=3", "--max_new_tokens=7")
  assert printed(f"--model={other}", *flags, "--prompt=u") == "vwxyz!a"
  assert "kept 7 of 8 drafted tokens (88%)" in caplog.text
  assert printed(f"--model={folder}", f"--draft={other}", "--prompt=u") == "vwxyz"


def test_what_needs_a_draft_is_refused_without_one(folder, printed):
  with pytest.raises(UserError, match="name who writes it by --draft"):
    printed(f"--model={folder}", "--draft_tokens=3", "--prompt=u")


def test_two_templates(folder, printed, capsys):
  with pytest.raises(SystemExit):
    printed(f"--model={folder}", "--chat", "--template=alpaca", "--prompt=u")
  assert "not allowed with" in capsys.readouterr().err


def test_a_draft_of_other_tokens(folder, tmp_path, printed):
  tokenizer = alphabet_tokenizer()
  tokenizer.add_tokens(["zz"])
  other = save(tmp_path / "other", tokenizer)
  with pytest.raises(UserError, match="of model and draft .* that was distilled"):
    printed(f"--model={folder}", f"--draft={other}", "--prompt=u")


def test_continues_the_prompt_as_it_is(folder, printed):
  assert printed(f"--model={folder}", "--prompt=Über, w") == "xyz"
  assert printed(f"--model={folder}", "--prompt=w ", "--max_new_tokens=2") == "ab"


def test_a_dash_reads_standard_input_less_its_last_line_break(
  folder, printed, monkeypatch
):
  for text, completion in ((b"w", "xyz"), (b"q\nw\n", "xyz"), (b"w\n\n", "abc")):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
    arguments = (f"--model={folder}", "--prompt=-", "--max_new_tokens=4")
    assert printed(*arguments)[:3] == completion


def test_special_tokens_that_the_tokenizer_adds(tmp_path, printed):
  """A BOS in front stays, an EOS behind goes, one in the text itself stays."""
  tokenizer = alphabet_tokenizer()
  tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
    single="<|bos|> $A <|endoftext|>",
    special_tokens=[("<|bos|>", BOS), ("<|endoftext|>", EOS)],
  )
  model = models.Model(models.ModelConfig(), None, tokenizer)
  assert complete._plain_tokens(model, "w") == [BOS, ord("w")]
  assert complete._plain_tokens(model, "w<|endoftext|>") == [BOS, ord("w"), EOS]
  assert complete._plain_tokens(model, "") == [BOS]
  name = save(tmp_path / "model", tokenizer)
  assert printed(f"--model={name}", "--prompt=w") == "xyz"
  assert printed(f"--model={name}", "--prompt=", "--max_new_tokens=3") == "abc"


def test_a_chat_goes_through_the_template_and_ends_with_the_turn(tmp_path, printed):
  tokenizer = alphabet_tokenizer()
  tokenizer.chat_template = TEMPLATE
  name = save(tmp_path / "model", tokenizer, end=TURN)
  # The prompt becomes "(w!)w".
  assert printed(f"--model={name}", "--prompt=w!", "--chat") == "xyz"
  # What ends a turn ends no text, and is not printed either.
  assert printed(f"--model={name}", "--prompt=w", "--max_new_tokens=6") == "xyzab"


def test_the_template_of_the_run_that_made_the_model_asks(tmp_path, printed):
  """Instructions, not a text to go on with, are what such a model was trained on."""
  tokenizer = alphabet_tokenizer()
  tokenizer.chat_template = TEMPLATE
  folder = tmp_path / "run" / "student"
  name = save(folder, tokenizer, end=TURN, template="{instruction} b")
  for model in (name, tmp_path / "run"):
    assert printed(f"--model={model}", "--prompt=w", "--max_new_tokens=2") == "cd"
  asked = (f"--model={name}", "--prompt=w", "--max_new_tokens=2")
  assert printed(*asked, "--template=raw") == "xy"
  assert printed(*asked, "--template={instruction}p") == "qr"
  assert printed(*asked, "--chat") == printed(*asked, "--template=chat") == "xy"


def test_any_of_several_ends_ends(tmp_path, printed):
  name = save(tmp_path / "model", end=TURN, eos_ids=(PAD, TURN))
  assert printed(f"--model={name}", "--prompt=w") == "xyz"


def test_without_a_length_the_context_is_the_limit(tmp_path, printed):
  name = save(tmp_path / "model", max_length=10)
  assert printed(f"--model={name}", "--prompt=abcd") == "efghij"
  with pytest.raises(UserError, match="4 tokens and 7 new ones .* at most 10 in all"):
    printed(f"--model={name}", "--prompt=abcd", "--max_new_tokens=7")
  with pytest.raises(UserError, match="10 tokens and 1 new ones"):
    printed(f"--model={name}", "--prompt=abcdefghij")


def test_sampling_flags(folder, printed):
  def sample(*flags):
    return printed(f"--model={folder}", "--prompt=a", "--max_new_tokens=12", *flags)

  hot = "--temperature=9"
  assert sample() == "bcdefghijklm"
  assert sample(hot, "--seed=4") == sample(hot, "--seed=4") != sample(hot, "--seed=5")
  assert sample(hot, "--top_k=1") == sample(hot, "--top_p=1e-6") == sample()
  assert sample("--dtype=bfloat16") == sample()


def test_errors_of_the_model(folder, tmp_path, printed):
  with pytest.raises(UserError, match="the prompt has no tokens"):
    printed(f"--model={folder}", "--prompt=")
  with pytest.raises(UserError, match="no chat template; set --template=raw"):
    printed(f"--model={folder}", "--prompt=a", "--chat")
  with pytest.raises(UserError, match="not valid UTF-8"):
    printed(f"--model={folder}", "--prompt=\udcff")
  families.save("gpt2", tmp_path / "bare")
  with pytest.raises(UserError, match="has no tokenizer"):
    printed(f"--model={tmp_path / 'bare'}", "--prompt=a")
  config = families.CONFIGS["gpt2"]
  models.save(tmp_path / "small", families.params(config), config, alphabet_tokenizer())
  with pytest.raises(UserError, match="token 97, but the model knows only 61"):
    printed(f"--model={tmp_path / 'small'}", "--prompt=a")


def test_a_chat_template_may_refuse(tmp_path, printed):
  tokenizer = alphabet_tokenizer()
  tokenizer.chat_template = "{{ raise_exception('no system message') }}"
  name = save(tmp_path / "model", tokenizer)
  with pytest.raises(UserError, match="chat template refuses .*no system message"):
    printed(f"--model={name}", "--prompt=a", "--chat")


@pytest.mark.parametrize(
  "flag",
  [
    "--temperature=-0.1",
    "--temperature=nan",
    "--temperature=inf",
    "--temperature=warm",
    "--top_p=0",
    "--top_p=1.01",
    "--top_k=-1",
    "--top_k=2.5",
    "--seed=-1",
    "--max_new_tokens=0",
    "--dtype=int8",
    "--unknown=1",
  ],
)
def test_bad_flags_are_one_line_and_status_2(flag, capsys):
  with pytest.raises(SystemExit) as exit:
    generate.main(["--model=nowhere", "--prompt=a", flag])
  assert exit.value.code == 2
  out, err = capsys.readouterr()
  assert not out
  assert err.count("\n") == 1
  assert flag.partition("=")[0] in err


def _command(*arguments):
  return subprocess.run(
    [sys.executable, "-m", "okd_jax.generate", *arguments],
    capture_output=True,
    text=True,
  )


@pytest.mark.slow
def test_the_process(folder, tmp_path):
  done = _command(f"--model={folder}", "--prompt=u")
  assert (done.returncode, done.stdout) == (0, "vwxyz\n"), done.stderr
  refused = _command(f"--model={tmp_path}", "--prompt=u")
  assert (refused.returncode, refused.stdout) == (2, "")
  assert refused.stderr.count("\n") == 1 and refused.stderr.startswith("error: ")


def test_help_explains_every_flag(capsys):
  with pytest.raises(SystemExit) as exit:
    generate.main(["--help"])
  assert exit.value.code == 0
  help = capsys.readouterr().out
  flags = "model prompt chat max_new_tokens temperature top_p top_k seed dtype"
  assert all(f"--{flag}" in help for flag in flags.split())


@pytest.mark.skipif(not STORIES.exists(), reason="needs ../shared")
@pytest.mark.filterwarnings("ignore")  # transformers' own
@pytest.mark.slow
def test_a_real_model_tells_the_story_of_transformers(printed):
  torch = pytest.importorskip("torch")
  theirs = families.torch_model(STORIES)
  tokenizer = models.load(STORIES, params=False).tokenizer
  tokens = tokenizer("Once upon a time", return_tensors="pt")["input_ids"]
  with torch.no_grad():
    out = theirs.generate(tokens, max_new_tokens=128, do_sample=False)
  expected = tokenizer.decode(out[0, tokens.shape[1] :], skip_special_tokens=True)
  assert printed(f"--model={STORIES}", "--prompt=Once upon a time") == expected
