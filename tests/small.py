"""The configuration of a run that is even smaller than configs/debug.py."""

from configs import debug


def config(**changes):
  config = debug.get_config()
  config.method.name = "kd"
  config.data.train = "embedded:eval"
  config.data.holdout = 8
  config.data.max_length = 96
  config.data.max_prompt_length = 80
  config.train.steps = 4
  config.unlock()
  config.update_from_flattened_dict(changes)
  return config
