"""The benchmarks' own code: what they refuse, and what they make of measured times."""

import importlib.util
from pathlib import Path

import pytest

from configs import default
from okd_jax.errors import UserError

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def peer(monkeypatch):
  monkeypatch.syspath_prepend(FOLDER)
  return importlib.import_module("peer_trl")


def test_contenders_of_a_benchmark_are_configurations(monkeypatch):
  """NAME@KEY=VALUE sets keys of every type, and leaves the given configuration."""
  monkeypatch.syspath_prepend(FOLDER)
  vary = importlib.import_module("command").vary
  config = default.get_config()
  name = "okd@adapter.layers=2@optim.lr=1e-3@train.remat=True"
  got = vary(config, f"{name}@method.sampled_share=1.0@data.pack=True")
  assert (got.method.name, got.adapter.layers) == ("okd", 2)
  assert (got.optim.lr, got.train.remat, got.data.pack) == (1e-3, True, True)
  assert got.method.sampled_share == 1.0  # None before
  assert config.to_dict() == default.get_config().to_dict()
  for wrong in ("bogus.key=1", "train.bogus=1", "train.batch_size=x", "train=1", "a"):
    with pytest.raises(UserError, match=f"kd@{wrong}: '{wrong}' sets no key"):
      vary(config, f"kd@{wrong}")


def test_without_trl_it_says_what_to_install(peer, monkeypatch):
  found = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util, "find_spec", lambda name: None if name == "trl" else found(name)
  )
  with pytest.raises(UserError, match=r"needs trl.*: pip install '.\[peers\]'"):
    peer.main(["--names=trl,kd"])


def test_contenders_that_do_other_work_are_not_compared(peer):
  same = {"trl": [{"losses": [0.5]}], "kd": [{"losses": [0.50001]}]}
  peer._check_losses(same)
  with pytest.raises(UserError, match="first losses differ"):
    peer._check_losses(same | {"okd": [{"losses": [0.51]}]})


def test_ratios_are_taken_round_by_round(peer):
  """A slow round of the whole machine changes no ratio."""
  args = peer._parser().parse_args(["--batch_size=2", "--length=50"])
  base = [{"times": [2.0, 2.0]}, {"times": [20.0]}, {"times": [1.0, 3.0]}]
  ours = [{"times": [1.0, 1.0]}, {"times": [10.0]}, {"times": [1.0, 1.0]}]
  assert peer._cells(args, ours, base) == ["1000", "1000", "10000", "0.50", "100"]
