"""Rows with a hint for the teacher alone, and batches of a run on them."""

import json

from okd_jax.data import train_loader

LENGTH, TEACHER = 48, 64
HINTS = {
  "data.max_length": LENGTH,
  "data.max_prompt_length": 24,
  "data.max_teacher_length": TEACHER,
  "data.overlong_prompt": "truncate",
  "train.steps": 3,
}


def data(path, count=40, hint="The answer is {} and nothing else. "):
  lines = [
    {
      "prompt": f"{i} + {i} = ",
      "completion": str(2 * i),
      "teacher_prompt": f"{hint.format(2 * i)}{i} + {i} = ",
    }
    for i in range(count)
  ]
  if not hint:
    lines = [{k: v for k, v in line.items() if "teacher" not in k} for line in lines]
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  return str(path)


def batches(run, count=1):
  loader = train_loader(
    run.data.train,
    batch_size=8,
    length=LENGTH,
    pad_id=0,
    seed=0,
    packs=run.data.packs,
    teacher_length=run.data.teacher_length,
  )
  return [next(loader) for _ in range(count)]
