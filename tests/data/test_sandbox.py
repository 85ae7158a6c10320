"""Templates of strangers: what they may not do, and that others notice nothing."""

import threading

import chats
import pytest
from chats import CALLING, chat_tokenizer

from okd_jax.data import Record, sandbox
from okd_jax.data.chat_template import spans_of, text_of
from okd_jax.data.format import make_render
from okd_jax.data.sandbox import Sandbox, rendered
from okd_jax.errors import UserError


@pytest.fixture(autouse=True)
def _few_steps(monkeypatch):
  """Steps are slow where every call of the package is checked."""
  monkeypatch.setattr(sandbox, "STEPS", 20_000)
  monkeypatch.setattr(sandbox, "SECONDS", 60.0)


PLAIN = Record("instruction", "f:1", prompt="Add.", references=("3",))
_SET = "{% set n = namespace(s='ab', t=1) %}"
_LOOP = _SET + "{% for i in range(99) %}"
_A = "{% set a = 'a' * 1000000 %}"
HURTING = {
  # Loops and calls.
  "{% for i in range(10**12) %}x{% endfor %}": "Range too big",
  "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}": (
    "it takes more than 20,000 steps"
  ),
  "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}"
  "{{ f(99) }}": "steps",
  "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}": "RecursionError",
  "{% block a %}{{ self.a() }}{% endblock %}": "RecursionError",
  # Arithmetic.
  "{{ 1 / 0 }}": "ZeroDivisionError: division by zero",
  "{{ 'a' * 10**10 }}": "a text or a list would be 10,000,000,000 long",
  "{{ [1] * 10**9 }}": "1,000,000,000 long",
  "{{ 9 ** (9 ** 9) }}": "a number would have 1,",
  # Doubling.
  _LOOP + "{% set n.s = n.s ~ n.s %}{% endfor %}": "a text would be 8,388,608 long",
  _LOOP + "{% set n.s = n.s + n.s %}{% endfor %}": "8,388,608 long",
  _LOOP + "{% set x %}{{ n.s }}{{ n.s }}{% endset %}{% set n.s = x %}{% endfor %}": (
    "8,388,608 long"
  ),
  _LOOP + "{% set n.s = [n.s, n.s] %}{% endfor %}{{ n.s }}": "steps",
  _LOOP + "{% set n.s = [n.s, n.s] %}{% endfor %}{{ n.s|tojson }}": "steps",
  _LOOP + "{% set n.s, n.t = [n.s, n.s], [n.t, n.t] %}{% endfor %}{{ n.s == n.t }}": "",
  # Filters and methods.
  "{{ 'a'|center(10**10) }}": "10,000,000,000 long",
  "{{ 'a'.ljust(10**10) }}": "10,000,000,000 long",
  "{{ '%10000000000d' % 1 }}": "too wide",
  "{{ '{:>10000000000}'.format(1) }}": "too wide",
  "{{ '{:>{n}}'.format(1, n=10**10) }}": "too wide",
  _A + "{{ a.replace('a', a) }}": "1,000,001,000,000 long",
  _A + "{{ a|replace('', a) }}": "long",
  _A + "{{ range(1000)|map('string')|join(a) }}": "1,000,000,000 long",
  _A + "{{ a|wordwrap(1, true, a) }}": "long",
  "{{ ('\n' * 100000)|indent(100000) }}": "long",
  "{{ [1]|tojson(indent=99) }}": "tojson indents by more than 16",
  "{{ ([[1] * 1000] * 1000)|sum(start=[]) }}": "steps",
  "{{ (5).to_bytes(10**10, 'big') }}": "unsafe",
  "{{ 'a'.encode().ljust(10**10) }}": "unsafe",
  # What is kept.
  _A + _SET + "{% for i in range(9999) %}{% set n.s = [n.s, a[1:]] %}{% endfor %}": (
    "it makes more than 512 MB"
  ),
  # The text of the template.
  "{{ " + "(" * 9999 + "1" + ")" * 9999 + " }}": "RecursionError",
  "{% if 1 %}" * 200 + "{% endif %}" * 200: "IndentationError",
  "{{ " + "9" * 5000 + " }}": "ValueError",
  "a" * 300_000 + "{{ 1 }}": "longer than 262,144 characters",
  "{% include 'x' %}": "no loader",
  "{{ lipsum(10**9) }}": "undefined",
}


@pytest.mark.parametrize(
  ("template", "reason"), HURTING.items(), ids=range(len(HURTING))
)
def test_a_template_that_would_hurt_is_refused(template, reason):
  with pytest.raises(UserError, match="^f:6: ") as caught:
    try:
      render = make_render("chat", chat_tokenizer(template))
      render(chats.TALK)
    except UserError as error:  # of the text: before there is a row
      assert "\n" not in str(error)
      raise UserError(f"f:6: {error}") from error
  assert reason in str(caught.value)


def test_limits_hold_in_other_threads_and_in_texts_of_ones_own():
  found = []

  def run():
    endless = "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}"
    with pytest.raises(UserError, match="^data.template: fails .it takes more than"):
      make_render(endless + "{% endfor %}{{ instruction }}", None)(PLAIN)
    found.append(True)

  thread = threading.Thread(target=run)
  thread.start()
  thread.join()
  assert found


def test_one_budget_does_not_last_for_two():
  env = Sandbox()
  template = env.template("{% for i in range(2000) %}{{ i }}{% endfor %}", "t")
  texts = {rendered(template, {}, "t") for _ in range(5)}  # 6,000 steps each
  assert len(texts) == 1


TOOLS = CALLING["tools"]
USUAL = {
  name: getattr(chats, name)
  for name in ("CHATML", "LLAMA3", "QWEN", "R1", "GEMMA", "MARKED", "END_UNMARKED")
} | {
  "filters": "{{ messages|map(attribute='role')|join(', ') }}{{ messages|length }}"
  "{{ messages[1:]|tojson(indent=2) }}{{ 'a b'|title }}{{ messages[0]|dictsort }}"
  "{{ messages|selectattr('role', 'eq', 'user')|list|length }}{{ '%d-%s' % (1, 'a') }}"
  "{{ 'é'|tojson }}{{ messages|groupby('role')|list|length }}{{ 'a'.join(['b', 'c']) }}"
  "{{ '{} {a}'.format(1, a=2) }}{{ ['b', 'a']|sort }}{{ 'ab'|replace('a', 'c') }}",
  "control": "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}"
  "{{ loop.index0 ~ loop.length ~ loop.last }}{% if loop.index == 3 %}{% break %}"
  "{% endif %}\n    {% endfor %}\n{{ bos_token is defined }}{{ eos_token }}"
  "{{ dict(a=1) }}",
  "reasoning": "{% for m in messages %}{{ m.thinking }}{{ m.reasoning_content }}"
  "{% endfor %}{% set n = namespace(a=1) %}{% set n.a = n.a + 1 %}{{ n.a }}",
  "recursive": "{% for x in [1, [2, [3]]] recursive %}{% if x is iterable %}"
  "{{ loop(x) }}{% else %}{{ x }}{% endif %}{% endfor %}{{ cycler('a', 'b').next() }}"
  "{% macro f(x) %}{{ caller() }}{{ x }}{% endmacro %}{% call f(1) %}2{% endcall %}"
  "{% filter upper %}a{% endfilter %}{{ messages[-1].content[:2] }}{{ none is none }}",
}


@pytest.mark.parametrize("template", USUAL.values(), ids=USUAL)
@pytest.mark.parametrize("prompt", [True, False])
def test_usual_templates_write_what_transformers_writes(template, prompt):
  tokenizer = chat_tokenizer(template)
  messages = [
    {k: v for k, v in m.items() if v is not None} for m in CALLING["messages"]
  ]
  messages[1] |= {"content": "Hm", "reasoning": "let me see"}
  theirs = tokenizer.apply_chat_template(
    messages, tools=TOOLS, tokenize=False, add_generation_prompt=prompt
  )
  assert text_of(tokenizer, messages, "t", tools=TOOLS, prompt=prompt) == theirs


@pytest.mark.parametrize("template", [chats.MARKED, chats.END_UNMARKED])
def test_what_the_model_says_is_where_transformers_finds_it(template):
  tokenizer = chat_tokenizer(template)
  messages = [{"role": r, "content": r[0]} for r in ("user", "assistant") * 2]
  theirs = tokenizer.apply_chat_template(
    messages, return_dict=True, return_assistant_tokens_mask=True
  )
  text, spans = spans_of(tokenizer, messages, "t", None)
  said = [text[start:end] for start, end in spans]
  assert len(said) == 2 and all(one.startswith("a") for one in said)
  shown = [i for i, on in enumerate(theirs["assistant_masks"]) if on]
  whole = tokenizer.decode([theirs["input_ids"][i] for i in shown])
  assert whole == "".join(said)


def test_a_last_message_goes_on():
  tokenizer = chat_tokenizer()
  messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b "}]
  theirs = tokenizer.apply_chat_template(
    messages, tokenize=False, continue_final_message=True
  )
  assert text_of(tokenizer, messages, "t", goes_on=True) == theirs
  with pytest.raises(UserError, match="^t .it leaves out the last message"):
    text_of(chat_tokenizer("nothing"), messages, "t", goes_on=True)
