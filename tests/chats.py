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


# Templates in the manner of families, as small as what they are tested for.
LLAMA3 = (
  "{{ '<|bos|>' }}{% if tools %}{{ '<|im_start|>system\n' + tools|tojson }}"
  "{{ '<|im_end|>' }}{% endif %}"
  "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n\n' }}"
  "{% if m.tool_calls %}{% set f = m.tool_calls[0].function %}"
  "{{ {'name': f.name, 'parameters': f.arguments}|tojson }}"
  "{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}"
)
QWEN = (
  "{% if tools %}{{ '<|im_start|>system\n# Tools\n' + tools|tojson + '<|im_end|>\n' }}"
  "{% endif %}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
  "{% if m.reasoning_content and loop.last %}"
  "{{ '<think>\n' + m.reasoning_content + '\n</think>\n\n' }}{% endif %}"
  "{{ m.content or '' }}{% for c in m.tool_calls or [] %}"
  "{{ '<tool_call>' + c.function|tojson + '</tool_call>' }}{% endfor %}"
  "{{ '<|im_end|>\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
R1 = (  # opens the thought in its prompt, and leaves thoughts out of what was said
  "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}"
  "{% elif m.role == 'user' %}{{ '<|user|>' + m.content }}"
  "{% elif m.role == 'tool' %}{{ '<|tool|>' + m.content }}"
  "{% elif m.tool_calls %}{{ '<|bot|>' }}{% for c in m.tool_calls %}"
  "{{ '<|call|>' + c.function|tojson }}{% endfor %}{{ '<|im_end|>' }}"
  "{% else %}{{ '<|bot|>' + m.content.split('</think>')[-1] + '<|im_end|>' }}"
  "{% endif %}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|bot|><think>\n' }}{% endif %}"
)
GEMMA = (  # calls the assistant model, and knows nothing but text
  "{% for m in messages %}{{ '<|im_start|>' + ('model' if m.role == 'assistant' else "
  "m.role) + '\n' + (m.content or '')|trim + '<|im_end|>\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif %}"
)
# As trl writes templates for training: what the model says is marked, its end with it
# or not.
MARKED = (
  "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
  "{% if m.role == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}"
  "{% endgeneration %}{{ '\n' }}{% else %}{{ m['content'] + '<|im_end|>\n' }}"
  "{% endif %}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
END_UNMARKED = MARKED.replace(
  " + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}",
  " }}{% endgeneration %}{{ '<|im_end|>\n' }}",
)
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
CALL = {"function": {"name": "add", "arguments": {"a": 1}}}
CALLING = {
  "tools": TOOLS,
  "messages": [
    {"role": "user", "content": "1 + 1?", "name": None},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "2", "name": "add", "tool_call_id": "7"},
    {"role": "assistant", "content": "It is 2.", "reasoning_content": None},
  ],
}
