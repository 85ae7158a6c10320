"""The decoder under lm-evaluation-harness, beside the harness's own backend `hf`."""

from pathlib import Path

import families
import pytest
import tokenizers
from alphabet import TURN, alphabet_model, alphabet_tokenizer

pytest.importorskip("lm_eval", reason="needs lm_eval: pip install -e '.[lm-eval]'")


from lm_eval import simple_evaluate  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402

from okd_jax import models  # noqa: E402
from okd_jax.data import Record, make_tokenizer  # noqa: E402
from okd_jax.errors import UserError  # noqa: E402
from okd_jax.evaluation import harness_tasks  # noqa: E402
from okd_jax.evaluation.harness import DecoderLM, _way  # noqa: E402
from okd_jax.text.rollout import Sampling  # noqa: E402

ROOT = Path(__file__).parents[2]
GSM8K = ROOT / "configs" / "lm_eval" / "gsm8k_local.yaml"
STORIES = ROOT.parent / "shared" / "models" / "stories260K"
TEXT = (
  "Once upon a time there was a little girl named Lily. She loved to play outside in "
  "the park. One day, she saw a big red ball. The ball was under a tree, and a dog sat "
  "beside it.\n\n“May I?” said Lily. The dog said: no, it is mine; find another ball!"
)
PAIRS = [
  ("Once upon a", " time"),
  ("Once upon a ", "time there was"),  # its space belongs to the continuation
  ("Once upon a", " park"),
  ("Once upon a", " ball."),
  ("", TEXT[:30]),
  ("   ", "One"),
  ("<|bos|>She", " loved"),  # gets no second BOS
  ("She", "d"),  # may be one token with what stands before it
  (3 * TEXT, " The dog said: no"),  # longer than the context
  ("The ball\n\n", "was under ünïcode 🙂"),
]
LENGTH = 64
TEXTS = [(TEXT,), ("One",), (9 * TEXT,), ("",), (TEXT[:70],)]  # several windows
CONTEXTS = [TEXT[:40], "The ball", 9 * TEXT]


def llama(folder):
  tokenizer = make_tokenizer("bpe:380", [Record("text", "here", text=TEXT)])
  tokenizer.add_special_tokens({"bos_token": "<|bos|>"})
  tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
    single="<|bos|> $A", special_tokens=[("<|bos|>", tokenizer.bos_token_id)]
  )
  return _random(folder, tokenizer, "llama", num_kv_heads=2)


def gpt2(folder):
  tokenizer = make_tokenizer("bpe:380", [Record("text", "here", text=TEXT)])
  tokenizer.bos_token = tokenizer.eos_token  # none is added
  return _random(folder, tokenizer, "gpt2")


def _random(folder, tokenizer, family, **changes):
  config = models.preset(
    family,
    vocab_size=len(tokenizer),
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    max_length=LENGTH,
    bos_id=tokenizer.bos_token_id,
    eos_ids=(tokenizer.eos_token_id,),
    pad_id=tokenizer.pad_token_id,
    **changes,
  )
  models.save(folder, families.params(config), config, tokenizer)
  return folder


def stories(folder):
  if not STORIES.is_dir():
    pytest.skip("needs the shared models beside the checkout")
  return STORIES


@pytest.fixture(scope="module", params=[llama, gpt2, stories], ids=lambda f: f.__name__)
def folder(request, tmp_path_factory):
  return request.param(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(scope="module")
def ours(folder):
  return DecoderLM(models.load(folder), batch_size=4, max_length=LENGTH)


@pytest.fixture(scope="module")
def torch():
  """With one thread: where others work, too, several wait for one another."""
  torch = pytest.importorskip("torch")
  threads = torch.get_num_threads()
  torch.set_num_threads(1)
  yield torch
  torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def theirs(folder, torch):
  return _backend(folder, max_length=LENGTH)


def _backend(folder, **kwargs):
  from lm_eval.models.huggingface import HFLM

  return HFLM(str(folder), device="cpu", dtype="float32", batch_size=1, **kwargs)


def ask(lm, method, *arguments):
  requests = [Instance(method, {}, each, i) for i, each in enumerate(arguments)]
  return getattr(lm, method)(requests, disable_tqdm=True)


def same(own, other):
  """Log-likelihoods to 1e-4 nats, or 1e-6 of themselves; equal flags."""
  for (value, greedy), (expected, flag) in zip(own, other, strict=True):
    assert value == pytest.approx(expected, rel=1e-6, abs=1e-4)
    assert greedy == flag


def settings(*until, length=24):
  return {"until": list(until), "max_gen_toks": length, "do_sample": False}


def test_loglikelihoods(ours, theirs):
  firsts = [TEXT[:n] for n in range(20, 60, 3)]
  words = ask(theirs, "generate_until", *((f, settings(length=1)) for f in firsts))
  pairs = [*PAIRS, *zip(firsts, words, strict=True)]
  # The backend `hf` takes neither an empty continuation nor, without BOS, an empty
  # context.
  split = {pair: theirs._encode_pair(*pair) for pair in pairs if pair[0]}
  pairs = [pair for pair in pairs if all(split.get(pair, [True]))]
  assert len(pairs) >= 9
  found = ask(ours, "loglikelihood", *pairs)
  same(found, ask(theirs, "loglikelihood", *pairs))
  assert {flag for _, flag in found} == {True, False}


def test_rolling_loglikelihoods(ours, theirs):
  found = ask(ours, "loglikelihood_rolling", *TEXTS)
  same_values(found, ask(theirs, "loglikelihood_rolling", *TEXTS))
  assert ours.tok_encode("") or found[3] == 0


def same_values(own, other):
  same([(value, None) for value in own], [(value, None) for value in other])


def test_answers(ours, theirs):
  [plain] = ask(theirs, "generate_until", (TEXT[:40], settings()))
  middle = len(plain) // 2
  requests = [
    *((text, settings("\n\n", "e")) for text in CONTEXTS),
    (TEXT[:40], settings(plain[-1], plain[middle : middle + 2], "never")),
    (TEXT[:40], settings() | {"until": plain[-3:], "temperature": 0.0}),
    (TEXT[:40], settings()),
  ]
  found = ask(ours, "generate_until", *requests)
  assert found == ask(theirs, "generate_until", *requests)
  assert found[-1] == plain != found[-2] and plain.startswith(found[-2])


def test_batches_change_nothing(tmp_path):
  model = models.load(llama(tmp_path / "model"))
  one, four = (DecoderLM(model, batch_size=size) for size in (1, 4))
  same(*(ask(lm, "loglikelihood", *PAIRS) for lm in (one, four)))
  requests = [(text, settings("e")) for text in CONTEXTS]
  texts = [ask(lm, "generate_until", *requests) for lm in (one, four)]
  assert texts[0] == texts[1]


def test_a_bos_that_is_asked_for(tmp_path, torch):
  folder = gpt2(tmp_path / "model")
  own = DecoderLM(models.load(folder), add_bos_token=True)
  other = _backend(folder, add_bos_token=True)
  assert (
    own.tok_encode("One") == other.tok_encode("One") != own.tok_encode("One", False)
  )
  same(ask(own, "loglikelihood", *PAIRS[:6]), ask(other, "loglikelihood", *PAIRS[:6]))


def test_a_whole_task(shared, torch, tmp_path, monkeypatch):
  """GSM8K from a file, by both: equal texts, equal scores."""
  monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path))
  file = [str(shared / "data" / "eval" / "gsm8k.jsonl")]
  options = harness_tasks.Options(
    limit=2, num_fewshot=1, gen_kwargs="max_gen_toks=16", log_samples=True, batch_size=2
  )
  tasks = harness_tasks.find_tasks([str(GSM8K)], data=file)
  own = harness_tasks.run(models.load(STORIES), tasks, options)
  manager, specs = harness_tasks.find_tasks([str(GSM8K)], data=file)
  other = simple_evaluate(
    model=_backend(STORIES),
    tasks=specs,
    task_manager=manager,
    limit=2,
    num_fewshot=1,
    gen_kwargs="max_gen_toks=16",
  )
  scores = [found["results"]["gsm8k_local"] for found in (own, other)]
  assert scores[0] == scores[1]
  said, expected = (
    [
      (each["arguments"][0][0], each["resps"])
      for each in found["samples"]["gsm8k_local"]
    ]
    for found in (own, other)
  )
  assert said == expected and any(text for _, [[text]] in said)


def test_a_context_of_spaces_alone_is_none(letters):
  """The backend `hf` fails here, where the tokenizer adds no BOS."""
  [blank, none] = ask(letters, "loglikelihood", ("  ", "One"), ("", "  One"))
  assert blank == none


def test_chats(folder, theirs):
  model = models.load(folder)
  template = (
    "{% for m in messages %}{% if m.role == 'system' %}"
    "{{ raise_exception('no system') }}{% endif %}[{{ m.role }}]{{ m.content }}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
  )
  chat = [
    {"role": role, "content": f"{role} says"}
    for role in ("system", "user", "assistant")
  ]
  own = DecoderLM(model)
  with pytest.raises(UserError, match="no chat template"):
    own.apply_chat_template(chat)
  own.tokenizer.chat_template = theirs.tokenizer.chat_template = template
  text = own.apply_chat_template(chat[:2])
  assert text == theirs.apply_chat_template(chat[:2]) == "[user]user says[assistant]"
  assert own.apply_chat_template(chat, False) == theirs.apply_chat_template(chat, False)
  assert own.chat_template(True) == theirs.chat_template(True) == template
  assert own.tokenizer_name == theirs.tokenizer_name
  own.tokenizer.chat_template = "{{ raise_exception('nothing at all') }}"
  with pytest.raises(UserError, match="template refuses a prompt .nothing at all"):
    own.apply_chat_template(chat)


# A model that goes on with the alphabet, with no torch beside it.


@pytest.fixture
def letters():
  params, config = alphabet_model()
  return DecoderLM(models.Model(config, params, alphabet_tokenizer()), batch_size=2)


def test_results_keep_the_order_of_requests_with_any_settings(letters):
  one, other = settings("z", "d"), settings("<|turn|>", "q", "", "p")
  requests = [("a", one), ("m", other), ("w", one), ("ab", one), ("t", settings())]
  found = ask(letters, "generate_until", *requests)
  assert found == ["bc", "no", "xy", "c", "uvwxyz"]


def test_a_stop_that_is_a_special_token():
  """It is no part of the text, but ends it."""
  params, config = alphabet_model(end=TURN)
  turns = DecoderLM(models.Model(config, params, alphabet_tokenizer()))
  found = ask(turns, "generate_until", ("t", settings("<|turn|>")), ("t", settings()))
  assert found == ["uvwxyz", "uvwxyzabcdefghijklmnopq"]


def test_draws(letters):
  """Of one request that comes several times each time another; one seed, one text."""
  hot = settings() | {"do_sample": True, "temperature": 50.0}
  texts = ask(letters, "generate_until", ("a", hot), ("a", hot), ("a", hot))
  assert len({*texts}) == 3
  assert ask(letters, "generate_until", ("a", hot), ("a", hot), ("a", hot)) == texts
  others = ask(letters, "generate_until", ("a", hot), ("a", hot | {"until": "never"}))
  assert others[0] == texts[0] and others[1] == texts[1]
  cold = hot | {"top_k": 1}
  assert ask(letters, "generate_until", ("t", cold)) == ["uvwxyz"]


def test_sampling_is_as_the_task_says_and_else_as_transformers_draws():
  drawn = {"do_sample": True, "temperature": 0.8, "top_p": 0.9}
  assert _way(drawn).sampling == Sampling(0.8, 50, 0.9)
  assert _way(drawn | {"top_k": 0}).sampling == Sampling(0.8, 0, 0.9)
  assert _way({"temperature": 0.5}).sampling == Sampling(0.5, 50, 1.0)
  assert _way({"do_sample": False, "top_p": 0.9}).sampling == Sampling(0.0)


@pytest.mark.parametrize(
  "given, message",
  [
    ({"num_beams": 4}, "not there: num_beams above 1"),
    ({"min_p": 0.1, "penalty": 2}, "not there: min_p, penalty"),
    ({"max_gen_toks": 0}, "max_gen_toks=0 must be at least 1"),
    ({"max_gen_toks": 200}, "200 new tokens are asked for, but .* only 200 in all"),
    ({"do_sample": True, "temperature": 1, "top_p": 2, "max_gen_toks": 9}, "top_p=2"),
  ],
)
def test_settings_that_cannot_be_met(letters, given, message):
  with pytest.raises(UserError, match=message):
    ask(letters, "generate_until", ("a", given))


def test_settings_that_change_nothing(letters):
  odd = {"num_beams": 1, "temperature": 0.7, "do_sample": False, "max_new_tokens": 24}
  assert ask(letters, "generate_until", ("t", odd)) == ["uvwxyz"]


def test_models_that_cannot_be_asked():
  params, config = alphabet_model()
  with pytest.raises(UserError, match="no tokenizer"):
    DecoderLM(models.Model(config, params))
  tokenizer = alphabet_tokenizer()
  with pytest.raises(UserError, match="--max_length=201, .* only 200"):
    DecoderLM(models.Model(config, params, tokenizer), max_length=201)
  tokenizer.add_tokens(["zz"])
  longer = DecoderLM(models.Model(config, params, tokenizer))
  with pytest.raises(UserError, match="token 260, but the model knows only 260"):
    ask(longer, "loglikelihood", ("a", "zz"))
  tokenizer.eos_token = None
  with pytest.raises(UserError, match="no EOS"):
    DecoderLM(models.Model(config, params, tokenizer))
