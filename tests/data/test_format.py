"""Templates: the exact text of every one, and what each refuses."""

import dataclasses

import pytest
from chats import LONG_TALK, SYSTEM_TALK, TALK, chat_tokenizer, talk

from okd_jax.data import Record, make_tokenizer
from okd_jax.data.format import Rendered, make_render
from okd_jax.errors import UserError

PLAIN = Record("instruction", "f:1", prompt="Add.", references=("3",))
WITH_INPUT = Record(
  "instruction", "f:2", prompt="Add.", input="1, 2", references=("3",)
)
BLANK_INPUT = Record("instruction", "f:3", prompt="Add.", input=" ", references=("3",))
COMPLETION = Record("completion", "f:4", prompt="Once {input}", references=(" upon",))
TEXT = Record("text", "f:5", text="All of it.")


def prompt_of(template, record, tokenizer=None):
  """The prompt; prompt and response must make up the whole text."""
  rendered = make_render(template, tokenizer)(record)
  assert rendered.full == rendered.prompt + rendered.response
  return rendered.prompt


@pytest.mark.parametrize("record", [PLAIN, BLANK_INPUT])
def test_default_without_input(record):
  assert prompt_of("default", record) == "### Instruction:\nAdd.\n\n### Response:\n"


def test_default_with_input():
  assert prompt_of("default", WITH_INPUT) == (
    "### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:\n"
  )


def test_alpaca():
  assert prompt_of("alpaca", PLAIN) == (
    "Below is an instruction that describes a task. Write a response that "
    "appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Response:\n"
  )
  assert prompt_of("alpaca", WITH_INPUT) == (
    "Below is an instruction that describes a task, paired with an input that provides "
    "further context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:\n"
  )


@pytest.mark.parametrize(
  "template, plain, with_input",
  [
    ("Q: {instruction} [{input}]\nA:", "Q: Add. []\nA:", "Q: Add. [1, 2]\nA:"),
    ("Q: {instruction}\nA:", "Q: Add.\nA:", "Q: Add.\n\n1, 2\nA:"),  # no place for it
    (
      "{{ instruction }}{% if input %} of {{ input }}{% endif %}\n",
      "Add.\n",
      "Add. of 1, 2\n",
    ),
    ("{{instruction}}>", "Add.>", "Add.\n\n1, 2>"),
  ],
)
def test_inline_templates_and_files(tmp_path, template, plain, with_input):
  path = tmp_path / "prompt.txt"
  path.write_text(template)
  for spec in (template, str(path)):
    assert prompt_of(spec, PLAIN) == plain
    assert prompt_of(spec, WITH_INPUT) == with_input


@pytest.mark.parametrize(
  "template", ["default", "{instruction}|{input}", "{{ instruction }}{{ input }}"]
)
def test_braces_in_the_data_are_text(template):
  odd, other = "{input} {{ input }} {% x %} {0}", "{instruction} {y}"
  record = dataclasses.replace(PLAIN, prompt=odd, input=other, references=("{input}",))
  prompt = prompt_of(template, record)
  assert prompt.count(odd) == prompt.count(other) == 1


@pytest.mark.parametrize("template", ["default", "alpaca", "{instruction}", "chat"])
def test_text_knows_no_template(template):
  rendered = make_render(template, chat_tokenizer())(TEXT)
  assert rendered == Rendered("", "All of it.", "All of it.")


@pytest.mark.parametrize("template", ["default", "alpaca", "{instruction}"])
def test_prompts_of_completions_stay_as_they_are(template):
  assert prompt_of(template, COMPLETION) == "Once {input}"


def test_single_turns_without_a_chat_template():
  assert prompt_of("{instruction}|", TALK) == "hi|"
  assert prompt_of("{instruction}|", SYSTEM_TALK) == "Be kind.\n\nhi|"


@pytest.mark.parametrize(
  "record", [LONG_TALK, talk(("user", "a"), ("user", "b")), talk(("system", "a"))]
)
def test_other_turns_need_a_chat_template(record):
  with pytest.raises(UserError, match="^f:6: .* set data.template=chat$"):
    make_render("default", None)(record)


def test_chat():
  tokenizer = chat_tokenizer()
  ask = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
  cases = (
    (PLAIN, ask.format("Add.")),
    (WITH_INPUT, ask.format("Add.\n\n1, 2")),
    (COMPLETION, ask.format("Once {input}")),
    (TALK, ask.format("hi")),
    (SYSTEM_TALK, "<|im_start|>system\nBe kind.<|im_end|>\n" + ask.format("hi")),
    (
      LONG_TALK,
      "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyes?<|im_end|>\n"
      + ask.format("who?"),
    ),
  )
  for record, prompt in cases:
    rendered = make_render("chat", tokenizer)(record)
    answer = record.references[0] + "<|im_end|>\n"
    assert rendered == Rendered(prompt, prompt + answer, answer, chat=True)


def test_a_chat_template_that_rewrites_the_prompt():
  """The prompt of generation is what counts; the answer then stands alone."""
  template = (
    "{% for m in messages %}[{{ m.role }}{{ '' if add_generation_prompt else '!' }}]"
    "{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
  )
  rendered = make_render("chat", chat_tokenizer(template))(TALK)
  assert rendered.prompt == "[user]hi[assistant]"
  assert (rendered.full, rendered.response) == ("[user]hi[assistant]hello", "hello")


def test_chat_needs_a_template():
  with pytest.raises(UserError, match="has no chat template; use default or alpaca"):
    make_render("chat", make_tokenizer("bytes", []))


def test_what_a_chat_template_refuses_is_named():
  refuses = "{{ raise_exception('no system message here') }}"
  with pytest.raises(UserError, match="^f:6: .*refuses.*no system message here"):
    make_render("chat", chat_tokenizer(refuses))(SYSTEM_TALK)


@pytest.mark.parametrize(
  "template, message",
  [
    ("alpacca", "data.template='alpacca' is no template: use default, alpaca, chat"),
    ("no/such/file.txt", "is no template"),
    ("", "is no template"),
    ("Q: {input}\nA:", "is no template"),
    ("{instruction} {output}", "uses output; it may use instruction and input"),
    ("{{ instruction }} {{ question }}", "uses question; it may use"),
    ("{{ input }}", "never uses instruction"),
    ("{{ instruction", "not valid jinja2"),
    ("{% if instruction %}", "not valid jinja2"),
  ],
)
def test_bad_templates(template, message):
  with pytest.raises(UserError) as caught:
    make_render(template, None)
  assert message in str(caught.value)


def test_templates_are_sandboxed():
  template = "{{ instruction.__class__.__mro__ }}"
  with pytest.raises(UserError, match="data.template: fails .access"):
    make_render(template, None)(PLAIN)


def test_a_template_file_that_is_no_text(tmp_path):
  path = tmp_path / "t.txt"
  path.write_bytes(b"{instruction}\xff")
  with pytest.raises(UserError, match="t.txt: the template cannot be read"):
    make_render(str(path), None)
