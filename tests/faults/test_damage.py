"""A dozen of the damages of `make faults`."""

import pytest
from faults import damage

# Of each kind of file the damages that nothing but a digest sees.
CHOSEN = {
  ("half", "config.json", "delete", "main"),
  ("half", "about.json", "zeros", "main"),
  ("half", "models.json", "half", "main"),
  ("half", "metrics.jsonl", "bit 1", "main"),
  ("half", "sample_answers.json", "empty", "main"),
  ("half", "tokenizer/tokenizer.json", "bit 2", "main"),
  ("half", "checkpoints/6/metrics/metrics", "bit 1", "main"),
  ("half", "checkpoints/6/metrics/metrics", "zeros", "export"),
  ("half", "checkpoints/6/data/position.json", "bit 3", "main"),
  ("half", "checkpoints/6/seal/seal.json", "delete", "main"),
  ("half", "checkpoints/6/state/ocdbt.process_0/d/", "bit 1", "main"),
  ("half", "checkpoints/6/state/ocdbt.process_0/d/", "bit 2", "export"),
  ("whole", "student/model.safetensors", "delete", "main"),
  ("whole", "student/config.json", "bit 1", "main"),
}


def _chosen(trials):
  return [
    trial
    for trial in trials
    if any(
      (trial.workdir, trial.kind, trial.command) == (workdir, kind, command)
      and trial.file.startswith(file)
      for workdir, file, kind, command in CHOSEN
    )
  ]


@pytest.mark.slow
def test_no_damage_goes_unnoticed(tmp_path):
  found = damage.campaign(tmp_path, _chosen)
  assert len(found) == len(CHOSEN)
  wrong = [(trial, came) for trial, came, _ in found if came not in damage.MARKS]
  assert not wrong
  assert "refused" in {came for _, came, _ in found}
