"""The smallest whole run: random tiny teacher and student, documentation as data.

    python -m okd_jax.main --config=configs/debug.py --workdir=runs/debug

Any method: --config.method.name=NAME. Everything else is as in a real run: the
tokenizer, checkpoints, evaluation, ROUGE-L, export and report. The teacher knows
nothing, so only the losses mean anything, and they fall.
"""

from configs import default


def get_config():
  config = default.get_config()
  config.teacher.model.hidden_size = 64
  config.teacher.model.num_layers = 3
  config.student.model.hidden_size = 32
  config.student.model.num_layers = 2
  config.adapter.rank = 4
  config.data.tokenizer = "bytes"
  config.data.max_length = 128
  config.data.max_prompt_length = 96
  config.train.steps = 60
  config.optim.lr = 3e-3
  config.checkpoint.every = 20
  config.eval.every = 30
  config.eval.limit = 16
  config.eval.generate_limit = 8
  config.eval.max_new_tokens = 16
  return config
