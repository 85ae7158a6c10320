"""Keys of the data: sources in a text or in a list."""

import json

import pytest

from okd_jax.config import read
from okd_jax.config.schema import settings
from okd_jax.config.stages import stages
from okd_jax.errors import UserError


def test_sources_are_text_with_commas_or_a_list(tmp_path):
  arguments = ["--config=configs/debug.py", "--config.data.train= a.jsonl,b/*.csv"]
  data = settings(read.read([*arguments, "--config.data.eval=2024"])).data
  assert (data.sources, data.eval_sources) == (["a.jsonl", "b/*.csv"], ["2024"])
  recipe = tmp_path / "mine.py"
  recipe.write_text(
    "from pathlib import Path\nfrom configs import quickstart\n"
    "def get_config():\n  config = quickstart.get_config()\n"
    "  config.data.train = [Path('a.jsonl'), 'b,c.parquet']\n"
    "  config.data.eval = ('d.csv',)\n  return config\n"
  )
  config = read.read([f"--config={recipe}"])
  data = settings(config).data
  assert data.sources == ["a.jsonl", "b,c.parquet"] and data.eval_sources == ["d.csv"]
  path = tmp_path / "config.json"
  path.write_text(json.dumps(config.to_dict()))
  assert settings(read.saved(path)).data == data
  copy = config.copy_and_resolve_references()
  assert read.changed(copy, {"data.eval": "e"}).data.eval == "e"
  assert settings(read.parsed(copy, ["--config.data.train=f,g"])).data.sources == [
    "f",
    "g",
  ]
  last = stages(config, tmp_path)[-1]
  assert settings(last.config).data.sources == data.sources


def test_held_out_rows_of_the_embedded_data():
  for train in ("embedded", ["embedded"]):
    config = read.from_keys({"data.train": train}, "debug")
    assert settings(config).data.eval_sources == ["embedded:eval"]
  config = read.from_keys({"data.train": ["embedded", "a.jsonl"]}, "debug")
  assert settings(config).data.eval_sources == []


def test_columns_by_flag_dict_and_recipe(tmp_path):
  def renames(config):
    return settings(config).data.renames

  flags = ["--config.data.columns.prompt=question"]
  assert renames(read.read(["--config=debug", *flags])) == {"prompt": "question"}
  names = {"prompt": "question", "completion": "answers.text"}
  config = read.from_keys({"data.columns": names}, "quickstart")
  assert renames(config) == names
  assert all(renames(s.config) == names for s in stages(config, tmp_path))
  recipe = tmp_path / "mine.py"
  recipe.write_text(
    "from configs import debug\ndef get_config():\n  config = debug.get_config()\n"
    "  config.data.columns.text = 'story'\n  return config\n"
  )
  config = read.read([f"--config={recipe}", *flags])
  assert renames(config) == {"text": "story", "prompt": "question"}
  path = tmp_path / "config.json"
  path.write_text(json.dumps(config.to_dict()))
  assert renames(read.saved(path)) == renames(config)
  back = [f"--config={recipe}", "--config.data.columns.text="]
  assert renames(read.read(back)) == {}


def test_columns_that_are_none_of_ours():
  config = read.from_keys({"data.columns": {"promt": "q"}}, "debug")
  with pytest.raises(UserError, match="data.columns.promt is no key .*prompt, compl"):
    settings(config)
  with pytest.raises(UserError, match="data.columns"):
    read.read(["--config=debug", "--config.data.columns=question"])


@pytest.mark.parametrize("value", [3, None, ["a", 3], {"a": "b"}])
def test_sources_that_are_no_text(value):
  with pytest.raises(UserError, match="data.train=.* must be text, or a list"):
    settings(read.from_keys({"data.train": value}, "debug"))
