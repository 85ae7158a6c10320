"""Gemma 3: 12B or 4B teaches 1B, in chats.

    python -m okd_jax.main --config=configs/gemma3.py:12b --workdir=runs/gemma3

Variants: '12b' and '4b', of which the text models alone are read, and '1b-270m'. The
module learns from a quarter of the rows, in the top quarter of the layers. Weights and
optimiser state are split over all devices (mesh.fsdp). Rates are those of
configs/llama.py. Time and result: not measured.
"""

from configs import default

# Teacher, its layers that hold modules, student.
VARIANTS = {
  "12b": ("google/gemma-3-12b-it", 12, "google/gemma-3-1b-it"),
  "4b": ("google/gemma-3-4b-it", 8, "google/gemma-3-1b-it"),
  "1b-270m": ("google/gemma-3-1b-it", 6, "google/gemma-3-270m-it"),
}


def get_config(variant: str = "12b"):
  if variant not in VARIANTS:
    raise ValueError(f"gemma3.py:{variant}: the variants are {', '.join(VARIANTS)}")
  config = default.get_config()
  config.teacher.path, layers, config.student.path = VARIANTS[variant]
  default.for_chats(config)
  config.adapter.layers = layers
  return config
