"""Few data, many epochs: where a teacher that learns with its student should help.

    python -m configs.studies.scarce                 # once: the data, seconds
    python -m okd_jax.study --config=configs/studies/scarce.py --workdir=runs/scarce

The teacher is stories260K, a LLaMA of 260K parameters (karpathy/llama2.c), fine-tuned
on 579 windows of 64 tokens of Shakespeare; the student begins with two of its five
layers, fine-tuned on the same windows. A window's first quarter is the prompt. The
model and the text are in ../shared beside the checkout; others: --model and --text of
the first command, --config.stages.teacher.student.path of the second.

This teacher has seen its few windows too often: its held-out loss was least after 50
steps at a lower rate. scarce.py:early stops it there, and is the fair control: what
OKD gains where the frozen teacher could hardly be better. RESULTS.md has both.
"""

import json
from pathlib import Path

import transformers

from configs import default
from okd_jax.runtime import cli
from okd_jax.runtime.files import write_text

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared"
DATA = ROOT / "runs" / "shakespeare"
LENGTH, PROMPT = 64, 16  # tokens of a window and of its prompt, or about so many
WINDOWS = {"scarce": 579, "plenty": 5790}
HELD_OUT = 256  # windows, the last of the text

ARMS = {
  "sft": {"method.name": "sft"},
  "kd": {"method.name": "kd"},
  "kd, gold": {"method.name": "kd", "method.gold_weight": 1.0},
  "kd, alpha-beta": {"method.name": "kd", "method.divergence": "alpha_beta"},
  "rkd": {"method.name": "rkd"},
  "srkl, gold": {"method.name": "srkl", "method.gold_weight": 1.0},
  "jsd": {"method.name": "jsd"},
  "akl": {"method.name": "akl"},
  "imitkd": {"method.name": "imitkd"},
  "gkd": {"method.name": "gkd"},
  "gkd, gold": {"method.name": "gkd", "method.gold_weight": 1.0},
  "minillm": {"method.name": "minillm"},
  "distillm": {"method.name": "distillm"},
  "skd": {"method.name": "skd"},
  "okd": {"method.name": "okd"},
  "okd, mode-seeking": {
    "method.name": "okd",
    "method.divergence": "reverse_kl",
    "method.teacher_divergence": "reverse_kl",
  },
  "okd, alpha-beta": {"method.name": "okd", "method.divergence": "alpha_beta"},
}


# Of the teacher's fine-tuning: steps and learning rate. 'early' is where its held-out
# loss is least (3.24 nats; 3.75 of the other), found with seed 0.
TEACHERS = {"late": (200, 3e-3), "early": (50, 1e-3)}

# What is measured of each run, beside its loss and its distance from the teacher.
MEASURES = {
  "sets": {"windows": str(DATA / "eval.jsonl")},
  "protocol": {"max_new_tokens": LENGTH - PROMPT, "batch_size": 64},
}


def get_config(teacher: str = "late"):
  if teacher not in TEACHERS:
    raise ValueError(f"scarce.py:{teacher}: the variants are {', '.join(TEACHERS)}")
  steps, lr = TEACHERS[teacher]
  config = default.get_config()
  config.teacher.path = "stage:teacher"
  config.student.path = "stage:start"
  config.data.train = str(DATA / "scarce.jsonl")
  config.data.eval = str(DATA / "eval.jsonl")
  config.data.max_length = LENGTH
  config.data.max_prompt_length = 2 * PROMPT
  config.train.batch_size = 16
  config.train.steps = 600
  config.train.log_every = 20
  config.optim.lr = 3e-3
  config.optim.warmup_steps = 20
  config.checkpoint.every = 150
  config.checkpoint.keep = 1
  config.eval.every = 100
  config.eval.batch_size = 64
  config.eval.generate = False
  config.stages.teacher = {
    "method": {"name": "sft"},
    "student": {"path": str(SHARED / "models" / "stories260K")},
    "train": {"steps": steps},
    "optim": {"lr": lr},
    "eval": {"every": 0},
  }
  config.stages.start = {
    "method": {"name": "sft"},
    "teacher": {"path": "stage:teacher"},
    "student": {"layers": 2},
    "train": {"steps": 150},
    "eval": {"every": 0},
  }
  return config


def get_study():
  return {"arms": ARMS, "seeds": 5} | MEASURES


def main(arguments: list[str]) -> None:
  """Cuts a text into windows: scarce, plenty, judge and eval, each a .jsonl."""
  parser = cli.Parser(prog="python -m configs.studies.scarce", description=__doc__)
  add = parser.add_argument
  add("--model", default=str(SHARED / "models" / "stories260K"), help="whose tokens")
  text = SHARED / "data" / "text" / "tinyshakespeare.txt"
  add("--text", default=str(text), help="what is cut")
  add("--output", default=str(DATA), help="folder of the data")
  args = parser.parse_args(arguments)
  rows = windows(Path(args.text).read_text(encoding="utf8"), args.model)
  parts = {name: rows[:count] for name, count in WINDOWS.items()}
  parts["eval"] = rows[-HELD_OUT:]
  parts["judge"] = rows[WINDOWS["scarce"] : WINDOWS["plenty"]]
  for name, part in parts.items():
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
    write_text(Path(args.output) / f"{name}.jsonl", lines)
    print(f"{Path(args.output) / name}.jsonl: {len(part)} windows")


def windows(text: str, model: str) -> list[dict[str, str]]:
  """The text as prompts and completions, LENGTH tokens of the model's together.

  A completion goes on into the next window: training cuts it at LENGTH, so that none
  ends a text.
  """
  tokenizer = transformers.AutoTokenizer.from_pretrained(
    model, local_files_only=True, trust_remote_code=False
  )
  tokenizer.model_max_length = len(text)  # no warning: nothing runs on the whole
  encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
  starts = [start for start, _ in encoded["offset_mapping"]]
  return [
    {
      "prompt": text[starts[i] : starts[i + PROMPT]],
      "completion": text[starts[i + PROMPT] : starts[i + 2 * LENGTH]],
    }
    for i in range(0, len(starts) - 2 * LENGTH, LENGTH)
  ]


if __name__ == "__main__":
  cli.run(main)
