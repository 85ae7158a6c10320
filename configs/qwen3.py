"""Qwen3: 8B teaches 0.6B or 1.7B, in chats.

    python -m okd_jax.main --config=configs/qwen3.py:8b --workdir=runs/qwen3

Variants: '8b' (student Qwen/Qwen3-0.6B) and '8b-1.7b'. The module learns from a quarter
of the rows, in the top quarter of the layers; --config.teacher.dtype=int8 halves the
teacher's memory. Weights and optimiser state are split over all devices (mesh.fsdp).
Rates are those of configs/llama.py. Time and result: not measured.
"""

from configs import default

STUDENTS = {"8b": "Qwen/Qwen3-0.6B", "8b-1.7b": "Qwen/Qwen3-1.7B"}


def get_config(variant: str = "8b"):
  if variant not in STUDENTS:
    raise ValueError(f"qwen3.py:{variant}: the variants are {', '.join(STUDENTS)}")
  config = default.get_config()
  config.teacher.path = "Qwen/Qwen3-8B"
  config.student.path = STUDENTS[variant]
  default.for_chats(config)
  config.adapter.layers = 9  # of 36
  return config
