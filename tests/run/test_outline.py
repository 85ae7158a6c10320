"""Shapes of a run's models, before any weight is read."""

import tokenizers
import transformers

from okd_jax.config import read
from okd_jax.run.job import check
from okd_jax.run.outline import outline
from okd_jax.runtime.workdir import Workdir


def test_a_random_model_has_a_place_for_every_id(tmp_path):
  """Ids may have holes: then there are fewer tokens than the largest id says."""
  vocab = {"a": 0, "b": 1, "</s>": 2, "z": 11}
  backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="a"))
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend, eos_token="</s>"
  )
  tokenizer.save_pretrained(tmp_path / "tokens")
  assert len(tokenizer) == 4
  config = read.read(["--config=debug"])
  config.data.tokenizer = str(tmp_path / "tokens")
  shape = outline(check(config), Workdir(tmp_path / "run"), lambda: ())
  assert shape.student.vocab_size == shape.teachers["teacher"].vocab_size == 12
