"""Whole runs that sample while they train, through the command line."""

import collections
import json
import re

import numpy as np
import pytest
from commands import QUICK, rows, second_half, train, train_several


@pytest.mark.parametrize(
  "knobs",
  [
    # Step 5 trains on the batch that was sampled for steps 4 to 6.
    ["name=minillm", "updates_per_sample=3"],
    ["name=gkd", "replay=True", "sampled_share=1.0"],
  ],
)
@pytest.mark.slow
def test_sampled_text_goes_on_where_it_was(knobs, tmp_path):
  """Guards H3: held batches and replayed rows come back with the checkpoint."""
  knobs = [f"--config.method.{knob}" for knob in knobs]
  whole, cut = tmp_path / "whole", tmp_path / "cut"
  train(whole, *knobs)
  second_half(whole, cut, *knobs)


@pytest.mark.parametrize("weighting", ["gated", "reinforced"])
@pytest.mark.slow
def test_gate_and_policy_go_on_where_they_were(weighting, tmp_path):
  """Their parameters and moments come back, and so does what the policy draws."""
  whole, cut = tmp_path / "whole", tmp_path / "cut"
  knobs = ["--config.method.name=ensemble", "--config.adapter.kind=lora"]
  knobs += [f"--config.method.weighting={weighting}", "--config.method.gate_lr=0.1"]
  train(whole, *knobs)
  second_half(whole, cut, *knobs)


@pytest.mark.slow
def test_a_run_over_mixed_lengths_compiles_once_a_bucket(tmp_path):
  """One training step, and one sampling loop for each bucket of prompts."""
  data = tmp_path / "data.jsonl"
  lengths = [3 * (1 + i * i % 37) for i in range(40)]
  data.write_text(
    "".join(
      json.dumps({"prompt": "ab " * (n // 3), "completion": "yes " * (1 + n % 5)})
      + "\n"
      for n in lengths
    )
  )
  done = train(
    tmp_path / "run",
    f"--config.data.train={data}",
    f"--config.data.eval={data}",
    "--config.data.max_length=160",
    "--config.data.max_prompt_length=120",
    "--config.train.batch_size=1",
    "--config.train.steps=20",
    "--config.eval.generate=False",
    "--config.method.name=gkd",
    "--config.method.sampled_share=1.0",
    compiles=True,
  )
  programs = collections.Counter(re.findall(r"Compiling jit\((\w+)\)", done.stderr))
  widths = {max(32, 1 << (n - 1).bit_length()) for n in lengths}
  assert widths == {32, 64, 128} and programs["sample"] == len(widths)
  assert programs["train_step"] == 1
  sampled = [row["sampled"] for row in rows(tmp_path / "run", "train")]
  assert sampled == [1.0] * 20


@pytest.mark.slow
def test_two_processes_sample_and_train_as_one(tmp_path):
  """Guards G3, G4: both write the same text, and neither waits for the other."""
  changes = [*QUICK, "--config.method.name=gkd", "--config.method.replay=True"]
  changes += ["--config.method.sampled_share=1.0"]
  train(tmp_path / "one", *changes)
  train_several(tmp_path / "two", *changes, devices=2)
  for kind, names in {
    "train": ("loss", "sampled_length", "replay_age"),
    "eval": ("loss", "forward_kl"),
  }.items():
    for one, two in zip(
      rows(tmp_path / "one", kind), rows(tmp_path / "two", kind), strict=True
    ):
      for name in names:
        np.testing.assert_allclose(two[name], one[name], rtol=1e-4, err_msg=name)
