"""Text that the teacher wrote itself, where okd is not expected to win.

    python -m configs.stories                        # once: the data, half a minute
    python -m okd_jax.study --config=configs/studies/own_text.py --workdir=runs/own_text

stories260K as it is teaches two of its layers by its own stories: to the frozen teacher
the data cannot be better explained, and a module that follows gold text has nothing to
learn. Rows of 64 tokens, a story's first sentence being the prompt. RESULTS.md has what
came out.
"""

from configs import stories
from configs.studies import scarce
from configs.studies.plenty import ARMS


def get_config():
  config = scarce.get_config()
  config.teacher.path = str(stories.TEACHER)
  config.data.train = str(stories.DATA / "train.jsonl")
  config.data.eval = str(stories.DATA / "eval.jsonl")
  del config.stages["teacher"]
  config.stages.start["teacher"]["path"] = str(stories.TEACHER)
  return config


def get_study():
  sets = {"stories": str(stories.DATA / "eval.jsonl")}
  return {"arms": ARMS, "seeds": 3} | scarce.MEASURES | {"sets": sets}
