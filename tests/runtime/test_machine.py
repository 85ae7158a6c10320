"""What a run costs is added up, and a damaged file of it stops nobody."""

import json

import pytest

from okd_jax.runtime import machine
from okd_jax.runtime.workdir import Workdir


def test_the_parts_of_a_run_add_up(tmp_path):
  own = Workdir(tmp_path)
  own.write_json(own.cost, {"seconds": 100.0, "peak_bytes": 2**60, "of": "process"})
  with machine.counted(own):
    pass
  found = json.loads(own.cost.read_text())
  assert 100 <= found["seconds"] < 200 and found["peak_bytes"] == 2**60


@pytest.mark.parametrize(
  "content", [b"", b"[]", b"5", b"\xff", b'{"of": "process"}', b'{"seconds": "x"}']
)
def test_a_damaged_file_is_told_and_begun_anew(content, tmp_path, caplog):
  own = Workdir(tmp_path)
  own.cost.write_bytes(content)
  with machine.counted(own):
    pass
  assert json.loads(own.cost.read_text())["seconds"] < 100
  assert "cost.json is damaged: what the run has cost is counted anew" in caplog.text
