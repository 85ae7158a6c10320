"""One trainer of `peer_trl.py`, in a process of its own: its memory is its own, too.

    echo 3 | python benchmarks/contender.py --name=kd --folder=DIR

DIR holds 'teacher' and 'student', Hugging Face folders, and tokens.npy [rows, length].
Writes one line of JSON when all is loaded and then, for each line with a number on its
standard input, makes so many training steps and writes another. Loads nothing but the
library that it measures: torch and TRL for 'trl', else this package.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

TRL = "trl"
LEARNING_RATE = 1e-4  # constant; both decay weights by .01 and clip gradients at norm 1
RANK = 8  # of okd's LoRA, which is on the queries and values of all layers


def main() -> None:
  """Serves steps until its standard input ends."""
  parser = argparse.ArgumentParser()
  parser.add_argument("--name", required=True)
  parser.add_argument("--folder", required=True, type=Path)
  args = parser.parse_args()
  # Whatever a library prints must not come between the answers.
  answers = os.fdopen(os.dup(1), "w", buffering=1)
  os.dup2(2, 1)
  # The last token is predicted only.
  tokens = np.load(args.folder / "tokens.npy")
  make = _trl if args.name == TRL else _okd_jax
  step = make(args.name, args.folder, tokens)
  print(json.dumps(memory()), file=answers)
  busy = time.process_time()
  for line in sys.stdin:
    idle = time.process_time() - busy
    times, losses = zip(*(_timed(step) for _ in range(int(line))), strict=True)
    answer = {"times": times, "losses": losses, "idle_cpu": idle} | memory()
    busy = time.process_time()
    print(json.dumps(answer), file=answers)


def memory() -> dict[str, float]:
  """MiB that this process has in memory now, and the most that it ever had.

  Not getrusage's ru_maxrss, which a child inherits from whoever started it.
  """
  lines = Path("/proc/self/status").read_text().splitlines()
  fields = dict(line.split(":", 1) for line in lines)
  kib = {"now": fields["VmRSS"], "peak": fields["VmHWM"]}
  return {name: int(text.split()[0]) / 1024 for name, text in kib.items()}


def _timed(step: Callable[[], float]) -> tuple[float, float]:
  start = time.perf_counter()
  loss = step()
  return time.perf_counter() - start, loss


def _trl(name: str, folder: Path, tokens: np.ndarray) -> Callable[[], float]:
  """What transformers' training loop does in one step, with TRL's own trainer."""
  import torch

  trainer = _trainer(folder, tokens)
  trainer.create_optimizer()
  model, optimizer = trainer.model, trainer.optimizer
  (batch,) = trainer.get_train_dataloader()
  model.train()
  trainer.current_gradient_accumulation_steps = 1  # else train() sets it

  def step() -> float:
    # With lmbda = 0 it leaves the batch as it is.
    loss = trainer.training_step(model, batch)
    norm = trainer.args.max_grad_norm
    trainer.accelerator.clip_grad_norm_(model.parameters(), norm)
    optimizer.step()
    model.zero_grad()
    return loss.item()

  assert all(p.dtype == torch.float32 for p in model.parameters())
  return step


def _trainer(folder: Path, tokens: np.ndarray):
  """A GKDTrainer on these rows: teacher and student are in float32, on the CPU."""
  import torch
  from datasets import Dataset
  from transformers import AutoModelForCausalLM
  from trl.experimental.gkd import GKDConfig, GKDTrainer

  student, teacher = (
    AutoModelForCausalLM.from_pretrained(folder / part, dtype=torch.float32)
    for part in ("student", "teacher")
  )
  # Its collator wants a prompt: the first token, which nobody predicts.
  seen = [0] + [1] * (tokens.shape[1] - 1)
  rows = [
    {"prompt": "", "input_ids": row, "completion_mask": seen} for row in tokens.tolist()
  ]
  config = GKDConfig(
    output_dir=str(folder / "trl"),
    lmbda=0.0,  # the data's rows alone, none that the student writes
    beta=0.0,  # TRL's name for KL(teacher || student)
    per_device_train_batch_size=len(rows),
    learning_rate=LEARNING_RATE,
    weight_decay=0.01,
    max_grad_norm=1.0,
    max_length=tokens.shape[1],
    use_cpu=True,
    bf16=False,
    gradient_checkpointing=False,  # TRL's default recomputes: slower, and less memory
    report_to=[],
  )
  return GKDTrainer(
    student,
    teacher,
    config,
    train_dataset=Dataset.from_list(rows),
    processing_class=_tokenizer(),
  )


def _tokenizer():
  """Never asked for a token, but no trainer starts without one that can pad."""
  from tokenizers import Tokenizer, models
  from transformers import PreTrainedTokenizerFast

  empty = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
  return PreTrainedTokenizerFast(
    tokenizer_object=empty, pad_token="<pad>", eos_token="<eos>"
  )


def _okd_jax(name: str, folder: Path, tokens: np.ndarray) -> Callable[[], float]:
  """The step of this package's training loop, as a configuration makes it."""
  import jax
  import jax.numpy as jnp

  from okd_jax.data.batch import Batch
  from okd_jax.errors import UserError
  from okd_jax.run.step import compile_step

  run = _run(name, folder, tokens.shape)
  plan, text = run.plan, run.method.sequences
  if run.settings.teacher.trunk or text != type(text)():
    raise UserError("only what trains on gold rows as they are can be compared here")
  batch = Batch(
    tokens=jnp.asarray(tokens[:, :-1], jnp.int32),
    labels=jnp.asarray(tokens[:, 1:], jnp.int32),
    mask=jnp.ones(tokens[:, 1:].shape, bool),
    segment_ids=jnp.ones(tokens[:, 1:].shape, jnp.int32),
  )
  with jax.set_mesh(run.mesh):
    state = run.init()
    program = compile_step(
      run.method, plan.models, plan.optimizers, 1, plan.steps, plan.abstract, run.mesh
    )

  def step() -> float:
    nonlocal state
    with jax.set_mesh(run.mesh):
      state, values = program(state, run.cast.frozen, batch)
      jax.block_until_ready((state, values))
    # What TRL's loss is; okd's own has the module's part besides.
    return float(values["divergence"])

  return step


def _run(name: str, folder: Path, shape: tuple[int, int]):
  """A run of the named method; the text that it reads is not what is trained on."""
  from command import vary

  from configs import default
  from okd_jax.run.build import build
  from okd_jax.runtime.workdir import Workdir

  text = folder / "unused.txt"
  text.write_text("unused " * shape[1])  # in bytes it is several rows
  config = default.get_config()
  config.teacher.path = str(folder / "teacher")
  config.student.path = str(folder / "student")
  config.data.train, config.data.holdout = str(text), 1
  config.data.tokenizer = "bytes"
  config.train.batch_size, config.data.max_length = shape[0], shape[1] - 1
  config.train.steps, config.adapter.rank = 10**6, RANK
  config.optim.lr, config.optim.schedule = LEARNING_RATE, "constant"
  return build(vary(config, name), Workdir(folder / name))


if __name__ == "__main__":
  main()
