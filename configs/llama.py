"""The paper's LLaMA-2 runs: 7B or 13B teaches TinyLlama 1.1B on Alpaca.

    python -m okd_jax.main --config=configs/llama.py:7b --workdir=runs/llama-7b

arXiv 2409.12512, Table III: average ROUGE-L 25.2 (7B) and 25.5 (13B); SFT alone 18.8.
Rates as in METHODS after ATKD (arXiv 2402.11890): above 1B parameters lr 1e-5 (of
{5e-5, 1e-5, 5e-6}), batch 8, 3 epochs, linear schedule with 3% warm-up, no decay.
Weights and optimiser state are split over all devices (mesh.fsdp).
Time and result: not measured.
"""

from configs import default

TEACHERS = {"7b": "meta-llama/Llama-2-7b-hf", "13b": "meta-llama/Llama-2-13b-hf"}
STUDENT = "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T"


def get_config(variant: str = "7b"):
  if variant not in TEACHERS:
    raise ValueError(f"llama.py:{variant}: the variants are {', '.join(TEACHERS)}")
  config = default.get_config()
  config.teacher.path = "stage:teacher"
  config.student.path = "stage:start"
  config.method.teacher_kl_weight = 0.5
  config.data.train = "tatsu-lab/alpaca"
  config.data.template = "alpaca"
  config.data.holdout = 500
  config.data.max_length = 2048
  config.data.max_prompt_length = 1024
  config.train.epochs = 3.0
  config.train.batch_size = 8
  config.train.dtype = "bfloat16"
  config.train.remat = True
  config.optim.lr = 1e-5
  config.optim.end_lr = 0.0
  config.optim.schedule = "linear"
  config.optim.warmup_steps = 585
  config.optim.weight_decay = 0.0
  config.eval.every = 1000
  config.eval.generate_limit = 256
  config.eval.max_new_tokens = 256
  config.eval.best = "rougeL"
  config.mesh.data = 1
  config.mesh.fsdp = -1

  stage = {
    "method": {"name": "sft"},
    "train": {"steps": 0},
    "eval": {"best": "loss", "generate": False},
  }
  config.stages.teacher = stage | {"student": {"path": TEACHERS[variant]}}
  config.stages.start = stage | {"student": {"path": STUDENT}}
  return config
