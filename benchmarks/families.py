"""What every family of models can do here, and how far it is from transformers.

    python benchmarks/families.py --output=docs/models.md

Needs torch (pip install -e '.[test,parity]'). Random models of odd sizes, those of
tests/families.py, every option of their family on; the largest difference of any logit
over 200 tokens and both paddings, greedy text of 40 tokens, LoRA as PEFT computes it.
"""

import argparse
import datetime
import os
import platform
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import families  # noqa: E402

from okd_jax import models  # noqa: E402
from okd_jax.models import Decoder  # noqa: E402
from okd_jax.models.adapters import Lora  # noqa: E402
from okd_jax.models.formats.families import FAMILIES  # noqa: E402
from okd_jax.text.rollout import Sampling, generate  # noqa: E402
from okd_jax.text.source import decoder_source  # noqa: E402

KNOWN = {
  "gemma": "Gemma 1",
  "gemma2": "Gemma 2",
  "gemma3_text": "Gemma 3, the text part of larger ones, too",
  "gpt2": "GPT-2, DistilGPT-2",
  "granite": "Granite 3",
  "llama": "LLaMA 1 to 3, TinyLlama, SmolLM 1 and 2, Yi, DeepSeek-R1-Distill-Llama",
  "ministral": "Ministral 8B",
  "mistral": "Mistral 7B",
  "olmo2": "OLMo 2",
  "olmo3": "OLMo 3",
  "opt": "OPT, 350M too",
  "phi3": "Phi-3, Phi-3.5-mini, Phi-4, Phi-4-mini",
  "qwen2": "Qwen 2 and 2.5, QwQ, DeepSeek-R1-Distill-Qwen",
  "qwen3": "Qwen 3, dense",
  "qwen3_moe": "Qwen 3, mixtures of experts",
  "smollm3": "SmolLM 3",
}


def main() -> None:
  """Writes the table."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--output", default="", help="a Markdown file; default: print")
  parser.add_argument("names", nargs="*", help="of tests/families.py; default: all")
  args = parser.parse_args()
  names = args.names or sorted(families.CONFIGS)
  rows = [row(name) for name in names]
  text = page(rows)
  if args.output:
    Path(args.output).write_text(text)
  print(text)


def row(name: str) -> dict[str, str]:
  """Everything about one configuration."""
  print(f"{name} …", file=sys.stderr, flush=True)
  config = families.CONFIGS[name]
  with tempfile.TemporaryDirectory() as folder:
    place = Path(folder) / "model"
    tree, _ = families.save(name, place)
    theirs, ours = families.torch_model(place), models.load(place)
    found = {
      "configuration": name,
      "model_type": config.family,
      "import": difference(ours, theirs),
      "export": back_again(theirs, ours, Path(folder)),
      "generate": greedy(theirs, ours),
      "adapters": adapted(theirs, ours, Path(folder)),
      "5 steps": steps(ours),
    }
  golden = np.load(families.GOLDEN)[name]
  tokens = families.tokens(config, 1)
  logits = np.asarray(jax.jit(ours.logits)(ours.params, tokens))[0, 7::16]
  found["golden"] = f"{np.abs(logits - golden).max():.0e}"
  return found


def difference(ours: models.Model, theirs) -> str:
  """The largest over rows without padding, padded left and padded right."""
  tokens = families.tokens(ours.config, 3)
  segments = np.ones_like(tokens)
  segments[1, :9] = segments[2, -13:] = 0
  got = np.asarray(jax.jit(ours.logits)(ours.params, tokens, segments))
  want = families.torch_logits(theirs, tokens, segments)
  return f"{np.abs(got - want)[segments > 0].max():.0e}"


def back_again(theirs, ours: models.Model, folder: Path) -> str:
  """Their folder read here, written, and read there: 'same' if no logit moved."""
  theirs.save_pretrained(folder / "theirs")
  model = models.load(folder / "theirs")
  models.save(folder / "ours", model.params, model.config)
  tokens = families.tokens(model.config, 2)
  pair = [
    families.torch_logits(families.torch_model(folder / name), tokens)
    for name in ("theirs", "ours")
  ]
  return "same" if np.array_equal(*pair) else f"{np.abs(pair[0] - pair[1]).max():.0e}"


def greedy(theirs, ours: models.Model) -> str:
  """Two prompts, left-padded in a batch: 'same' if all 40 tokens are."""
  import torch

  rng = np.random.default_rng(5)
  prompts = [rng.integers(3, ours.config.vocab_size, n).tolist() for n in (20, 11)]
  padded = torch.tensor([[0] * (20 - len(p)) + p for p in prompts])
  mask = torch.tensor([[0] * (20 - len(p)) + [1] * len(p) for p in prompts])
  with torch.no_grad():
    want = theirs.generate(
      padded,
      attention_mask=mask,
      max_new_tokens=40,
      do_sample=False,
      eos_token_id=[-1],
      pad_token_id=0,
    )[:, 20:].tolist()
  source = decoder_source(Decoder(ours.config))
  got = generate(
    source,
    {"params": ours.params},
    prompts,
    jax.random.key(0),
    max_new_tokens=40,
    sampling=Sampling(temperature=0.0),
  )
  got = [np.asarray(each.tokens).tolist() for each in got]
  pairs = [
    pair for g, w in zip(got, want, strict=True) for pair in zip(g, w, strict=True)
  ]
  equal = sum(a == b for a, b in pairs)
  return "same" if equal == 80 else f"{equal} of 80"


def adapted(theirs, ours: models.Model, folder: Path) -> str:
  """LoRA on all that can hold it, opened by PEFT on their model."""
  import peft

  config = ours.config
  mlp = () if config.experts else ("up", "down")
  lora = Lora(rank=3, scale=0.5, targets=("query", "key", "value", "out", *mlp))
  decoder, tokens = Decoder(config, lora), families.tokens(config, 1)
  shapes = jax.eval_shape(decoder.init, jax.random.key(0), tokens)["adapter"]
  rng = np.random.default_rng(1)
  tree = jax.tree.map(lambda s: 0.2 * rng.standard_normal(s.shape, np.float32), shapes)
  models.save_adapter(folder / "adapter", tree, lora, config, str(folder / "model"))
  reference = peft.PeftModel.from_pretrained(theirs, folder / "adapter").eval()
  want = families.torch_logits(reference, tokens)
  variables = {"params": ours.params, "adapter": tree}
  hidden, _ = jax.jit(decoder.apply)(variables, tokens)
  got = np.asarray(models.logits(hidden, ours.params, config))
  return f"{np.abs(got - want).max():.0e}"


def steps(ours: models.Model) -> str:
  """The loss before and after five steps of Adam on 48 tokens."""
  import optax

  tokens = families.tokens(ours.config, 2, 24)
  optimizer = optax.adam(3e-3)

  def loss(params):
    logits = ours.logits(params, tokens[:, :-1])
    labels = jnp.asarray(tokens[:, 1:])
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

  @jax.jit
  def step(params, state):
    value, grads = jax.value_and_grad(loss)(params)
    updates, state = optimizer.update(grads, state)
    return optax.apply_updates(params, updates), state, value

  params, state, values = ours.params, optimizer.init(ours.params), []
  for _ in range(5):
    params, state, value = step(params, state)
    values.append(float(value))
  return f"{values[0]:.2f} → {float(loss(params)):.2f}"


def machine() -> str:
  """When this was made, and by what."""
  versions = ", ".join(
    f"{name} {metadata.version(name)}" for name in ("jax", "transformers", "torch")
  )
  python = platform.python_version()
  return (
    f"{datetime.date.today()}, {os.cpu_count()} CPU cores, Python {python}, {versions}."
  )


def page(rows: list[dict[str, str]]) -> str:
  """The Markdown of docs/models.md."""
  lines = [
    "# Models",
    "",
    "What can be a teacher or a student: whatever says one of these as `model_type` in",
    "its `config.json`, in safetensors, of one file or several. Another one:",
    "[add_a_family.md](add_a_family.md).",
    "",
    "| `model_type` | such as |",
    "|---|---|",
    *(f"| `{name}` | {KNOWN[name]} |" for name in sorted(FAMILIES)),
    "",
    "GGUF files are read of the architectures `llama` and `gpt2`.",
    "",
    "## Beside transformers",
    "",
    "By `python benchmarks/families.py --output=docs/models.md` on random models of",
    "odd sizes with every option on. *import*: the largest difference of any logit",
    "over 200 tokens (or the model's limit), without padding, padded left and right.",
    "*export*: their folder read and written here has the same logits there.",
    "*generate*: 40 greedy tokens of two prompts padded in a batch. *adapters*: LoRA",
    "in all layers, opened by PEFT. *5 steps*: the loss before and after. *golden*:",
    "from the logits that the tests keep.",
    "",
    machine(),
    "",
    "| " + " | ".join(rows[0]) + " |",
    "|" + "---|" * len(rows[0]),
    *("| " + " | ".join(row.values()) + " |" for row in rows),
    "",
  ]
  return "\n".join(lines)


if __name__ == "__main__":
  main()
