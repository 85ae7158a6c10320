"""Conversations and a tokenizer that can write them."""

from okd_jax.data import Record, make_tokenizer

CHATML = (
  "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
  "{{ '<|im_end|>\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def talk(*turns):
  messages = tuple({"role": role, "content": content} for role, content in turns)
  return Record("messages", "f:6", messages=messages, references=("hello",))


TALK = talk(("user", "hi"))
SYSTEM_TALK = talk(("system", "Be kind."), ("user", "hi"))
LONG_TALK = talk(("user", "hi"), ("assistant", "yes?"), ("user", "who?"))


def chat_tokenizer(template=CHATML):
  tokenizer = make_tokenizer("bytes", [])
  # Known to the vocabulary only, as in the folders of many models.
  tokenizer.backend_tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
  tokenizer.chat_template = template
  return tokenizer
