"""The paper's GPT-2 runs: GPT-2 XL teaches GPT-2 base, medium or large on Dolly.

    python -m okd_jax.main --config=configs/gpt2.py:base --workdir=runs/gpt2-base

arXiv 2409.12512, Table II: average ROUGE-L 19.9, 22.7 and 22.9 for base (120M),
medium (340M) and large (760M); the teacher has 21.5. Rates, batch and schedule are
those of MiniLLM's code, which the paper says it uses. The paper names neither alpha
nor the module's learning rate; see BUILD_NOTES.md for our choice.

Stages: the teacher is fine-tuned for 10 epochs, the student for 3 (its best by
validation loss starts the distillation), then 20 epochs of OKD (10 for large), the best
by validation ROUGE-L being exported. Meant for 8 accelerators of 16 GB or more.
Time and result: not measured.
"""

from configs import default

# Student, its learning rate, epochs of distillation.
VARIANTS = {
  "base": ("gpt2", 5e-4, 20),
  "medium": ("gpt2-medium", 1e-4, 20),
  "large": ("gpt2-large", 1e-4, 10),
}


def get_config(variant: str = "base"):
  if variant not in VARIANTS:
    raise ValueError(f"gpt2.py:{variant}: the variants are {', '.join(VARIANTS)}")
  student, lr, epochs = VARIANTS[variant]
  config = default.get_config()
  config.teacher.path = "stage:teacher"
  config.student.path = "stage:start"
  config.method.teacher_kl_weight = 0.5
  config.data.train = "databricks/databricks-dolly-15k"
  config.data.template = "alpaca"
  config.data.holdout = 1000
  config.train.epochs = float(epochs)
  config.train.batch_size = 32
  config.train.dtype = "bfloat16"
  config.train.dropout = 0.1
  config.train.remat = True
  config.optim.lr = lr
  config.eval.batch_size = 32
  config.eval.generate_limit = 256
  config.eval.max_new_tokens = 256
  config.eval.temperature = 1.0
  config.eval.best = "rougeL"

  config.stages.teacher = {
    "method": {"name": "sft"},
    "student": {"path": "gpt2-xl"},
    "train": {"steps": 0, "epochs": 10.0},
    "optim": {"lr": 5e-5},
    "eval": {"best": "loss", "generate": False},
  }
  config.stages.start = {
    "method": {"name": "sft"},
    "student": {"path": student},
    "train": {"steps": 0, "epochs": 3.0},
    "optim": {"lr": 5e-4},
    "eval": {"best": "loss", "generate": False},
  }
  return config
