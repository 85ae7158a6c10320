"""OKD once, and then students of the teacher that it adapted; on any recipe.

    python -m okd_jax.main --config=configs/okd_twice.py --workdir=runs/twice
    python -m okd_jax.main --config=configs/okd_twice.py:gpt2.medium --workdir=…

Stage 'okd' trains a student and, with it, the teacher's small module. The run itself
is forward KD from that teacher, its module merged in and frozen: no teacher learns any
more, so a step costs what KD's costs. Flags for the stage name it:
--config.stages.okd.adapter.every=4 --config.stages.okd.method.drift_target=0.1.

What the module has learned is a product that serves students of other sizes, too:
--config.student.path=…, in a --workdir of its own with --config.teacher.path=… and
--config.teacher.adapter=runs/twice/stages/okd.

Further students need not even run it. Store what it says once, then train from that:

    python -m okd_jax.cache_teacher --config=configs/okd_twice.py \\
        --workdir=runs/twice --output=runs/adapted-cache
    python -m okd_jax.main --config=configs/okd_twice.py --workdir=runs/twice-cached \\
        --config.teacher.cache=runs/adapted-cache

In a small study (BUILD_NOTES.md, "A first study") students of the final, frozen module
did as well as those that had learned beside it.
"""

from configs import default


def get_config(recipe: str = "quickstart"):
  config = default.recipe(recipe)
  default.use(config, "okd")  # its knobs are the recipe's, where that is OKD
  config.stages.okd = {
    "method": config.method.to_dict(),
    "teacher": {key: config.teacher[key] for key in ("path", "model")},
    "student": config.student.to_dict(),
    "adapter": config.adapter.to_dict() | {"kind": "lora"},
    "eval": {"generate": False},
  }
  default.use(config, "kd")
  config.teacher.adapter = "stage:okd"
  return config
