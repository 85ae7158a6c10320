"""A small real model and its own stories: methods compared in minutes on two cores.

    python -m configs.stories                        # once: the data, 31 s
    python -m okd_jax.main --config=configs/stories.py --workdir=runs/stories

The teacher is stories260K, a LLaMA of 260K parameters that tells stories for children
(karpathy/llama2.c), in ../shared/models beside the checkout; another place or model:
--config.teacher.path, and --model of the first command. That one lets the teacher tell
2200 stories of up to 192 tokens; a story's first sentence is the prompt, the rest the
response. Stories that begin alike are either all for training or all for evaluation.

Measured on 2026-11-22 on 2 CPU cores that others used, too (Python 3.11), after 200
steps, the start being 2 of the teacher's 5 layers; the teacher's own ROUGE-L is 22.6:

            KL to teacher   ROUGE-L   tokens/s    whole run
    start            5.01       0.5
    sft               .59      22.8      ~24000      1:21
    kd                .52      21.6      ~16000      1:30
    okd               .55      22.6       ~7500      3:11
"""

import dataclasses
import json
import re
import sys
import zlib
from pathlib import Path

from configs import default
from okd_jax.data import Record
from okd_jax.errors import UserError
from okd_jax.models import Decoder, load
from okd_jax.runtime import cli
from okd_jax.runtime.files import write_text
from okd_jax.text.answers_file import write_samples

ROOT = Path(__file__).resolve().parents[1]  # loaded by a relative path
TEACHER = ROOT.parent / "shared" / "models" / "stories260K"
DATA = ROOT / "runs" / "stories-data"

_LENGTH = 192  # tokens
_HELD_OUT = 12  # one first sentence in so many is for evaluation
_FIRST_SENTENCE = re.compile(r"\s*\S.*?[.!?][\"']?(?=\s+\S)", re.DOTALL)


def get_config():
  config = default.get_config()
  config.teacher.path = str(TEACHER)
  config.student.layers = 2
  config.data.train = str(DATA / "train.jsonl")
  config.data.eval = str(DATA / "eval.jsonl")
  config.data.max_length = _LENGTH
  config.data.max_prompt_length = 64
  config.train.batch_size = 32
  config.adapter.rows = 0.25
  config.train.steps = 200
  config.train.log_every = 20
  config.optim.lr = 5e-3
  config.optim.warmup_steps = 20
  config.checkpoint.every = 100
  config.eval.every = 100
  config.eval.limit = 128
  config.eval.generate_limit = 32
  config.eval.batch_size = 64
  config.eval.max_new_tokens = 64
  return config


def main(arguments: list[str]) -> None:
  """Writes stories.jsonl, and train.jsonl and eval.jsonl, which are made of it."""
  parser = cli.Parser(prog="python -m configs.stories", description=__doc__)
  add = parser.add_argument
  add("--model", default=str(TEACHER), help="who tells the stories")
  add("--output", default=str(DATA), help="folder of the data")
  add("--stories", type=int, default=2200, help="how many are told")
  add("--seed", type=int, default=0, help="of the draws")
  args = parser.parse_args(arguments)
  cli.use_compilation_cache()
  folder = Path(args.output)
  tell(args.model, folder / "stories.jsonl", args.stories, args.seed)
  for name, rows in split(folder / "stories.jsonl").items():
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_text(folder / f"{name}.jsonl", "".join(lines))
    print(f"{folder / name}.jsonl: {len(rows)} stories")


def tell(model: str, path: Path, count: int, seed: int) -> None:
  """Lets a model tell so many stories, each from nothing but the start of a text."""
  loaded = load(model)
  start = loaded.tokenizer and loaded.tokenizer.bos_token
  if not start:
    raise UserError(f"{model}: its tokenizer has no token that begins a text")
  # Such a model ends a text by beginning the next one.
  ends = {*loaded.config.eos_ids, loaded.tokenizer.bos_token_id}
  config = dataclasses.replace(loaded.config, eos_ids=tuple(sorted(ends)))
  records = [
    Record("completion", f"story {i + 1}", prompt=start, references=("unused",))
    for i in range(count)
  ]
  write_samples(
    Decoder(config),
    {"params": loaded.params},
    records,
    loaded.tokenizer,
    path,
    max_new_tokens=_LENGTH,
    seed=seed,
    batch_size=128,
  )


def split(path: Path) -> dict[str, list[dict]]:
  """The stories as rows for 'train' and 'eval', which share no first sentence.

  One that has no second sentence goes nowhere, which is said.
  """
  parts, short = {"train": [], "eval": []}, 0
  for line in path.read_bytes().splitlines():
    row = json.loads(line)
    story = row["completion"]
    first = _FIRST_SENTENCE.match(story)
    if first is None:
      short += 1
      continue
    row |= {"prompt": first[0], "completion": story[first.end() :]}
    held_out = zlib.crc32(first[0].encode()) % _HELD_OUT == 0
    parts["eval" if held_out else "train"].append(row)
  if short:
    print(f"{path}: left out {short} stories of one sentence", file=sys.stderr)
  return parts


if __name__ == "__main__":
  cli.run(main)
